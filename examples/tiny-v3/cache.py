"""The latent cache of MLA models: the normed latent and the rotated rope key of every token, and nothing else."""

import os
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache_file import check_prefix, read_cache, write_cache
from .quantized import QuantizedStates, as_tensor

GROWTH = 1.25  # factor by which a full buffer grows
MIN_SPARE = 64  # tokens of room that every new buffer leaves for the steps to come
PAGE = 64  # tokens that a buffer has a multiple of, as kernels for paged caches count them


class LatentLayer(DynamicLayer):
    """One layer's latents in two buffers that are appended to in place and grow by a factor.

    `.keys` `[B, 1, T, kv_lora_rank]` (latents after their norm) and `.values` `[B, 1, T, qk_rope_head_dim]` (rope keys after
    rotation) are views of the tokens held so far; assigning to them replaces the contents.
    """

    parts = ("latent", "rope_key")  # what a buffer holds of every token

    def __init__(self, kv_lora_rank: int | None = None, qk_rope_head_dim: int | None = None, **kwargs):
        self._buffers: list[torch.Tensor | None] = [None] * len(self.parts)
        self._lengths = [0] * len(self.parts)  # alike but between two assignments
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

    def _encode(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the buffers hold of these tokens, `[B, 1, S, ...]` each."""
        return key_states, value_states

    @property
    def stored(self) -> list[torch.Tensor]:
        """The tokens held as they lie in memory, `[B, 1, T, ...]` each: who moves tokens moves them here."""
        return [self._view(which) for which, buffer in enumerate(self._buffers) if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held; the spare room behind them is not counted."""
        return sum(view.numel() * view.element_size() for view in self.stored)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = key_states.shape[-1], value_states.shape[-1]
        for name, expected, states in zip(("latent", "rope key"), self.dims, (key_states, value_states), strict=True):
            if states.shape[1] != 1 or expected not in (None, states.shape[-1]):
                raise ValueError(
                    f"This LatentCache was built for one {name} of width {expected} per token, and the model stores "
                    f"{states.shape[1]} of width {states.shape[-1]}: build the cache with the config of the model that uses it."
                )
        encoded = self._encode(key_states[..., :0, :], value_states[..., :0, :])
        self._buffers = [states.new_empty(states.shape) for states in encoded]
        self._lengths, self._in_graph = [0] * len(self.parts), False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[B, 1, S, kv_lora_rank]` and `[B, 1, S, qk_rope_head_dim]`; returns all tokens held, as views.

        Raises:
            ValueError: when the widths or the batch size are not those of the tokens already held.
        """
        self._prepare(key_states, value_states)
        if torch.is_grad_enabled():
            self.keys, self.values = (
                torch.cat((view, new), dim=-2)
                for view, new in zip((self.keys, self.values), (key_states, value_states), strict=True)
            )
            self._in_graph = True
        else:
            self._append(key_states, value_states)
        return self.keys, self.values

    def _prepare(self, *states: torch.Tensor) -> None:
        """Raises `ValueError` unless the states fit those held."""
        if not self.is_initialized or (self.get_seq_length() == 0 and self._differs(states[0])):
            self.lazy_initialization(*states)
        rows = self._buffers[0].shape[0]
        for width, new in zip(self.widths, states, strict=True):
            if (rows, 1, width) != (new.shape[0], new.shape[1], new.shape[3]):
                raise ValueError(
                    f"The cache holds latents of shape {(rows, 1)} + (tokens, {width}), got "
                    f"{tuple(new.shape)}: pass a cache of this model and this batch size, or a new one."
                )

    def _append(self, *states: torch.Tensor) -> None:
        """Writes behind the tokens held; into larger buffers when these are full, or not ours alone to write to."""
        end = self.get_seq_length() + states[0].shape[-2]
        locked = self._in_graph
        if not torch.compiler.is_compiling():  # which cannot trace the question
            locked |= self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if locked or end > min(buffer.shape[-2] for buffer in self._buffers):
            self._grow(end)
        for which, new in enumerate(states):
            self._buffers[which].narrow(-2, self._lengths[which], new.shape[-2]).copy_(new)
            self._lengths[which] = end

    def _differs(self, states: torch.Tensor) -> bool:
        held = self._buffers[0]
        return held.shape[0] != states.shape[0] or self.dtype != states.dtype or held.device != states.device

    def _grow(self, needed: int) -> None:
        rows, _, held, _ = self._buffers[0].shape
        self._move(rows, max(needed + MIN_SPARE, int(held * GROWTH)), lambda tokens: tokens)
        self._in_graph = False

    def _move(self, rows: int, capacity: int, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What `chosen` makes of the tokens held goes to new buffers for `capacity` tokens or some more."""
        capacity += -capacity % PAGE
        both = self._buffers[0].new_empty(rows, 1, capacity, sum(self.widths)) if self._side_by_side() else None
        found = []
        for which, buffer in enumerate(self._buffers):
            if both is None:
                new = buffer.new_empty(rows, 1, capacity, buffer.shape[-1])
            else:
                new = both.narrow(-1, which * self.widths[0], self.widths[which])
            new.narrow(-2, 0, self._lengths[which]).copy_(chosen(self._view(which)))
            found.append(new)
        self._buffers = found  # all or nothing: they belong to the same rows

    def _side_by_side(self) -> bool:
        """Whether the latent and the rope key of a token share a row of memory, as FlashMLA reads them and others may: on GPUs.

        A CPU has its matrix products faster with each on its own.
        """
        first, *others = self._buffers
        return first.is_cuda and len(self.parts) == 2 and others[0].dtype == first.dtype  # under autocast they differ

    def _adopt(self, which: int, states: torch.Tensor, tokens: int) -> None:
        """Takes `[B, 1, tokens, ...]` as the contents of a buffer."""
        empty = self._buffers[which]
        expected = (*empty.shape[:2], tokens, empty.shape[3]), empty.dtype
        if (tuple(states.shape), states.dtype) != expected:
            raise ValueError(
                f"A saved {self.parts[which]} is {tuple(states.shape)} in {states.dtype}, by its file {expected[0]} in "
                f"{expected[1]}: write the file again."
            )
        self._buffers[which], self._lengths[which] = states, tokens

    def get_seq_length(self) -> int:
        return self._lengths[0]

    def offload(self) -> None:
        if self.is_initialized:
            self._buffers = [states.to("cpu", non_blocking=True) for states in self.stored]

    def prefetch(self) -> None:
        if self.is_initialized and self._buffers[0].device != self.device:
            self._buffers = [states.to(self.device, non_blocking=True) for states in self.stored]

    def reset(self) -> None:
        self._lengths = [0] * len(self.parts)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` tokens; a positive number is the length to keep, as in earlier transformers."""
        length = self.get_seq_length()
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        self._lengths = [kept] * len(self.parts)

    def _gather_rows(self, rows: torch.Tensor) -> None:
        first = self._buffers[0]
        rows = torch.arange(first.shape[0], device=first.device)[rows.to(first.device)]
        self._move(len(rows), first.shape[-2], lambda tokens: tokens[rows])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            self._gather_rows(torch.as_tensor(indices))


class QuantizedLatentLayer(LatentLayer):
    """A layer that keeps its latents, and with 6 bits its rope keys, as [`QuantizedStates`].

    `.keys` and `.values` are dequantised when they are read and quantised when they are assigned. What attention sees of a token
    is the same in the call that brings it and in all later ones: results do not depend on how a text is cut into calls but for
    rounding, which in 16 bits tips a number now and then.
    """

    bits: tuple[int, int | None]  # of latents and rope keys; `None`: these stay as they come

    def _encode_one(self, which: int, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.bits[which] is None:
            return (states,)
        quantized = QuantizedStates.of(states, self.bits[which])
        return quantized.codes, quantized.scales

    def _encode(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *self._encode_one(0, key_states), *self._encode_one(1, value_states)

    def read(self, which: int) -> QuantizedStates | torch.Tensor | None:
        """The latents (0) or the rope keys (1) held, `[B, 1, T, n]`, without a copy."""
        views = [self._view(part) for part in (range(2), range(2, len(self.parts)))[which]]
        if views[0] is None or self.bits[which] is None:
            return views[0]
        return QuantizedStates(*views, self.bits[which], self.widths[which], self.dtype)

    def _write(self, which: int, states: torch.Tensor | None) -> None:
        part = slice(0, 2) if which == 0 else slice(2, None)
        number = len(self.parts[part])
        self._buffers[part] = [None] * number if states is None else self._encode_one(which, states)
        self._lengths[part] = [0 if states is None else states.shape[-2]] * number

    keys = property(lambda self: as_tensor(self.read(0)), lambda self, value: self._write(0, value))
    values = property(lambda self: as_tensor(self.read(1)), lambda self, value: self._write(1, value))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, dequantize: bool = True, **kwargs
    ) -> tuple[torch.Tensor | QuantizedStates, torch.Tensor | QuantizedStates]:
        """As [`LatentLayer.update`]; without `dequantize` the tokens are returned as they are held.

        Raises:
            ValueError: also for states that want a gradient.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "A quantised cache passes no gradients on to the tokens that it holds: call the model under torch.no_grad(), or "
                "use LatentCache(config) without bits."
            )
        self._prepare(key_states, value_states)
        self._append(*self._encode(key_states, value_states))
        return (self.keys, self.values) if dequantize else (self.read(0), self.read(1))


