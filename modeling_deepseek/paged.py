"""Continuous batching (`generate_batch`, `transformers serve --continuous-batching`) of MLA models over a paged pool of latents.

transformers' pool keeps two rows per token and layer, keys and values, each of `num_key_value_heads * head_dim` elements. The
latent and the rope key of a token lie in these two rows one behind the other, so that nothing is kept twice: together
`kv_lora_rank + qk_rope_head_dim` elements, and one more where that is odd.
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention import DeepseekLatentAttention, eager_attention
from .masking import dense_mask

logger = logging.get_logger(__name__)

LENGTH_SLACK, SPARE_TOKENS = 1.25, 32  # requests are read side by side while the longest has at most 1.25 n + 32 tokens


@dataclass
class Rows:
    """`b` requests that attend side by side: S new tokens each, in front of up to T cached ones, the new ones included.

    tokens `[b, S]`: where the new tokens lie in the packed batch.
    slots `[b, T]`: where their context lies among the slots of all requests; behind its end a request repeats its last one.
    mask: boolean `[b or 1, 1, S, T]`, or `None` where plain causal attention is meant.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


class PagedLatents:
    """What one forward of continuous batching has for an attention layer: the pool, and whose tokens are whose.

    Takes the arguments of transformers' paged attention (`PagedAttentionArgs`); the packed batch has Q tokens in one row.

    Raises:
        ValueError: for a pool that was made for another geometry, and for a batch that has block tables only.
    """

    def __init__(
        self, config: PreTrainedConfig, cache, read_index, write_index, cu_seq_lens_q, cu_seq_lens_k, **kwargs
    ):
        made, wanted = (cache.config.num_key_value_heads, cache.config.head_dim), (1, row_width(config))
        if made != wanted:
            raise ValueError(
                f"The pool has rows of {made} (heads, elements), and the latents of this model want {wanted}: let "
                "model.init_continuous_batching make it."
            )
        if kwargs.get("block_table") is not None:
            raise ValueError(
                "Latents are read by index, and this batch has block tables: set max_blocks_per_request=0."
            )
        self.cache = cache
        by_type = isinstance(cu_seq_lens_k, dict)
        ends_q, ends_k = (
            ends.tolist() for ends in (cu_seq_lens_q, cu_seq_lens_k["full_attention"] if by_type else cu_seq_lens_k)
        )
        self.rows = group_requests(ends_q, ends_k, cu_seq_lens_q.device)
        self.slots = torch.cat([rows.slots.flatten() for rows in self.rows])
        self.reads = read_index[0].numel() > 0  # otherwise all tokens are new
        read_index = [read_index[0][self.slots]] if self.reads else read_index
        self.indices = {"read_index": read_index, "write_index": write_index}
        if "kwargs" in inspect.signature(cache.update).parameters:  # transformers 5.17 takes the indices by name
            self.indices = {"kwargs": {**kwargs, **self.indices, "cu_seq_lens_k": cu_seq_lens_k}}

    @torch.compiler.disable  # as transformers' own: it does not know that the pool is written in place
    def attend(self, module: DeepseekLatentAttention, q_latent, latent, k_rope, cos, sin) -> torch.Tensor:
        """q_latent `[1, Q, *]`, latent `[1, 1, Q, c]`, k_rope `[1, 1, Q, r]` and cos, sin `[1, 1, Q, r]` -> `[1, Q, H * v]`."""
        latents, k_ropes = self.update(latent, k_rope, module.layer_idx)
        output, start = None, 0
        for rows in self.rows:
            batch, keys = rows.slots.shape
            read = slice(start, start + batch * keys)
            start = read.stop
            attended = attend_rows(
                module,
                q_latent[0][rows.tokens],
                latents[read].view(batch, 1, keys, -1),
                k_ropes[read].view(batch, 1, keys, -1),
                cos[0, 0][rows.tokens].unsqueeze(1),
                sin[0, 0][rows.tokens].unsqueeze(1),
                rows.mask,
            )
            if output is None:  # what stands for no request, as the padding of compiled batches, stays 0
                output = attended.new_zeros(q_latent.shape[1], attended.shape[-1])
            output[rows.tokens.flatten()] = attended.flatten(0, 1)
        return output.unsqueeze(0)

    def update(self, latent: torch.Tensor, k_rope: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new tokens into the pool and reads `slots`: latents `[slots, c]` and rope keys `[slots, r]`."""
        rank, width = latent.shape[-1], latent.shape[-1] + k_rope.shape[-1]
        packed = torch.cat((latent, k_rope.to(latent.dtype)), dim=-1)
        if width % 2:
            packed = nn.functional.pad(packed, (0, 1))
        halves = packed.to(self.cache.dtype).chunk(2, dim=-1)
        indices = {name: copy.copy(value) for name, value in self.indices.items()}  # "kwargs" are changed in place
        read = self.cache.update(key_states=halves[0], value_states=halves[1], layer_idx=layer_idx, **indices)
        if self.reads:
            packed = torch.cat([half.reshape(-1, half.shape[-1]) for half in read], dim=-1).to(packed.dtype)
        else:
            packed = packed[0, 0][self.slots]
        return packed[:, :rank], packed[:, rank:width]


def group_requests(ends_q: list[int], ends_k: list[int], device: torch.device) -> list[Rows]:
    """Where the requests with ends `ends_q`, `ends_k` (0 first) attend: those of one new token and about equal length together."""
    bounds = list(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False))
    steps = sorted((k1 - k0, q0, k0) for q0, q1, k0, k1 in bounds if q1 - q0 == 1)
    groups = []
    for step in steps:
        if not groups or step[0] > LENGTH_SLACK * groups[-1][0][0] + SPARE_TOKENS:
            groups.append([])
        groups[-1].append(step)
    rows = [decode_rows(group, device) for group in groups]
    return rows + [chunk_rows(*bound, device) for bound in bounds if bound[1] - bound[0] > 1]


def decode_rows(group: list[tuple[int, int, int]], device: torch.device) -> Rows:
    """One new token each; `group` has (cached tokens, place of the new one, first slot), in ascending order."""
    lengths, tokens, starts = torch.tensor(group, device=device).view(-1, 3, 1).unbind(1)
    offsets = torch.arange(group[-1][0], device=device)
    slots = starts + torch.minimum(offsets, lengths - 1)
    mask = None if group[0][0] == group[-1][0] else (offsets < lengths)[:, None, None]
    return Rows(tokens, slots, mask)


def chunk_rows(q0: int, q1: int, k0: int, k1: int, device: torch.device) -> Rows:
    """The tokens `q0` to `q1` of one prompt, which are the last of the slots `k0` to `k1`."""
    tokens, slots = torch.arange(q0, q1, device=device)[None], torch.arange(k0, k1, device=device)[None]
    whole = q1 - q0 == k1 - k0
    return Rows(tokens, slots, None if whole else dense_mask(None, 1, q1 - q0, k1 - k0, device))


def attend_rows(module: DeepseekLatentAttention, q_latent, latent, k_rope, cos, sin, mask) -> torch.Tensor:
    """Attention of `[b, S]` tokens over their own contexts, absorbed or expanded as outside of a pool -> `[b, S, H * v]`."""
    (batch, queries), keys = q_latent.shape[:2], latent.shape[2]
    if module.use_absorbed(queries, keys, True):
        return module.attend_absorbed(*module.queries(q_latent, cos, sin), latent, k_rope, mask)[0]
    if module.blocks_queries(q_latent, mask):
        return module.attend_in_blocks(q_latent, latent, k_rope, cos, sin, mask)
    interface = eager_attention
    if "eager" in (module.config._attn_implementation or "eager"):
        mask = dense_mask(mask, batch, queries, keys, latent.device)
    else:
        interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _ = interface(
        module, *module.expand_all(q_latent, latent, k_rope, cos, sin, mask is not None), mask, scaling=module.scaling
    )
    return output[..., : module.v_head_dim].flatten(2)


def row_width(config: PreTrainedConfig) -> int:
    """Elements of each of a token's two rows in the pool."""
    return -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)


