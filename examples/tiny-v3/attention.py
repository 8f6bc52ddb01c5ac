"""Attention: multi-head latent attention (V2, V3) in its expanded and absorbed forms, and MHA / GQA (LLM, MoE-16B)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .dtypes import cast, has_fast_gemm
from .fp8 import FP8Linear
from .layers import DeepseekRMSNorm, is_bare, linear
from .masking import dense_mask
from .ops import attend_latents, attend_quantized_latents, cpu_absorbed_rate, gpu_wants_padded_values
from .plain_attention import blocked_causal_attention
from .quantized import as_tensor, is_quantized
from .recompute import recomputed
from .rope import attention_softmax_scale, rotate_halves, rotate_interleaved

ABSORBED_MAX_QUERIES = 128  # on a GPU, not measured there
# measured on a CPU: from here on PyTorch's attention kernel is faster than what it has for other widths, padding included
PADDED_MIN_QUERIES = 1024
BLOCKED_MAX_QUERIES = 4096  # measured: beyond, it is as fast as a prefill by blocks, and needs less memory


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over `[B, H, S, D]` queries; returns `[B, S, H, v]` and the weights `[B, H, S, T]`."""
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probs = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        query.dtype
    )
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2).contiguous(), probs


class DeepseekAttention(nn.Module):
    """What both kinds share: the config, the softmax scale and the call of transformers' attention interface."""

    recompute: Callable | None = None  # in training, the checkpointing function of what is computed again

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query` `[B, H, S, D]`, `key` `[B, KV, T, D]`, `value` `[B, KV, T, v+]` -> `[B, S, H * v]` and the weights, if any."""
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim].flatten(2), weights


class DeepseekMultiHeadAttention(DeepseekAttention):
    """MHA and GQA with half-split RoPE, as in Llama."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = self.v_head_dim = config.head_dim
        self.scaling = attention_softmax_scale(config.rope_parameters, self.head_dim)
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            linear(projection, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = for_all_heads(position_embeddings)
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return linear(self.o_proj, output), weights


class DeepseekLatentAttention(DeepseekAttention):
    """Multi-head latent attention (DeepSeek-V2 paper, section 2.1): the cache holds one latent and one rope key per token."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling = attention_softmax_scale(config.rope_parameters, self.qk_head_dim)
        self.rotate = rotate_interleaved if config.rope_interleave else rotate_halves

        heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        paged: object | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        by = self.recompute if self.training else None
        cos, sin = for_all_heads(position_embeddings)
        q_latent = linear(self.q_proj if self.q_lora_rank is None else self.q_a_proj, hidden_states)
        compressed = linear(self.kv_a_proj_with_mqa, hidden_states).unsqueeze(1)
        latent, k_rope = compressed.split_with_sizes((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent) if by is None else by(self.kv_a_layernorm, latent)
        k_rope = self.rotate(k_rope, cos, sin)
        if paged is not None:  # continuous batching
            return linear(self.o_proj, paged.attend(self, q_latent, latent, k_rope, cos, sin)), None
        if past_key_values is not None:
            as_held = {"dequantize": False} if getattr(past_key_values, "quantized", False) else {}
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx, **as_held)
        if self.use_absorbed(hidden_states.shape[1], latent.shape[2], past_key_values is not None):
            output, weights = self.attend_absorbed(*self.queries(q_latent, cos, sin), latent, k_rope, attention_mask)
        else:
            latent, k_rope = as_tensor(latent), as_tensor(k_rope)
            if self.blocks_queries(hidden_states, attention_mask, **kwargs):
                output = self.attend_in_blocks(q_latent, latent, k_rope, cos, sin, attention_mask)
                return linear(self.o_proj, output), None
            inputs = (q_latent, latent, k_rope, cos, sin, attention_mask is not None)
            with recomputed(by, self.expand_all, *inputs) as (query, key, value):
                output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return linear(self.o_proj, output), weights

    def queries(
        self, q_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `q_a_proj` (where there is none: `q_proj`) gave -> q_nope `[B, H, S, n]`, q_rope `[B, H, S, r]`."""
        query = q_latent if self.q_lora_rank is None else linear(self.q_b_proj, self.q_a_layernorm(q_latent))
        query = query.view(*query.shape[:-1], -1, self.qk_head_dim).transpose(1, 2)
        q_nope, q_rope = query.split_with_sizes((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        return q_nope, self.rotate(q_rope, cos, sin)

    def attend_in_blocks(self, q_latent, latent, k_rope, cos, sin, mask: torch.Tensor | None) -> torch.Tensor:
        """A prefill, expanded, by blocks of queries -> `[B, S, H * v]`; where [`blocks_queries`] says so."""
        query = torch.cat(self.queries(q_latent, cos, sin), dim=-1)
        key, value = self.expand(latent, k_rope, wide=not has_fast_gemm("cpu", query.dtype))
        return blocked_causal_attention(query, key, value, self.scaling, mask).flatten(2)

    def expand_all(
        self, q_latent, latent, k_rope, cos, sin, masked: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, H, S, n + r]`, keys and values as `expand` gives them: the up-projections and what is around them."""
        query = torch.cat(self.queries(q_latent, cos, sin), dim=-1)
        key, value = self.expand(latent, k_rope)
        if self.pads_values(query, key, masked):
            value = nn.functional.pad(value, (0, self.qk_head_dim - self.v_head_dim))
        return query, key, value

    def pads_values(self, query: torch.Tensor, key: torch.Tensor, masked: bool) -> bool:
        """Whether values get zeros up to the width of the keys, as PyTorch's kernels that keep no weights want them.

        On a GPU that is flash attention, which takes neither masks nor a causal rectangle.
        """
        if self.v_head_dim >= self.qk_head_dim or self.config._attn_implementation != "sdpa":
            return False
        dropout = self.attention_dropout if self.training else 0.0
        if query.device.type == "cuda":
            widths = (self.qk_head_dim, self.v_head_dim)
            fits = not masked and query.shape[2] == key.shape[2]
            return fits and gpu_wants_padded_values(query.device, query.dtype, *widths, query.requires_grad, dropout)
        return (
            query.device.type == "cpu"
            and has_fast_gemm("cpu", query.dtype)
            and not dropout
            and (query.shape[2] >= PADDED_MIN_QUERIES or (self.training and self.recompute is not None))
        )

    def blocks_queries(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, is_causal: bool = True, **kwargs
    ) -> bool:
        """Whether a prefill of `hidden_states` `[B, S, d]` goes by blocks: on CPUs, where PyTorch's kernel is slower."""
        return (
            hidden_states.device.type == "cpu"
            and hidden_states.shape[1] > 1
            and self.is_causal
            and is_causal is not False
            and kwargs.get("position_bias") is None
            and not torch.is_grad_enabled()
            and not (self.training and self.attention_dropout)
            and not torch.compiler.is_compiling()
            and (hidden_states.shape[1] <= BLOCKED_MAX_QUERIES or not has_fast_gemm("cpu", hidden_states.dtype))
            and self.config._attn_implementation == "sdpa"
            and (mask is None or (mask.ndim == 4 and mask.dtype == torch.bool))
        )

    def use_absorbed(self, queries: int, keys: int, has_cache: bool) -> bool:
        """Whether `queries` new tokens against `keys` cached ones (the new ones included) run in latent space.

        Counts multiply-adds per head: a query-key pair costs `2c + r` absorbed and `n + r + v` expanded; absorbing costs
        `c (n + v)` per new token, expanding the same per cached token. A `kv_b_proj` that is not a plain weight costs as much
        to read as `c` tokens to expand.
        """
        kv_b_proj = self.kv_b_proj
        if getattr(kv_b_proj, "_forward_pre_hooks_with_kwargs", None):
            return False  # PEFT gives every row of a batch an adapter of its own: there is no one matrix
        mode = self.config.mla_mode
        if mode != "auto":
            return mode == "absorbed"
        if not has_cache or self.training:
            return False
        norm = self.kv_a_layernorm.weight
        on_cpu = norm.device.type == "cpu"
        if queries > ABSORBED_MAX_QUERIES and not on_cpu:
            return False
        rank, rope = self.kv_lora_rank, self.qk_rope_head_dim
        up = rank * (self.qk_nope_head_dim + self.v_head_dim)
        absorbed = queries * (keys * (2 * rank + rope) + up)
        expanded = queries * keys * (self.qk_head_dim + self.v_head_dim) + keys * up
        if on_cpu and absorbed >= expanded:
            heads = self.config.num_attention_heads
            sizes = (heads * self.qk_nope_head_dim * rank, keys, heads * (self.qk_head_dim + self.v_head_dim))
            expanded *= cpu_absorbed_rate(norm.dtype, *sizes, self.config._attn_implementation in (None, "eager"))
        return absorbed + rank * up < expanded or (absorbed < expanded and plain_weight(kv_b_proj) is not None)

    def expand(
        self, latent: torch.Tensor, k_rope: torch.Tensor, wide: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent `[B, 1, T, c]`, k_rope `[B, 1, T, r]` -> keys `[B, H, T, n + r]`, values `[B, H, T, v]`; `wide`: in fp32."""
        if wide and plain_weight(self.kv_b_proj) is not None:
            latent = latent.float()
            expanded = nn.functional.linear(latent.squeeze(1), self.kv_b_weight(latent)[0])
        else:
            expanded = self.kv_b_proj(latent.squeeze(1))
        expanded = expanded.unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope, value = expanded.transpose(1, 2).split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        return torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1).to(k_nope.dtype)), dim=-1), value

    def attend_absorbed(
        self, q_nope, q_rope, latent, k_rope, attention_mask
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over the latents themselves -> `[B, S, H * v]`, and the weights `[B, H, S, T]` where "eager" returns them."""
        weight, bias = self.kv_b_weight(latent)
        w_uk, w_uv = self.per_head(weight).split_with_sizes((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        batch, queries, keys = q_nope.shape[0], q_nope.shape[2], latent.shape[2]
        implementation = self.config._attn_implementation
        eager = implementation in (None, "eager")
        mask = dense_mask(attention_mask, batch, queries, keys, latent.device, implementation == "sdpa")
        dropout = self.attention_dropout if self.training else 0.0
        plain = eager or dropout or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_quantized(latent) and not plain:
            states = (q_nope, q_rope, latent, k_rope)
            output, probs = attend_quantized_latents(*states, w_uk, w_uv, self.scaling, mask), None
        else:
            output, probs = attend_latents(
                q_nope,
                q_rope,
                cast(as_tensor(latent).squeeze(1), q_nope.dtype),
                cast(as_tensor(k_rope).squeeze(1), q_rope.dtype),
                w_uk,
                w_uv,
                self.scaling,
                mask=mask,
                dropout=dropout,
                weights=eager,
            )
        if bias is not None:
            # the keys' part shifts all scores of a query alike, the values' part meets weights that sum to 1
            output = output + self.per_head(bias)[:, None, self.qk_nope_head_dim :]
        return output.transpose(1, 2).flatten(2), probs if eager else None

    def per_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of `kv_b_proj` `[H * (n + v), ...]` -> `[H, n + v, ...]`."""
        return rows.view(-1, self.qk_nope_head_dim + self.v_head_dim, *rows.shape[1:])

    def kv_b_weight(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Matrix `[H * (n + v), c]` and bias that `kv_b_proj` applies: its weight, or what it answers to unit vectors and 0."""
        kv_b_proj, dtype = self.kv_b_proj, like.dtype
        weight = plain_weight(kv_b_proj)
        if weight is not None and weight.device != like.device:
            weight = None
        if weight is not None and type(kv_b_proj) is FP8Linear:
            return kv_b_proj.dequantized_weight(dtype), None
        if weight is not None:
            return cast(weight, dtype), None
        units = torch.eye(self.kv_lora_rank + 1, self.kv_lora_rank, dtype=like.dtype, device=like.device)
        *rows, bias = kv_b_proj(units.unsqueeze(0)).squeeze(0)
        return (torch.stack(rows) - bias).transpose(0, 1), bias


def for_all_heads(tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[B, S, r]`, or as the model hands them to all of its layers, -> `[B, 1, S, r]`."""
    cos, sin = tables
    return (cos, sin) if cos.ndim == 4 else (cos.unsqueeze(1), sin.unsqueeze(1))


def plain_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight of a linear layer that is nothing but it (and its scales): no adapter, sharding, offloading or hook."""
    if type(module) not in (nn.Linear, FP8Linear) or not is_bare(module):
        return None
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.device.type != "meta"
    return weight if plain else None
