"""The latent cache of MLA models: the normed latent and the rotated rope key of every token, and nothing else."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

GROWTH = 1.25  # factor by which a full buffer grows
MIN_SPARE = 64  # tokens of room that every new buffer leaves for the steps to come


class LatentLayer(DynamicLayer):
    """One layer's latents in two buffers that are appended to in place and grow by a factor.

    `.keys` `[B, 1, T, kv_lora_rank]` (latents after their norm) and `.values` `[B, 1, T, qk_rope_head_dim]` (rope keys after
    rotation) are views of the tokens held so far; assigning to them replaces the contents.
    """

    def __init__(self, kv_lora_rank: int | None = None, qk_rope_head_dim: int | None = None, **kwargs):
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._length = 0
        self.dims = (kv_lora_rank, qk_rope_head_dim)
        super().__init__(**kwargs)

    def _view(self, which: int) -> torch.Tensor | None:
        buffer = self._buffers[which]
        return None if buffer is None else buffer.narrow(-2, 0, min(self._length, buffer.shape[-2]))

    def _replace(self, which: int, value: torch.Tensor | None) -> None:
        self._buffers[which] = value
        self._length = 0 if value is None else value.shape[-2]

    keys = property(lambda self: self._view(0), lambda self, value: self._replace(0, value))
    values = property(lambda self: self._view(1), lambda self, value: self._replace(1, value))

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held; the spare room behind them is not counted."""
        return sum(view.numel() * view.element_size() for view in (self.keys, self.values) if view is not None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, expected, states in zip(("latent", "rope key"), self.dims, (key_states, value_states), strict=True):
            if states.shape[1] != 1 or expected not in (None, states.shape[-1]):
                raise ValueError(
                    f"This LatentCache was built for one {name} of width {expected} per token, and the model stores "
                    f"{states.shape[1]} of width {states.shape[-1]}: build the cache with the config of the model that uses it."
                )
        self._buffers = [
            states.new_empty((*states.shape[:-2], 0, states.shape[-1])) for states in (key_states, value_states)
        ]
        self._length = 0
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[B, 1, S, kv_lora_rank]` and `[B, 1, S, qk_rope_head_dim]`; returns all tokens held, as views.

        Raises:
            ValueError: when the widths or the batch size are not those of the tokens already held.
        """
        if not self.is_initialized or (self._length == 0 and self._differs(key_states)):
            self.lazy_initialization(key_states, value_states)
        for held, new in zip(self._buffers, (key_states, value_states), strict=True):
            if held.shape[:2] + held.shape[3:] != new.shape[:2] + new.shape[3:]:
                raise ValueError(
                    f"The cache holds latents of shape {tuple(held.shape[:2])} + (tokens, {held.shape[-1]}), got "
                    f"{tuple(new.shape)}: pass a cache of this model and this batch size, or a new one."
                )
        end = self._length + key_states.shape[-2]
        if torch.is_grad_enabled() and (key_states.requires_grad or self._buffers[0].requires_grad):
            # autograd keeps the tensors that attention read: they must not be written to again
            appended = [
                torch.cat((view, new), dim=-2)
                for view, new in zip((self.keys, self.values), (key_states, value_states), strict=True)
            ]
            self._buffers = appended
        else:
            if end > self._buffers[0].shape[-2]:
                self._grow(end)
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.narrow(-2, self._length, new.shape[-2]).copy_(new)
        self._length = end
        return self.keys, self.values

    def _differs(self, states: torch.Tensor) -> bool:
        held = self._buffers[0]
        return held.shape[0] != states.shape[0] or held.dtype != states.dtype or held.device != states.device

    def _grow(self, needed: int) -> None:
        capacity = max(needed + MIN_SPARE, int(self._buffers[0].shape[-2] * GROWTH))
        for which, buffer in enumerate(self._buffers):
            larger = buffer.new_empty((*buffer.shape[:-2], capacity, buffer.shape[-1]))
            larger.narrow(-2, 0, self._length).copy_(buffer.narrow(-2, 0, self._length))
            self._buffers[which] = larger

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        self._length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` tokens; a positive number is the length to keep, as in earlier transformers."""
        if tokens_to_remove > 0:
            self._length = min(self._length, tokens_to_remove)
        else:
            self._length = max(0, self._length + tokens_to_remove)

    def _gather_rows(self, rows: torch.Tensor) -> None:
        for which, view in enumerate((self.keys, self.values)):
            buffer = self._buffers[which]
            gathered = buffer.new_empty((rows.shape[0], *buffer.shape[1:]))
            gathered.narrow(-2, 0, self._length).copy_(view.index_select(0, rows.to(view.device)))
            self._buffers[which] = gathered

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._length > 0:
            self._gather_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._length > 0:
            self._gather_rows(torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._length > 0:
            rows = torch.as_tensor(indices)
            self._gather_rows(rows.nonzero().flatten() if rows.dtype == torch.bool else rows)


class LatentCache(DynamicCache):
    """The default cache of MLA models: `kv_lora_rank + qk_rope_head_dim` elements per token and layer.

    Args:
        config: of the model that will use the cache; its widths are checked when tokens arrive. Without one the layers take
            the widths of the first tokens that they see.
        offloading (`bool`): keep only the layer at work on the GPU, the others on the CPU.

    Raises:
        ValueError: for a config without `kv_lora_rank` (DeepSeek-LLM and MoE-16B cache full keys and values).
    """

    def __init__(self, config: PreTrainedConfig | None = None, offloading: bool = False, **kwargs):
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=LatentLayer, offloading=offloading, **kwargs)
            return
        config = config.get_text_config(decoder=True)
        if not hasattr(config, "kv_lora_rank"):
            raise ValueError(
                f"LatentCache is for models with multi-head latent attention, and {type(config).__name__} (model_type "
                f"{config.model_type!r}) has no kv_lora_rank: use transformers' DynamicCache."
            )
        dims = config.kv_lora_rank, config.qk_rope_head_dim
        layers = [LatentLayer(*dims) for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers, offloading=offloading, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held take: `B * T * (kv_lora_rank + qk_rope_head_dim) * itemsize` per layer."""
        return sum(layer.nbytes for layer in self.layers)

    def early_initialization(self, *args, **kwargs) -> None:
        """Nothing to allocate ahead: the layers take shape, dtype and device from the first tokens."""