def pool_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` as the pool and its batches are to see it: the geometry of the rows, and no mask over all requests at once."""
    seen = copy.copy(config)
    seen.num_key_value_heads, seen.head_dim = 1, row_width(config)
    seen._attn_implementation = "flash_attention_2"  # it stands for: lengths are enough
    return seen


class ModelOverPool:
    """The model that a manager of continuous batching has: the given one in all but `config`, which describes the pool."""

    def __init__(self, model: nn.Module):
        vars(self).update(_model=model, config=pool_config(model.config))

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


class ContinuousBatchingMixin:
    """transformers' continuous batching for a causal model, in front of its own mixin."""

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, *args, **kwargs):
        """As [`~transformers.generation.ContinuousMixin.init_continuous_batching`]; MLA models get a pool of latents.

        Raises:
            ValueError: for what continuous batching cannot do (see [`check_batching`]).
        """
        generation = generation_config or self.generation_config
        batching = continuous_batching_config or getattr(generation, "continuous_batching_config", None)
        batching = ContinuousBatchingConfig() if batching is None else copy.copy(batching)
        check_batching(self.config, generation, batching)
        latent = hasattr(self.config, "kv_lora_rank")
        if latent:
            batching.auto_switch_to_flash = False  # transformers 5.17 does not ask
        manager = super().init_continuous_batching(generation, batching, *args, **kwargs)
        if latent and not isinstance(manager.model, ModelOverPool):
            manager.model = ModelOverPool(self)
            resolved = manager.continuous_batching_config  # what else is resolved for an attention that needs no mask
            resolved.max_blocks_per_request, resolved.use_cuda_graph = 0, (False, False)
            resolved.use_async_batching = bool(batching.use_async_batching)
            if "flash" in self.config._attn_implementation:
                logger.warning_once(
                    f"Continuous batching of latents runs expanded attention by sdpa, not {self.config._attn_implementation}."
                )
        return manager

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """As [`~transformers.generation.ContinuousMixin.generate_batch`].

        Raises:
            ValueError: for empty prompts, and for arguments that would be passed over in silence.
        """
        known = {"max_new_tokens", *inspect.signature(super().generate_batch).parameters} - {"kwargs"}
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(
                f"generate_batch does not take {', '.join(unknown)}: put what is about generation into generation_config, and use "
                "generate for use_mtp, beams, assistants and caches of your own."
            )
        if any(len(prompt) == 0 for prompt in inputs):
            raise ValueError(
                "generate_batch was given a prompt of no tokens: begin each with at least one, as bos_token_id."
            )
        return super().generate_batch(inputs, *args, **kwargs)


def check_batching(
    config: PreTrainedConfig, generation_config: GenerationConfig, batching_config: ContinuousBatchingConfig
) -> None:
    """Raises `ValueError` for what continuous batching would leave out, or do wrong, in silence."""
    for name, plain in (
        ("use_mtp", (None, False)),
        ("num_beams", (None, 1)),
        ("prompt_lookup_num_tokens", (None,)),
        ("cache_implementation", (None, "dynamic")),  # static, quantized, ...: the pool is the cache
    ):
        value = getattr(generation_config, name, None)
        if value not in plain:
            raise ValueError(f"Continuous batching has no {name}={value!r}: leave it out, or use generate.")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type {rope_type!r} changes with the longest request of a batch, so that none would be what it is alone: use "
            "generate."
        )
    graphs = batching_config.use_cuda_graph
    if hasattr(config, "kv_lora_rank") and (any(graphs) if isinstance(graphs, tuple) else graphs):
        raise ValueError(f"Latents are read request by request, and use_cuda_graph is {graphs}: leave it out.")
