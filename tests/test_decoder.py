"""One residual block: its formula, and which parts a family puts in it."""

import pytest
import torch

from modeling_deepseek.attention import DeepseekLatentAttention, DeepseekMultiHeadAttention
from modeling_deepseek.decoder import DeepseekDecoderLayer
from modeling_deepseek.layers import DeepseekMLP
from modeling_deepseek.moe import DeepseekMoE
from modeling_deepseek.rope import DeepseekRotaryEmbedding
from tiny import FAMILIES, randomize, tiny_config, tiny_model, tiny_tokens

ALL = pytest.mark.parametrize("family", FAMILIES)

# Official checkpoint names of a block, experts fused
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
DENSE = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
MOE = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"} | {
    f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")
}
MHA = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
MLA = {
    f"self_attn.{name}.weight"
    for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
}


def built(family: str, layer_idx: int, **overrides) -> DeepseekDecoderLayer:
    layer = DeepseekDecoderLayer(tiny_config(family, **overrides), layer_idx).eval()
    randomize(layer)
    return layer


def positions(layer: DeepseekDecoderLayer, x: torch.Tensor):
    return DeepseekRotaryEmbedding(layer.self_attn.config)(x, torch.arange(x.shape[1])[None])


@ALL
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_block_adds_attention_and_then_its_mlp_each_behind_a_norm(family, layer_idx):
    layer, x = built(family, layer_idx), torch.randn(2, 5, 48)
    tables, mask = positions(layer, x), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    layer.self_attn.config._attn_implementation = "sdpa"
    middle = x + layer.self_attn(layer.input_layernorm(x), tables, mask)[0]
    expected = middle + layer.mlp(layer.post_attention_layernorm(middle))
    torch.testing.assert_close(layer(x, tables, mask), expected)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llm", DeepseekMultiHeadAttention),
        ("moe16b", DeepseekMultiHeadAttention),
        ("v2", DeepseekLatentAttention),
        ("v3", DeepseekLatentAttention),
    ],
)
def test_v2_and_v3_have_latent_attention_and_the_others_have_heads(family, attention):
    assert type(built(family, 0).self_attn) is attention


@pytest.mark.parametrize("family", ["moe16b", "v2", "v3"])
def test_experts_begin_behind_the_dense_layers_at_their_frequency(family):
    kinds = [type(built(family, index, first_k_dense_replace=2, moe_layer_freq=2).mlp) for index in range(3)]
    assert kinds == [DeepseekMLP, DeepseekMLP, DeepseekMoE]


def test_every_layer_of_the_llm_is_dense():
    assert {type(built("llm", index).mlp) for index in range(2)} == {DeepseekMLP}


@pytest.mark.parametrize(
    ("family", "layer_idx", "names"),
    [
        ("llm", 0, MHA | DENSE),
        ("moe16b", 0, MHA | DENSE),
        ("moe16b", 1, MHA | MOE),
        ("v2", 0, MLA | DENSE),
        ("v2", 1, MLA | MOE),
        ("v3", 1, MLA | MOE | {"mlp.gate.e_score_correction_bias"}),
    ],
)
def test_a_block_has_the_official_names(family, layer_idx, names):
    assert built(family, layer_idx).state_dict().keys() == names | NORMS


def test_a_model_without_query_latent_projects_queries_directly():
    names = built("v2", 0, q_lora_rank=None).state_dict().keys()
    assert "self_attn.q_proj.weight" in names
    assert not {name for name in names if "q_a" in name or "q_b" in name}


@ALL
def test_the_norms_of_a_block_use_the_epsilon_of_the_config(family):
    layer = built(family, 0, rms_norm_eps=0.25)
    assert layer.input_layernorm.variance_epsilon == layer.post_attention_layernorm.variance_epsilon == 0.25


def gradients_and_calls(family: str, checkpointing: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of all parameters, and how often the first attention module ran."""
    model, calls = tiny_model(family).train(), []
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    tokens = tiny_tokens(model.config)
    model(tokens, labels=tokens).loss.backward()
    return [parameter.grad for parameter in model.parameters()], len(calls)


@ALL
def test_checkpointed_blocks_run_again_for_the_same_gradients(family):
    expected, once = gradients_and_calls(family, checkpointing=False)
    result, twice = gradients_and_calls(family, checkpointing=True)
    assert (once, twice) == (1, 2)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
