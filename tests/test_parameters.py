"""The released sizes, counted on models without weights: parameters, stored tensors, cache elements per token."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

import modeling_deepseek
from tiny import tiny_model

_MLA = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=102400)
RELEASES = {
    "LLM-7B": (
        "Deepseek",
        dict(
            hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, intermediate_size=11008, vocab_size=102400
        ),
    ),
    "LLM-67B": (
        "Deepseek",
        dict(
            hidden_size=8192,
            num_hidden_layers=95,
            num_attention_heads=64,
            num_key_value_heads=8,
            intermediate_size=22016,
            vocab_size=102400,
        ),
    ),
    "MoE-16B": (
        "Deepseek",
        dict(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            intermediate_size=10944,
            vocab_size=102400,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
            n_shared_experts=2,
            n_routed_experts=64,
            num_experts_per_tok=6,
        ),
    ),
    "V2-Lite": (
        "DeepseekV2",
        _MLA
        | dict(
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            intermediate_size=10944,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
            n_shared_experts=2,
            n_routed_experts=64,
            num_experts_per_tok=6,
            q_lora_rank=None,
        ),
    ),
    "V2": (
        "DeepseekV2",
        _MLA
        | dict(
            hidden_size=5120,
            num_hidden_layers=60,
            num_attention_heads=128,
            intermediate_size=12288,
            first_k_dense_replace=1,
            moe_intermediate_size=1536,
            n_shared_experts=2,
            n_routed_experts=160,
            num_experts_per_tok=6,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            q_lora_rank=1536,
            routed_scaling_factor=16.0,
        ),
    ),
    "V3": ("DeepseekV3", dict(num_nextn_predict_layers=1)),  # the defaults are V3's shape
}
PARAMETERS = {
    "LLM-7B": 6_910_365_696,
    "LLM-67B": 67_425_001_472,
    "MoE-16B": 16_375_728_128,
    "V2-Lite": 15_706_484_224,
    "V2": 235_741_434_880,
    "V3": 671_026_419_200,  # 58 * 256 router biases among them
}
CACHE_ELEMENTS = {
    "LLM-7B": 245_760,
    "LLM-67B": 194_560,
    "MoE-16B": 114_688,
    "V2-Lite": 15_552,
    "V2": 34_560,
    "V3": 35_136,
}
V3_MTP_UNIQUE, V3_MTP_STORED = 11_610_068_224, 13_463_426_304
V3_STORED, V3_TENSORS = 684_489_845_504, 46_183


@cache
def release(name: str):
    """A release's causal LM on the meta device. Do not modify it."""
    prefix, fields = RELEASES[name]
    with torch.device("meta"):
        return getattr(modeling_deepseek, f"{prefix}ForCausalLM")(
            getattr(modeling_deepseek, f"{prefix}Config")(**fields)
        )


def elements(module: nn.Module) -> int:
    """Parameters, and the router biases, which are buffers."""
    biases = (tensor for name, tensor in module.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(tensor.numel() for tensor in (*module.parameters(), *biases))


@pytest.mark.parametrize("name", RELEASES)
def test_total_parameters(name):
    model = release(name)
    mtp = model.model.layers[model.config.num_hidden_layers :]
    assert elements(model) - elements(mtp) == PARAMETERS[name]


def test_v3_mtp_layer():
    model = release("V3")
    assert elements(model.model.layers[61:]) == V3_MTP_UNIQUE
    copies = elements(model.model.embed_tokens) + elements(model.lm_head)
    assert V3_MTP_UNIQUE + copies == V3_MTP_STORED


def test_v3_checkpoint_as_stored():
    """Split per expert, plus the two copies that the MTP layer has on disk."""
    model = release("V3")
    stored = revert_weight_conversion(model, model.state_dict())
    copies = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert len(stored) + len(copies) == V3_TENSORS
    assert sum(tensor.numel() for tensor in (*stored.values(), *copies)) == V3_STORED


@pytest.mark.parametrize("name", RELEASES)
def test_cache_elements_per_token(name):
    prefix, fields = RELEASES[name]
    with torch.device("meta"):
        model = getattr(modeling_deepseek, f"{prefix}Model")(getattr(modeling_deepseek, f"{prefix}Config")(**fields))
        for layer in model.layers:
            layer.mlp = nn.Identity()  # the cache does not depend on it
        with torch.no_grad():
            layers = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values.layers
    held = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))
    assert held == 7 * CACHE_ELEMENTS[name]


@pytest.mark.parametrize("family", ["moe16b", "v2", "v3"])
def test_forward_on_the_meta_device(family):
    model = tiny_model(family, experts_implementation="batched_mm").to("meta")
    logits = model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits
    assert logits.shape == (2, 5, model.config.vocab_size)
