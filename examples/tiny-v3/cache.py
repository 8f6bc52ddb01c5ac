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
        self._lengths = [0, 0]  # alike but between two assignments
        self._in_graph = False  # autograd may hold the buffers
        self.dims = (kv_lora_rank, qk_rope_head_dim)
        super().__init__(**kwargs)

    def _view(self, which: int) -> torch.Tensor | None:
        buffer = self._buffers[which]
        return None if buffer is None else buffer.narrow(-2, 0, self._lengths[which])

    def _replace(self, which: int, value: torch.Tensor | None) -> None:
        self._buffers[which] = value
        self._lengths[which] = 0 if value is None else value.shape[-2]

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
        self._lengths, self._in_graph = [0, 0], False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[B, 1, S, kv_lora_rank]` and `[B, 1, S, qk_rope_head_dim]`; returns all tokens held, as views.

        Raises:
            ValueError: when the widths or the batch size are not those of the tokens already held.
        """
        if not self.is_initialized or (self.get_seq_length() == 0 and self._differs(key_states)):
            self.lazy_initialization(key_states, value_states)
        for held, new in zip(self._buffers, (key_states, value_states), strict=True):
            if held.shape[:2] + held.shape[3:] != new.shape[:2] + new.shape[3:]:
                raise ValueError(
                    f"The cache holds latents of shape {tuple(held.shape[:2])} + (tokens, {held.shape[-1]}), got "
                    f"{tuple(new.shape)}: pass a cache of this model and this batch size, or a new one."
                )
        if torch.is_grad_enabled():
            self.keys, self.values = (
                torch.cat((view, new), dim=-2)
                for view, new in zip((self.keys, self.values), (key_states, value_states), strict=True)
            )
            self._in_graph = True
        else:
            self._append(key_states, value_states)
        return self.keys, self.values

    def _append(self, *states: torch.Tensor) -> None:
        """Writes behind the tokens held; into larger buffers when these are full, or not ours alone to write to."""
        end = self.get_seq_length() + states[0].shape[-2]
        locked = self._in_graph
        if not torch.compiler.is_compiling():  # which cannot trace the question
            locked |= self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if locked or end > self._buffers[0].shape[-2]:
            self._grow(end)
        for which, new in enumerate(states):
            self._buffers[which].narrow(-2, self._lengths[which], new.shape[-2]).copy_(new)
            self._lengths[which] = end

    def _differs(self, states: torch.Tensor) -> bool:
        held = self._buffers[0]
        return held.shape[0] != states.shape[0] or held.dtype != states.dtype or held.device != states.device

    def _grow(self, needed: int) -> None:
        capacity = max(needed + MIN_SPARE, int(self._buffers[0].shape[-2] * GROWTH))
        for which, buffer in enumerate(self._buffers):
            larger = buffer.new_empty((*buffer.shape[:-2], capacity, buffer.shape[-1]))
            larger.narrow(-2, 0, self._lengths[which]).copy_(self._view(which))
            self._buffers[which] = larger
        self._in_graph = False

    def get_seq_length(self) -> int:
        return self._lengths[0]

    def reset(self) -> None:
        self._lengths = [0, 0]

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` tokens; a positive number is the length to keep, as in earlier transformers."""
        length = self.get_seq_length()
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        self._lengths = [kept, kept]

    def _gather_rows(self, rows: torch.Tensor) -> None:
        for which, buffer in enumerate(self._buffers):
            chosen = self._view(which)[rows.to(buffer.device)]
            gathered = buffer.new_empty((chosen.shape[0], *buffer.shape[1:]))
            gathered.narrow(-2, 0, self._lengths[which]).copy_(chosen)
            self._buffers[which] = gathered

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(torch.as_tensor(indices))


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

    def check_layers(self, expected: int) -> None:
        """Raises `ValueError` unless the cache has `expected` layers, or makes them as they come."""
        if self.layer_class_to_replicate is None and len(self.layers) != expected:
            raise ValueError(
                f"This LatentCache was built for {len(self.layers)} layers, and the model has {expected}: build the cache with the "
                "config of the model that uses it."
            )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Appends to layer `layer_idx`; see [`LatentLayer.update`].

        Raises:
            ValueError: for a layer that the config of this cache does not have.
        """
        if self.layer_class_to_replicate is None and layer_idx >= len(self.layers):
            raise ValueError(
                f"This LatentCache was built for {len(self.layers)} layers, and the model stores into layer {layer_idx}: build the "
                "cache with the config of the model that uses it."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held take: `B * T * (kv_lora_rank + qk_rope_head_dim) * itemsize` per layer."""
        return sum(layer.nbytes for layer in self.layers)

    def early_initialization(self, *args, **kwargs) -> None:
        """Nothing to allocate ahead: the layers take shape, dtype and device from the first tokens."""
