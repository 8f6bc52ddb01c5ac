"""Block-FP8 checkpoints: exact weights, scales wherever they are, clear errors."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from modeling_deepseek.fp8 import dequantize

FP8 = Path(__file__).parent / "goldens" / "b3_v3_fp8_576"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """What is not said is as on a machine without a GPU that multiplies FP8."""
    monkeypatch.setattr("modeling_deepseek.fp8_checkpoint.gpu_multiplies_fp8", lambda: False)


@pytest.mark.parametrize(
    ("fp8_weights", "gpu", "kept"),
    [("auto", False, False), ("auto", True, True), ("keep", False, True), ("dequantize", True, False)],
)
def test_weights_are_kept_when_asked_for_or_where_a_gpu_multiplies_them(tmp_path, monkeypatch, fp8_weights, gpu, kept):
    monkeypatch.setattr("modeling_deepseek.fp8_checkpoint.gpu_multiplies_fp8", lambda: gpu)
    given = {} if fp8_weights == "auto" else dict(fp8_weights=fp8_weights)
    model = DeepseekV3ForCausalLM.from_pretrained(FP8, **given)
    assert (model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn) == kept
    assert hasattr(model.config, "quantization_config") == kept
    assert model.config.fp8_weights == fp8_weights


def values_of(weight, scale, block_size) -> torch.Tensor:
    """By the definition, in fp32."""
    row, column = (torch.arange(size) // block for size, block in zip(weight.shape, block_size, strict=True))
    return weight.float() * scale.float()[row][:, column]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([(128, 128), (64, 32), (1, 128)]),
    st.sampled_from(["F32", "E8M0"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_every_element_is_its_fp8_value_times_the_scale_of_its_block(rows, columns, block, scales, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    weight = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    grid = [-(-size // length) for size, length in zip(weight.shape, block, strict=True)]
    scale = torch.randint(1, 255, grid, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if scales == "F32":
        scale = scale.float() * torch.rand(grid, generator=generator)
    expected = values_of(weight, scale, block).to(dtype)
    assert torch.equal(dequantize(weight, scale, block, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_codes_are_dequantised_nan_too(dtype):
    weight, scale = torch.arange(256, dtype=torch.uint8).view(2, 128).view(dtype), torch.tensor([[0.37]])
    expected = values_of(weight, scale, (128, 128))
    torch.testing.assert_close(dequantize(weight, scale), expected, rtol=0, atol=0, equal_nan=True)


def test_memory_that_is_used_again_belongs_to_one_thread_and_no_mode():
    weights = [torch.randn(200, 300 + 10 * i).to(torch.float8_e4m3fn) for i in range(8)]
    scales = [torch.rand(2, 3) for _ in weights]

    def both(weight, scale):
        with torch.inference_mode():  # the first call of the thread
            dequantize(weight, scale, dtype=torch.bfloat16)
        return [dequantize(weight, scale, dtype=torch.bfloat16) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for weight, scale, found in zip(weights, scales, pool.map(both, weights, scales), strict=True):
            expected = values_of(weight, scale, (128, 128)).bfloat16()
            assert all(torch.equal(each, expected) for each in found)


def test_memory_that_is_used_again_is_real_and_on_the_cpu():
    weight, scale = torch.randn(300, 260).to(torch.float8_e4m3fn), torch.rand(3, 3)

    def mixed():
        with FakeTensorMode(allow_non_fake_inputs=True), suppress(Exception):
            dequantize(torch.empty(300, 260, dtype=torch.float8_e4m3fn), torch.empty(3, 3), dtype=torch.bfloat16)
        with torch.device("meta"):
            return dequantize(weight, scale, dtype=torch.bfloat16)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(mixed).result(), values_of(weight, scale, (128, 128)).bfloat16())


def test_ue8m0_scales_are_powers_of_two_and_read_alike():
    weight = torch.randn(576, 256).to(torch.float8_e4m3fn)
    exponents = torch.randint(-6, 6, (5, 2)).float().exp2()
    assert torch.equal(dequantize(weight, exponents.to(torch.float8_e8m0fnu)), dequantize(weight, exponents))


def test_scales_of_another_grid_are_an_error():
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(5, 2\) blocks"):
        dequantize(torch.zeros(576, 256).to(torch.float8_e4m3fn), torch.ones(4, 2))


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_loading_in_bf16_and_saving_is_the_official_cast_bit_by_bit(tmp_path):
    model = DeepseekV3ForCausalLM.from_pretrained(FP8)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    official = json.loads((FP8 / "golden" / "fp8_cast_bf16_sha256.json").read_text())
    assert saved.keys() == official.keys()
    for name, (dtype, shape, digest) in official.items():
        tensor = saved[name]
        assert tensor.dtype == getattr(torch, dtype)
        assert list(tensor.shape) == shape
        assert sha256(tensor) == digest, name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_config_alone_keeps_its_quantization_config(tmp_path):
    DeepseekV3Config.from_pretrained(FP8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def split_into_two_shards(folder: Path, drop: str | None = None) -> None:
    """The golden checkpoint with all scales in another file than the weights, less the tensor `drop`."""
    folder.mkdir()
    shutil.copy(FP8 / "config.json", folder)
    tensors = {name: tensor for name, tensor in load_file(FP8 / "model.safetensors").items() if name != drop}
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    weight_map = {}
    for number, shard in enumerate((tensors, scales), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_scales_may_lie_in_another_shard(tmp_path):
    split_into_two_shards(tmp_path / "sharded")
    ours, whole = (DeepseekV3ForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "sharded", FP8))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["weight", "weight_scale_inv"])
def test_half_of_a_pair_is_an_error_that_names_both(tmp_path, kind):
    name = "model.layers.1.self_attn.o_proj."
    split_into_two_shards(tmp_path / "sharded", drop=name + kind)
    with pytest.raises(ValueError, match=rf"{name}weight.*{name}weight"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "sharded")


WRONG = {
    "nan": (lambda scale: scale * torch.nan, r"o_proj.weight_scale_inv holds nan \(element 0\)"),
    "infinite": (lambda scale: scale / 0, "holds inf"),
    "zero": (lambda scale: scale * 0, r"holds 0.0 \(element 0\), expected finite scales above 0"),
    "negative": (lambda scale: -scale, "holds -"),
    "grid": (
        lambda scale: scale.repeat(2, 1),
        r"o_proj.weight_scale_inv is F32 \[2, 1\], expected .* \[1, 1\], one per.*weight_block_size",
    ),
}


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_scales_are_named_before_the_model_is_filled(tmp_path, change, message, fp8_weights):
    tensors, name = load_file(FP8 / "model.safetensors"), "model.layers.1.self_attn.o_proj.weight_scale_inv"
    tensors[name] = change(tensors[name])
    shutil.copy(FP8 / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, fp8_weights=fp8_weights)


QUANTIZATION = {
    "method": (dict(quant_method="fp7"), "quant_method 'fp7'; expected 'fp8' or another of"),
    "no method": (dict(weight_block_size=[128, 128]), "quant_method None; expected 'fp8'"),
    "block": (
        dict(quant_method="fp8", weight_block_size=[128]),
        r"weight_block_size \[128\]; expected rows and columns",
    ),
    "missing": (None, r"has block-FP8 scales \(.*_scale_inv\), and no quantization_config"),
}


@pytest.mark.parametrize(("quantization", "message"), QUANTIZATION.values(), ids=QUANTIZATION)
def test_fp8_weights_without_the_rule_to_read_them_are_refused(tmp_path, quantization, message):
    shutil.copy(FP8 / "model.safetensors", tmp_path)
    config = json.loads((FP8 / "config.json").read_text())
    del config["quantization_config"]
    if quantization is not None:
        config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


def test_config_fields_given_as_keywords_apply_to_an_fp8_checkpoint():
    model = DeepseekV3ForCausalLM.from_pretrained(FP8, num_nextn_predict_layers=0, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


def test_an_fp8_checkpoint_that_is_offloaded_to_disk_is_dequantised_too(tmp_path):
    ids = torch.arange(20)[None]
    whole = DeepseekV3ForCausalLM.from_pretrained(FP8, dtype=torch.float32)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    offloaded = DeepseekV3ForCausalLM.from_pretrained(
        FP8, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(offloaded(ids).logits, whole(ids).logits)
    for model, name in ((offloaded, "offloaded"), (whole, "whole")):
        model.save_pretrained(tmp_path / name)
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("offloaded", "whole"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_keywords_that_are_no_fields_of_the_config_work_on_an_fp8_checkpoint():
    model = DeepseekV3ForSequenceClassification.from_pretrained(FP8, num_labels=5, attn_implementation="eager")
    assert model.score.out_features == 5
    assert model.config._attn_implementation == "eager"
