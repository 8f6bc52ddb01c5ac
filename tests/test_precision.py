"""Weights that stay in FP8: the same model, the same bytes on disk, a quarter of the memory of fp32; and the ways in and out."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Native

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model
from modeling_deepseek.fp8 import FP8Experts, FP8Linear, dequantize, fp8_linear, quantize
from test_fp8 import FP8, split_into_two_shards
from tiny import tiny_model, tiny_tokens

IDS = torch.arange(20)[None]


def load(fp8_weights: str, path=FP8, dtype=torch.float32, model_class=DeepseekV3ForCausalLM, **options):
    return model_class.from_pretrained(path, fp8_weights=fp8_weights, dtype=dtype, **options)


@pytest.fixture(scope="module")
def dequantized():
    return load("dequantize")


def same_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(
        ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([(128, 128), (64, 32)]), st.integers(0, 9))
def test_product_and_gradient_are_those_of_the_dequantised_weight(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, scale = quantize(torch.randn(rows, columns, generator=generator), block)
    x = torch.randn(3, columns, generator=generator, requires_grad=True)
    towards = torch.randn(3, rows, generator=generator)
    found = []
    for product in (fp8_linear(x, weight, scale, block), F.linear(x, dequantize(weight, scale, block))):
        (gradient,) = torch.autograd.grad(product, x, towards)
        found.append((product, gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_weight_in_many_pieces_gives_the_product_of_the_whole(monkeypatch):
    weight, scale = quantize(torch.randn(576, 300))
    x = torch.randn(2, 300)
    whole = fp8_linear(x, weight, scale, (128, 128))
    monkeypatch.setattr("modeling_deepseek.fp8.PIECE", 1)
    torch.testing.assert_close(fp8_linear(x, weight, scale, (128, 128)), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([None, "ue8m0"]), st.integers(0, 9))
def test_quantised_weights_follow_the_official_rule(rows, columns, scale_fmt, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    quantized, scale = quantize(weight, scale_fmt=scale_fmt)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            expected = weight[part].float().abs().max() / 448
            if scale_fmt:
                expected = 2 ** torch.ceil(torch.log2(expected))
            assert scale[i, j] == expected
            assert torch.equal(
                quantized[part].float(), (weight[part].float() / expected).to(torch.float8_e4m3fn).float()
            )


def test_a_block_of_zeros_stays_zero():
    quantized, scale = quantize(torch.zeros(130, 5))
    assert (scale == 1).all()
    assert (dequantize(quantized, scale) == 0).all()


@pytest.mark.parametrize("mla_mode", ["auto", "absorbed", "expanded"])
def test_logits_and_tokens_are_those_of_the_dequantised_model(dequantized, mla_mode):
    kept = load("keep", mla_mode=mla_mode)
    with torch.no_grad():
        for ours, theirs in zip(
            *(
                (out.logits, *out.mtp_logits)
                for out in (model(IDS, output_mtp_logits=True) for model in (kept, dequantized))
            ),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    tokens = [model.generate(IDS, max_new_tokens=12, do_sample=False) for model in (kept, dequantized)]
    assert torch.equal(*tokens)
    assert torch.equal(kept.generate(IDS, max_new_tokens=12, do_sample=False, use_mtp=True), tokens[0])


def test_every_quantised_weight_stays_so_and_takes_its_byte():
    kept = load("keep", dtype=torch.bfloat16)
    stored = load_file(FP8 / "model.safetensors")
    elements = sum(tensor.numel() for tensor in stored.values() if tensor.dtype == torch.float8_e4m3fn)
    modules = [module for module in kept.modules() if isinstance(module, (FP8Linear, FP8Experts))]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    assert sum(tensor.numel() for tensor in tensors if tensor.itemsize == 1) == elements
    assert sum(tensor.nbytes for tensor in tensors) <= 1.1 * elements
    assert kept.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["scales in fp32", "scales in e8m0", "two shards"])
def test_a_kept_model_saves_the_very_bytes_that_it_was_loaded_from(tmp_path, name):
    stored, source = load_file(FP8 / "model.safetensors"), FP8
    if name == "two shards":
        split_into_two_shards(source := tmp_path / "source")
    if name == "scales in e8m0":
        stored = {
            key: torch.exp2(torch.log2(x).round()).to(torch.float8_e8m0fnu) if key.endswith("_scale_inv") else x
            for key, x in stored.items()
        }
        (source := tmp_path / "source").mkdir()
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        (source / "config.json").write_text((FP8 / "config.json").read_text())
    load("keep", source, torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(same_bytes(saved[key], tensor) for key, tensor in stored.items())
    config, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", FP8))
    assert config["quantization_config"] == original["quantization_config"]


def test_a_decoder_without_head_keeps_its_weights_too(tmp_path):
    kept, plain = (load(how, model_class=DeepseekV3Model) for how in ("keep", "dequantize"))
    assert any(isinstance(module, FP8Experts) for module in kept.modules())
    torch.testing.assert_close(kept(IDS).last_hidden_state, plain(IDS).last_hidden_state, rtol=0, atol=1e-4)


def test_casting_the_model_leaves_its_fp8_weights_alone():
    kept = load("keep")
    linear = kept.model.layers[0].self_attn.o_proj
    before, scale = linear.weight.clone(), linear.weight_scale_inv.clone()
    kept.to(torch.bfloat16)
    assert kept.model.embed_tokens.weight.dtype == torch.bfloat16
    assert same_bytes(linear.weight, before)
    assert torch.equal(linear.weight_scale_inv, scale)
    assert kept(IDS).logits.isfinite().all()


def test_adapters_get_the_gradients_that_they_get_on_dequantised_weights():
    gradients, weights = [], None
    for how in ("keep", "dequantize"):
        config = LoraConfig(target_modules=["q_b_proj", "o_proj", "kv_b_proj"], init_lora_weights=False)
        model = get_peft_model(load(how), config).train()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora" in name for name in trained)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name] if weights else parameter)
        weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_a_kept_weight_is_frozen_and_the_others_are_not():
    kept = load("keep")
    trainable = {name for name, parameter in kept.named_parameters() if parameter.requires_grad}
    assert "model.layers.1.mlp.gate.weight" in trainable
    assert not any("_proj" in name and "eh_proj" not in name for name in trainable)


def test_adapters_on_kept_experts_learn_as_on_dequantised_ones():
    config = dict(target_modules=["gate_proj", "up_proj", "down_proj"], r=4, init_lora_weights=False)
    dequantized, kept = (get_peft_model(load(how), LoraConfig(**config)).train() for how in ("dequantize", "keep"))
    assert any(isinstance(module, FP8Experts) for module in kept.modules())
    there = {name: parameter for name, parameter in dequantized.named_parameters() if parameter.requires_grad}
    ours = {name: parameter for name, parameter in kept.named_parameters() if parameter.requires_grad}
    assert there.keys() == ours.keys()
    assert {parameter.dtype for parameter in ours.values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(there[name])
    losses = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for model in (dequantized, kept)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert any(".mlp.experts." in name for name in ours)
    for name, parameter in ours.items():
        scale = there[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, there[name].grad, rtol=0, atol=1e-3 * scale, msg=name)


def test_what_would_be_added_to_kept_experts_is_refused():
    model = load("keep")
    register_parametrization(model.model.layers[1].mlp.experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match="experts that are kept in FP8.*fp8_weights='dequantize'.*model as a whole"):
        model(input_ids=IDS)


def test_adapters_on_kept_experts_are_switched_off_saved_and_merged(tmp_path):
    model = load("keep")
    plain = model(input_ids=IDS).logits
    model = get_peft_model(
        model, LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    )
    adapted = model.eval()(input_ids=IDS).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(tmp_path)
    for how in ("keep", "dequantize"):
        loaded = PeftModel.from_pretrained(load(how), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=IDS).logits, adapted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="kept in FP8, into which an adapter does not merge.*dequantize_fp8"):
        model.base_model.model.model.layers[-1].mlp.experts.merge()
    model.base_model.model.dequantize_fp8()
    torch.testing.assert_close(model(input_ids=IDS).logits, adapted, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, adapted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, DeepseekV3ForCausalLM])
def test_the_folder_of_an_adapter_loads_with_the_fp8_model_that_it_names(tmp_path, model_class, fp8_weights):
    config = LoraConfig(target_modules=["o_proj", "gate_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(load("keep"), config).eval()
    model.save_pretrained(tmp_path)
    loaded = load(fp8_weights, tmp_path, model_class=model_class)
    assert any(isinstance(module, FP8Experts) for module in loaded.modules()) == (fp8_weights == "keep")
    torch.testing.assert_close(loaded(IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_learned_on_kept_weights_merge_into_what_native_transformers_reads(tmp_path, dtype):
    model = load("keep", dtype=dtype)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=64)).train()
    before = model(input_ids=IDS, labels=IDS).loss.item()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(input_ids=IDS, labels=IDS).loss.item() < before - 0.1
    adapted = model.eval()(input_ids=IDS).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="kept in FP8, into which an adapter does not merge.*dequantize_fp8"):
            merge()
    model.dequantize_fp8()
    merged = model.merge_and_unload()
    assert not any(isinstance(module, (FP8Linear, FP8Experts)) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["dtype"] == str(dtype).removeprefix("torch.")
    native = Native.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours(IDS).logits, native(IDS).logits, rtol=0, atol=2e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(native(IDS).logits, adapted, rtol=0, atol=1e-3)


def test_a_new_model_of_an_fp8_config_is_saved_as_the_plain_one_that_it_is(tmp_path):
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(FP8))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    native = Native.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(native(IDS).logits, model.eval()(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_state_dict_takes_fp8_with_official_keys(shards):
    fresh, kept = load("keep"), load("keep")
    for name, tensor in fresh.state_dict().items():
        if "_proj" in name:
            tensor.view(torch.uint8).zero_()
    official = list(load_file(FP8 / "model.safetensors").items())
    for shard in range(shards):
        result = fresh.load_state_dict(dict(official[shard::shards]), strict=False)
        assert not [key for key in result.unexpected_keys if "_proj" in key]
        assert shards > 1 or not result.missing_keys
    for name, tensor in kept.state_dict().items():
        assert same_bytes(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("path", ["mlp.experts.3.up_proj", "self_attn.o_proj"])
def test_load_state_dict_into_fp8_names_what_does_not_fit(path):
    kept, name = load("keep"), f"model.layers.1.{path}.weight"
    plain = load_file(FP8 / "model.safetensors")[name].bfloat16()
    with pytest.raises(RuntimeError, match=f"dtype mismatch for {name}: torch.bfloat16, .*dequantize_fp8"):
        kept.load_state_dict({name: plain}, strict=False)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        kept.load_state_dict({name: torch.zeros(3, 3).to(torch.float8_e4m3fn)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for .*experts.99.up_proj.weight"):
        kept.load_state_dict({"model.layers.1.mlp.experts.99.up_proj.weight": plain}, strict=False)


def test_dequantising_in_place_gives_the_dequantised_model(dequantized):
    kept = load("keep")
    kept.dequantize_fp8()
    theirs = dequantized.state_dict()
    assert kept.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in kept.state_dict().items())


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_a_quantised_model_is_an_official_fp8_checkpoint(tmp_path, scale_fmt):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    model.quantize_fp8(scale_fmt)
    model.save_pretrained(tmp_path)
    saved, stored = load_file(tmp_path / "model.safetensors"), load_file(FP8 / "model.safetensors")
    kinds = [
        {key.split(".layers.")[-1].split(".", 1)[-1] for key, x in tensors.items() if x.dtype == torch.float8_e4m3fn}
        for tensors in (saved, stored)
    ]
    assert {key for key in kinds[0] if "experts." not in key} == {key for key in kinds[1] if "experts." not in key}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128]
    assert config.get("scale_fmt") == scale_fmt
    ids = tiny_tokens(model.config)
    for how in ("keep", "dequantize"):
        torch.testing.assert_close(load(how, tmp_path)(ids).logits, model(ids).logits, rtol=0, atol=2e-4)


def test_an_unknown_scale_format_is_refused():
    with pytest.raises(ValueError, match="scale_fmt is None or 'ue8m0', got 'e8m0'"):
        tiny_model("v3").quantize_fp8("e8m0")


def test_an_unknown_way_to_treat_fp8_weights_is_refused():
    with pytest.raises(ValueError, match="fp8_weights is 'hold': expected one of 'auto', 'dequantize', 'keep'"):
        load("hold")


def test_experts_that_are_fp8_in_part_cannot_be_kept(tmp_path):
    tensors = load_file(FP8 / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    del tensors[name + "_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((FP8 / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{name} is not.*dequantize"):
        load("keep", tmp_path)


def test_a_projection_of_v3_has_five_rows_of_scales():
    weight, scale = quantize(torch.randn(576, 7168))
    assert scale.shape == (5, 56)
    linear = FP8Linear(weight, scale, (128, 128), None)
    x = torch.randn(2, 7168)
    torch.testing.assert_close(linear(x), F.linear(x, dequantize(weight, scale)), rtol=1e-4, atol=1e-3)


def test_mtp_layers_may_be_added_to_weights_that_are_kept(tmp_path):
    model = load("keep", dtype=torch.bfloat16)
    model.add_mtp_layers()
    layer = model.model.layers[-1]
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    (*_, expected) = model(IDS, output_mtp_logits=True).mtp_logits
    model.save_pretrained(tmp_path)
    (*_, found) = load("keep", tmp_path, dtype=torch.bfloat16)(IDS, output_mtp_logits=True).mtp_logits
    torch.testing.assert_close(found, expected)


def test_a_kept_model_that_was_dequantised_saves_what_the_dequantised_one_does(tmp_path, dequantized):
    kept = load("keep")
    kept.dequantize_fp8()
    for name, model in (("kept", kept), ("dequantized", dequantized)):
        model.save_pretrained(tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "dequantized"))
    assert ours.keys() == theirs.keys()
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in ours
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def rewritten(folder, change, **config):
    """A copy of the FP8 checkpoint whose tensors went through `change`."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(FP8 / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((FP8 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    return folder


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
def test_a_bare_decoder_that_was_kept_loads_into_every_class(tmp_path, fp8_weights, dequantized):
    load("keep", model_class=DeepseekV3Model).save_pretrained(tmp_path)
    expected = dequantized.model(IDS).last_hidden_state
    for model_class in (DeepseekV3ForCausalLM, DeepseekV3Model):
        model = load(fp8_weights, tmp_path, model_class=model_class)
        torch.testing.assert_close(model.base_model(IDS).last_hidden_state, expected, rtol=0, atol=2e-4)
        assert any(isinstance(module, FP8Linear) for module in model.modules()) == (fp8_weights == "keep")


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.gate", "lm_head"])
def test_what_is_no_layer_of_the_decoder_is_dequantised_and_saved_so(tmp_path, name):
    def change(tensors):
        weight, scale = quantize(tensors[f"{name}.weight"].float())
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}

    folder = rewritten(tmp_path / "fp8", change)
    kept, plain = (load(way, folder) for way in ("keep", "dequantize"))
    torch.testing.assert_close(kept(IDS).logits, plain(IDS).logits, rtol=0, atol=2e-4)
    kept.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load("keep", tmp_path / "again")(IDS).logits, plain(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
def test_scales_of_another_dtype_are_read_or_named(tmp_path, fp8_weights):
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"

    def to(dtype):
        return rewritten(tmp_path / str(dtype), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    expected = load("dequantize", to(torch.bfloat16))(IDS).logits
    torch.testing.assert_close(load(fp8_weights, to(torch.bfloat16))(IDS).logits, expected, rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match=rf"{name} is I32 .* expected BF16 or F32 or F8_E8M0"):
        load(fp8_weights, to(torch.int32))


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
def test_fp8_in_a_pickle_is_refused(tmp_path, fp8_weights):
    torch.save(load_file(FP8 / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((FP8 / "config.json").read_text())
    with pytest.raises(ValueError, match="no safetensors files"):
        load(fp8_weights, tmp_path)


def test_a_kept_weight_of_another_shape_is_named(tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = rewritten(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :32].contiguous()}))
    with pytest.raises(ValueError, match=rf"{name} is \[128, 32\], by the config \[128, 64\]"):
        load("keep", folder)


@pytest.mark.parametrize("options", [{}, dict(autocast_adapter_dtype=False)])
def test_adapters_have_the_dtype_of_the_model_and_the_values_they_are_given(options, tmp_path):
    config = LoraConfig(target_modules=["q_b_proj", "o_proj"], init_lora_weights=False)
    models = []
    for way in ("dequantize", "keep"):
        torch.manual_seed(0)
        models.append(get_peft_model(load(way), config, **options))
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        if "lora_" in name:
            assert torch.equal(ours, theirs), name
    models[0].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load("keep"), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(again(IDS).logits, models[0](IDS).logits, rtol=0, atol=5e-4)
    kept = load("keep")
    kept.add_adapter(config)
    kept(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.dtype for n, p in kept.named_parameters() if "lora_" in n} == {torch.float32}


def test_adapters_follow_the_model_to_another_dtype():
    model = load("keep").to(torch.bfloat16)
    assert {module.compute_dtype for module in model.modules() if isinstance(module, FP8Linear)} == {torch.bfloat16}


def test_kept_and_offloaded_it_runs_and_says_what_it_cannot(tmp_path, dequantized):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for mode in ("expanded", "absorbed"):
        model = load("keep", device_map=places, offload_folder=tmp_path, mla_mode=mode)
        torch.testing.assert_close(model(IDS).logits, dequantized(IDS).logits, rtol=0, atol=2e-4)
    for act in (model.dequantize_fp8, lambda: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(ValueError, match="offloaded, out of reach of.*fp8_weights='dequantize'"):
            act()


def test_scales_are_fp32_whatever_the_default_dtype(monkeypatch):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert quantize(torch.randn(4, 4))[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_that_cannot_be_quantised_is_left_as_it_was():
    model = load("keep")
    with pytest.raises(ValueError, match="holds FP8 weights already: undo that first"):
        model.quantize_fp8("ue8m0")
    assert "scale_fmt" not in model.config.quantization_config
    model = tiny_model("v3")
    model.model.layers[2].mlp.experts.down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="layers.2.mlp.experts.down_proj holds values that are not finite"):
        model.quantize_fp8()
    assert not any(isinstance(module, FP8Linear) for module in model.modules())


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
def test_the_way_may_be_given_beside_a_config(fp8_weights):
    config = DeepseekV3Config.from_pretrained(FP8)
    model = load(fp8_weights, config=config)
    assert any(isinstance(module, FP8Linear) for module in model.modules()) == (fp8_weights == "keep")
    assert config.fp8_weights == "auto"