class EightBitLatentLayer(QuantizedLatentLayer):
    bits = (8, None)
    parts = ("latent", "latent_scale", "rope_key")


class SixBitLatentLayer(QuantizedLatentLayer):
    bits = (6, 6)
    parts = ("latent", "latent_scale", "rope_key", "rope_key_scale")


LAYER_OF_BITS = {None: LatentLayer, 16: LatentLayer, 8: EightBitLatentLayer, 6: SixBitLatentLayer}


class LatentCache(DynamicCache):
    """The default cache of MLA models: `kv_lora_rank + qk_rope_head_dim` elements per token and layer.

    With `bits=8` a latent takes a byte per element and one for its scale, and the rope key stays as it is: 641 bytes per token and
    layer at DeepSeek's 512 + 64 in bf16, where 1,152 are without. With `bits=6` both are quantised, 6 / 8 of a byte per element
    and a byte for the scale of each: 434 bytes. At the 60 layers of DeepSeek-V2 these are 26,040 bytes per token, 93.3 % less than
    the 389,120 of DeepSeek-67B in bf16, as the V2 paper has it (section 3.2.3: 6 bits per element on average); with a rope key in
    bf16 it would be 92.1 %.

    Args:
        config: of the model that will use the cache; its widths are checked when tokens arrive. Without one the layers take
            the widths of the first tokens that they see.
        offloading (`bool`): keep only the layer at work on the GPU, the others on the CPU.
        bits: 8 or 6 to quantise; `None` and 16 keep the dtype of the model.

    Raises:
        ValueError: for other bits, and for a config without `kv_lora_rank` (DeepSeek-LLM and MoE-16B cache full keys and values).
    """

    def __init__(
        self, config: PreTrainedConfig | None = None, offloading: bool = False, bits: int | None = None, **kwargs
    ):
        if bits not in LAYER_OF_BITS:
            raise ValueError(
                f"A LatentCache has 8 or 6 bits per element, or those of the model (None), got bits={bits!r}."
            )
        self.bits, layer_class = bits, LAYER_OF_BITS[bits]
        self.quantized = issubclass(layer_class, QuantizedLatentLayer)
        self.model_type = ""
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=layer_class, offloading=offloading, **kwargs)
            return
        config = config.get_text_config(decoder=True)
        if not hasattr(config, "kv_lora_rank"):
            raise ValueError(
                f"LatentCache is for models with multi-head latent attention, and {type(config).__name__} (model_type "
                f"{config.model_type!r}) has no kv_lora_rank: use transformers' DynamicCache."
            )
        self.model_type, dims = config.model_type, (config.kv_lora_rank, config.qk_rope_head_dim)
        layers = [layer_class(*dims) for _ in range(config.num_hidden_layers)]
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
        """Bytes that the tokens held take, scales included; without `bits` that is `B * T * (c + r) * itemsize` per layer."""
        return sum(layer.nbytes for layer in self.layers)

    def early_initialization(self, *args, **kwargs) -> None:
        """Nothing to allocate ahead: the layers take shape, dtype and device from the first tokens."""

    def save(self, path: str | os.PathLike, input_ids: torch.Tensor | None = None) -> None:
        """Writes the tokens held to one safetensors file, quantised ones as they are, for [`LatentCache.load`].

        Args:
            path: of the file; it is replaced when the new one is complete.
            input_ids `[B, T]` or `[1, T]`: the tokens held, so that `load` can refuse another prompt.

        Raises:
            ValueError: for a cache without tokens, and for ids that are not as many as these.
        """
        tokens = self.get_seq_length()
        if not tokens:
            raise ValueError("This cache holds no tokens that could be saved: call the model with it first.")
        first = self.layers[0]
        batch = first.stored[0].shape[0]
        if input_ids is not None and tuple(input_ids.shape) not in ((batch, tokens), (1, tokens)):
            raise ValueError(
                f"The cache holds {batch} rows of {tokens} tokens, and input_ids is {tuple(input_ids.shape)}: pass the ids of "
                "these tokens, or crop the cache (after generate, the last token of the result is not in it)."
            )
        tensors = {} if input_ids is None else {"input_ids": input_ids}
        for index, layer in enumerate(self.layers):
            for part, states in zip(layer.parts, layer.stored, strict=True):
                # under autocast rope keys have fewer bits, and a file has one dtype
                if states.is_floating_point() and torch.promote_types(states.dtype, layer.dtype) == layer.dtype:
                    states = states.to(layer.dtype)
                tensors[f"layers.{index}.{part}"] = states
        rank, rope = first.widths
        fields = dict(model_type=self.model_type, layers=len(self.layers), kv_lora_rank=rank, qk_rope_head_dim=rope)
        write_cache(path, tensors, fields | dict(dtype=first.dtype, bits=self.bits, batch=batch, tokens=tokens))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PreTrainedConfig | None = None,
        input_ids: torch.Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> "LatentCache":
        """The cache that [`LatentCache.save`] wrote, to go on with the model that filled it.

        Args:
            path: of the file.
            config: of the model; checked against the file. It says nothing of the weights: these are yours to keep apart.
            input_ids `[B, S]`: the prompt; it must begin with the tokens that were saved.
            device: where the tensors go.

        Raises:
            FileNotFoundError: without the file.
            ValueError: for a file that is damaged, that another format version or kind of model wrote, or whose tokens are not
                the beginning of `input_ids`.
        """
        tensors, fields = read_cache(path, device)
        dims, held = (fields["kv_lora_rank"], fields["qk_rope_head_dim"]), tensors.pop("input_ids", None)
        cache = cls(config, bits=fields["bits"])
        if config is None:
            layer_class, cache.layer_class_to_replicate = cache.layer_class_to_replicate, None
            cache.model_type, cache.layers = (
                fields["model_type"],
                [layer_class(*dims) for _ in range(fields["layers"])],
            )
        expected = cache.model_type, len(cache.layers), cache.layers[0].dims
        found = fields["model_type"] or cache.model_type, fields["layers"], dims
        if expected != found:
            raise ValueError(
                f"{path} was written by a model with (model_type, layers, widths) {found}, and the config has {expected}: pass the "
                "config of that model, or fill a new cache with this one."
            )
        if input_ids is not None:
            check_prefix(path, held, input_ids)
        names = {f"layers.{index}.{part}" for index, layer in enumerate(cache.layers) for part in layer.parts}
        if names != tensors.keys():
            raise ValueError(f"{path} lacks or adds tensors ({sorted(names ^ tensors.keys())[:4]}): write it again.")
        like = [torch.empty(fields["batch"], 1, 0, width, dtype=fields["dtype"], device=device) for width in dims]
        for index, layer in enumerate(cache.layers):
            layer.lazy_initialization(*like)
            for which, part in enumerate(layer.parts):
                layer._adopt(which, tensors[f"layers.{index}.{part}"], fields["tokens"])
        return cache
