"""Rotary positions: YaRN frequencies, both of its mscales, and the rotation in fp32."""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`: sqrt(t) of the DeepSeek-V2 paper, section 3.1.4 (its 0.0707 is `mscale` 0.707)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_softmax_scale(rope_parameters: dict, head_dim: int) -> float:
    """`head_dim^-0.5`, times `yarn_mscale(factor, mscale_all_dim)^2` for YaRN models that set `mscale_all_dim`."""
    scale = head_dim**-0.5
    if rope_parameters.get("rope_type", "default") != "default" and rope_parameters.get("mscale_all_dim"):
        scale *= yarn_mscale(rope_parameters["factor"], rope_parameters["mscale_all_dim"]) ** 2
    return scale


def yarn_attention_factor(rope_parameters: dict) -> float:
    """What multiplies cos and sin: `mscale(mscale) / mscale(mscale_all_dim)`, 1 in every release seen.

    As in DeepSeek's code a missing `mscale` counts as 1 and a missing `mscale_all_dim` as 0.
    """
    if rope_parameters.get("attention_factor") is not None:
        return rope_parameters["attention_factor"]
    factor, mscale = rope_parameters["factor"], rope_parameters.get("mscale")
    return yarn_mscale(factor, 1.0 if mscale is None else mscale) / yarn_mscale(
        factor, rope_parameters.get("mscale_all_dim") or 0.0
    )


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every pair, `[..., D / 2]`, spread to what meets every element, `[..., D]`: sin negative for the first."""
    if interleaved:
        return tuple(torch.stack(pair, dim=-1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of `x` `[..., D]` by [`rotation_tables`] `[..., D]`, in fp32; dtype of `x`."""
    wide = x if x.dtype == cos.dtype else x.to(torch.promote_types(x.dtype, torch.float32))
    swapped = wide.view(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).flatten(-2)
    rotated = torch.addcmul(wide * cos, swapped, sin)
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + D / 2) of `x` `[..., D]` by [`rotation_tables`] `[..., D]`, in fp32; dtype of `x`."""
    wide = x if x.dtype == cos.dtype else x.to(torch.promote_types(x.dtype, torch.float32))
    rotated = torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin)
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)


class DeepseekRotaryEmbedding(nn.Module):
    """[`rotation_tables`] of `position * inv_freq`, each `[B, S, rotated_dim]` in fp32, once per forward for all layers."""

    inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init_fn = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = self.rope_init_fn(config, device=None)
        if self.rope_type == "yarn":
            self.attention_scaling = yarn_attention_factor(config.rope_parameters)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the model, and stays in fp32 when this is cast: rounded frequencies are off by radians at far positions."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, device=None, **_) -> tuple[torch.Tensor, float]:
        """`theta^(-2i / head_dim)` `[head_dim / 2]` and the factor 1.0."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = (table * self.attention_scaling for table in (angles.cos(), angles.sin()))
        return rotation_tables(cos, sin, getattr(self.config, "rope_interleave", False))
