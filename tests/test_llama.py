"""`from_llama` and `to_llama`: equal logits in transformers' Llama class and ours, and what is no plain Llama is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_deepseek import DeepseekForCausalLM
from modeling_deepseek.conversion.llama import from_llama, to_llama
from modeling_deepseek.hub import auto_map_for, code_files
from tiny import tiny_model, tiny_tokens

LLM, V3 = Path(__file__).parent / "goldens" / "g_llm_gqa", Path(__file__).parent / "goldens" / "a_v3_fp32"
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def llama(folder, rope=None, **fields):
    """A tiny random Llama, saved by transformers; its defaults are left to config.json's reader."""
    rope = {"rope_theta": 10000.0, **rope} if rope else None
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        **fields,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
def test_llama_has_the_same_logits_in_our_class(tmp_path, rope):
    model = llama(tmp_path / "llama", ROPES[rope], num_hidden_layers=2, vocab_size=128, max_position_embeddings=64)
    from_llama(tmp_path / "llama", tmp_path / "ours", max_shard_size="100KB")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = tiny_tokens(model.config, length=40)
    assert type(ours) is DeepseekForCausalLM
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
def test_our_model_has_the_same_logits_in_llamas_class(tmp_path, rope):
    fields = {} if ROPES[rope] is None else {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}}
    model = tiny_model("llm", **fields)
    model.save_pretrained(tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "llama", max_shard_size="20KB")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    tokens = tiny_tokens(model.config, length=40)
    assert type(llama) is LlamaForCausalLM
    torch.testing.assert_close(llama(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_official_llm_keeps_its_golden_logits(tmp_path):
    from_llama(LLM, tmp_path / "ours")
    golden = load_file(LLM / "golden" / "golden.safetensors")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(golden["input_ids"]).logits
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


def test_there_and_back_are_the_same_config_and_bits(tmp_path):
    from_llama(LLM, tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    assert read_config(tmp_path / "llama") == read_config(LLM)
    ours, official = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llama", LLM))
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in official.items())
    assert not list((tmp_path / "llama").glob("*.py"))


def test_defaults_that_differ_are_written_out(tmp_path):
    llama(tmp_path / "llama", num_hidden_layers=32, vocab_size=32000)
    fields = read_config(tmp_path / "llama")
    for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        del fields[name]
    (tmp_path / "llama" / "config.json").write_text(json.dumps(fields))
    from_llama(tmp_path / "llama", tmp_path / "ours")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).config
    assert (config.vocab_size, config.num_hidden_layers, config.max_position_embeddings) == (32000, 32, 2048)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_result_carries_the_code_for_remote_loading(tmp_path):
    from_llama(LLM, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["auto_map"] == auto_map_for("deepseek")
    files = {file.name: file.read_bytes() for file in (tmp_path / "ours").glob("*.py")}
    assert files == {file.name: file.read_bytes() for file in code_files()}


def test_fields_that_only_we_know_do_not_reach_llama(tmp_path):
    tiny_model("llm").save_pretrained(tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    fields = read_config(tmp_path / "llama")
    assert {"topk_method", "first_k_dense_replace", "mtp_loss_weight", "auto_map"} & fields.keys() == set()
    assert (fields["model_type"], fields["architectures"]) == ("llama", ["LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2', expected 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"expected \['LlamaForCausalLM'\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq.*, expected None"),
        ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\..*weight, which .*config\.json demands"),
        ({"num_hidden_layers": 2}, r"holds model\.layers\.2\..*, which .*config\.json has no place for"),
        ({"intermediate_size": 64}, r"mlp\.down_proj\.weight is \(64, 120\), by .* \(64, 64\)"),
        ({"attention_bias": True}, r"lacks .*bias"),
        (
            {"rope_scaling": {**ROPES["yarn"], "mscale_all_dim": 1.0}},
            "mscale_all_dim is 1.0, which a plain Llama does not have",
        ),
        ({"n_routed_experts": 4}, "n_routed_experts"),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path, change, message):
    shutil.copytree(LLM, tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text(json.dumps(read_config(LLM) | change))
    with pytest.raises(ValueError, match=message):
        from_llama(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["moe16b", "v3"])
def test_models_with_experts_or_latent_attention_do_not_become_llamas(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "ours")
    message = "n_routed_experts is" if family == "moe16b" else "model_type is 'deepseek_v3', expected 'deepseek'"
    with pytest.raises(ValueError, match=message):
        to_llama(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_that_llama_does_not_have_is_named(tmp_path):
    shutil.copytree(LLM, tmp_path / "llama")
    tensors = load_file(LLM / "model.safetensors") | {"score.weight": torch.ones(2, 64)}
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds score\.weight"):
        from_llama(tmp_path / "llama", tmp_path / "out")
