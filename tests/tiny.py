"""Models of every family that are small enough for a unit test, and large enough for each of their parts to matter.

No two sizes that a model could confuse are equal, norms are not ones and router biases are not zeros.
"""

import torch

import modeling_deepseek

_DENSE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=2560,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    initializer_range=0.2,
)
_MOE = dict(
    num_hidden_layers=3,
    first_k_dense_replace=1,
    moe_intermediate_size=40,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
)
_MLA = dict(
    kv_lora_rank=28,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_scaling=dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=64,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)
FAMILIES = {
    "llm": ("Deepseek", _DENSE | dict(num_key_value_heads=2)),
    "moe16b": ("Deepseek", _DENSE | _MOE),
    "v2": (
        "DeepseekV2",
        _DENSE
        | _MOE
        | _MLA
        | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
    ),
    "v3": ("DeepseekV3", _DENSE | _MOE | _MLA | dict(n_shared_experts=1, n_group=4, topk_group=2)),
}


def tiny_config(family: str, **overrides):
    """The config of a tiny model of `family`: "llm" (dense, GQA), "moe16b" (MHA), "v2" or "v3" (MLA)."""
    prefix, fields = FAMILIES[family]
    return getattr(modeling_deepseek, f"{prefix}Config")(**fields | overrides)


def tiny_model(family: str, head: str = "ForCausalLM", seed: int = 0, **overrides):
    """A tiny fp32 model of `family` with `head` ("Model", ...), in eval mode; equal seeds give equal weights."""
    prefix, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(modeling_deepseek, f"{prefix}{head}")(tiny_config(family, **overrides))
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Gives every parameter of `module` random values (around 1 where it is a vector: a norm) and routers a bias."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(float(parameter.ndim == 1), std, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, std, generator=generator)


def tiny_tokens(config, batch: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (batch, length), generator=generator)
