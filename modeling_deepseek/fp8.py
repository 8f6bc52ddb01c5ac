"""Block-FP8 weights (V3, R1, V3.1): the rule, modules that keep them, and how a checkpoint is read either way."""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# of `from_pretrained` that are no fields of a config, though some configs have an attribute of that name
LOADING_ARGUMENTS = (
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "torch_dtype",
    "output_loading_info",
    "device_map",
)

SCALE_SUFFIX = "_scale_inv"  # a multiplier, whatever the name says: W = W_fp8 * scale
FP8_DTYPES = {"F8_E4M3", "F8_E5M2"}
DEFAULT_BLOCK = (128, 128)
FP8_MAX = 448.0  # of E4M3
PIECE = 2**22  # elements of a weight that are dequantised at a time


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`weight` `[m, n]` in FP8 times its block scales `[ceil(m / rows), ceil(n / columns)]` in fp32, then cast to `dtype`.

    The last block of a row or column may be partial: kv_a_proj_with_mqa has 576 = 4.5 * 128 rows.

    Raises:
        ValueError: when the scales are not one per block.
    """
    blocks = tuple(-(-size // block) for size, block in zip(weight.shape, block_size, strict=True))
    if tuple(scale.shape) != blocks:
        raise ValueError(
            f"Scales {tuple(scale.shape)}, but a weight {tuple(weight.shape)} has {blocks} blocks of {tuple(block_size)}: "
            "check weight_block_size in the quantization_config."
        )
    rows, columns = block_size
    scale = scale.float()
    if weight.device.type != "cpu":
        spread = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
        return (weight.float() * spread.repeat_interleave(columns, 1)[:, : weight.shape[1]]).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    for block, spread in enumerate(scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]):
        part = slice(block * rows, (block + 1) * rows)  # little enough for the processor's cache
        result[part] = _times(weight[part], spread)
    return result


def _times(weight: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """`weight.float() * spread` on a CPU, whose own cast from FP8 takes several times as long.

    E4M3 bits, moved up by 7, are the fp16 bits of the value times 2^-8 (biases 7 and 15); only its NaN has no such form,
    and a scale that 2^8 makes infinite.
    """
    bits = weight.view(torch.int8)
    if weight.dtype != torch.float8_e4m3fn or (bits & 0x7F).max() == 0x7F or spread.max() >= 2.0**120:
        return weight.float() * spread
    halves = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_(spread * 256)


def quantize(
    weight: torch.Tensor, block_size: tuple[int, int] = DEFAULT_BLOCK, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `[m, n]` -> E4M3 `[m, n]` and fp32 scales `[ceil(m / rows), ceil(n / columns)]`: amax of a block / 448.

    With `scale_fmt` "ue8m0" scales are rounded up to a power of two, as in V3.1. Blocks of zeros have scale 1; other scales are
    at least the smallest normal fp32, 1.2e-38.

    Raises:
        ValueError: for values that are not finite.
    """
    rows, columns = block_size
    grid = [-(-size // block) for size, block in zip(weight.shape, block_size, strict=True)]
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.ones(grid, device=weight.device)
    for block in range(grid[0]):  # a row of blocks at a time: little memory, which a CPU caches
        part = weight[block * rows : (block + 1) * rows].float()
        amax = (
            F.pad(part.abs(), (0, grid[1] * columns - part.shape[1])).view(part.shape[0], grid[1], columns).amax((0, 2))
        )
        if not amax.isfinite().all():
            raise ValueError(f"holds {part[~part.isfinite()][0].item()} in row block {block}; expected finite values")
        scales = (amax / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        if scale_fmt == "ue8m0":
            mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1)
            scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        scale[block] = torch.where(amax == 0, 1.0, scales)
        spread = scale[block].repeat_interleave(columns)[: part.shape[1]]
        quantized[block * rows : (block + 1) * rows] = (part / spread).to(torch.float8_e4m3fn)
    return quantized, scale


def official_fp8_config(scale_fmt: str | None = None) -> dict:
    """`quantization_config` of an official checkpoint whose weights are in 128 x 128 blocks."""
    scales = {} if scale_fmt is None else {"scale_fmt": scale_fmt}
    return (
        dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=list(DEFAULT_BLOCK))
        | scales
    )


def dequantized_pieces(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a block-FP8 weight `[m, n]`, dequantised a few million elements at a time, and which they are."""
    rows = block_size[0]
    step = max(1, PIECE // (rows * weight.shape[1]))  # in blocks
    for block in range(0, scale.shape[0], step):
        part = slice(block * rows, (block + step) * rows)
        yield part, dequantize(weight[part], scale[block : block + step], block_size, dtype)


class _BlockScaledProduct(torch.autograd.Function):
    """`x @ W.T` for a frozen block-FP8 `W`, which is never there as a whole in another dtype, backward neither."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]):
        ctx.save_for_backward(weight, scale)
        ctx.block_size = block_size
        output = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for part, piece in dequantized_pieces(weight, scale, block_size, x.dtype):
            output[..., part] = F.linear(x, piece)
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight, scale = ctx.saved_tensors
        result = 0
        for part, piece in dequantized_pieces(weight, scale, ctx.block_size, gradient.dtype):
            result = result + gradient[..., part] @ piece
        return result, None, None, None


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """`x` `[..., n]` times a block-FP8 weight `[m, n]`: `[..., m]` in the dtype of `x`. The weight gets no gradient.

    Its plain twin is `F.linear(x, dequantize(weight, scale, block_size).to(x.dtype))`.
    """
    return _BlockScaledProduct.apply(x, weight, scale, block_size)


class _KeepsFP8:
    """A module that is cast as a whole keeps its FP8 weights and their scales as they are, and only moves them."""

    block_size: tuple[int, int]

    def _apply(self, fn, recurse=True):
        held = (*self._parameters.items(), *self._buffers.items())
        kept = {name: tensor.data for name, tensor in held if tensor is not None and name != "bias"}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            moved = getattr(self, name)
            if moved.dtype != data.dtype:
                moved.data = data.to(moved.device)
        return self


class FP8Linear(_KeepsFP8, nn.Linear):
    """A linear layer `[..., in] -> [..., out]` whose frozen weight stays in block FP8."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], bias: nn.Parameter | None
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.block_size = tuple(block_size)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = fp8_linear(x, self.weight, self.weight_scale_inv, self.block_size)
        return output if self.bias is None else output + self.bias

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight `[out, in]` in `dtype`."""
        return dequantize(self.weight, self.weight_scale_inv, self.block_size, dtype)


class FP8Experts(_KeepsFP8, nn.Module):
    """Routed experts whose frozen weights stay in block FP8, fused as in `DeepseekExperts`.

    `gate_up_proj` `[E, 2I, d]` with scales `[E, 2, ceil(I / rows), ceil(d / columns)]`, for gate and up apart: I need not be a
    multiple of the block. `down_proj` `[E, d, I]` with scales `[E, ceil(d / rows), ceil(I / columns)]`.
    """

    def __init__(self, weights: dict[str, torch.Tensor], block_size: tuple[int, int], hidden_act: str):
        super().__init__()
        self.block_size = tuple(block_size)
        self.num_experts, _, self.intermediate_dim = weights["down_proj"].shape
        self.act_fn = ACT2FN[hidden_act]
        for name in ("gate_up_proj", "down_proj"):
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))
            self.register_buffer(name + SCALE_SUFFIX, weights[name + SCALE_SUFFIX])

    def weights_of(self, expert: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """FP8 weight and scales of one expert's "gate_proj", "up_proj" and "down_proj", as they lie on disk."""
        gate, up = self.gate_up_proj[expert].chunk(2)
        scales = self.gate_up_proj_scale_inv[expert]
        return {
            "gate_proj": (gate, scales[0]),
            "up_proj": (up, scales[1]),
            "down_proj": (self.down_proj[expert], self.down_proj_scale_inv[expert]),
        }

    def dequantized(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """All of "gate_up_proj" or "down_proj" in `dtype`."""
        kinds = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        experts = map(self.weights_of, range(self.num_experts))
        return torch.stack([torch.cat([dequantize(*e[k], self.block_size, dtype) for k in kinds]) for e in experts])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` `[N, d]`, experts and gates `[N, K]` -> `[N, d]`: one expert after another."""
        if is_parametrized(self):
            raise ValueError(
                "An adapter was put on experts that are kept in FP8, which it cannot add to: load with fp8_weights='dequantize', "
                "or leave the experts out of the adapter's targets."
            )
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:  # served elsewhere, under expert parallelism
                continue
            rows, place = (top_k_index == expert).nonzero(as_tuple=True)
            product = {name: (*pair, self.block_size) for name, pair in self.weights_of(expert).items()}
            x = hidden_states[rows]
            hidden = self.act_fn(fp8_linear(x, *product["gate_proj"])) * fp8_linear(x, *product["up_proj"])
            found = fp8_linear(hidden, *product["down_proj"]) * top_k_weights[rows, place].unsqueeze(-1)
            output.index_add_(0, rows, found.to(output.dtype))
        return output


class FusedSlice:
    """Stands for the tensors of a checkpoint that one parameter is made of: stacked along new dimensions as `parts` is nested."""

    def __init__(self, parts: list, join_inner: bool):
        self.parts, self.join_inner = parts, join_inner

    def get_shape(self) -> list[int]:
        inner = [list(part.get_shape()) for part in self.parts[0]]
        if self.join_inner:
            return [len(self.parts), sum(shape[0] for shape in inner), *inner[0][1:]]
        return [len(self.parts), len(inner), *inner[0]]

    def get_dtype(self) -> str:
        return self.parts[0][0].get_dtype()

    def __getitem__(self, index) -> torch.Tensor:
        join = torch.cat if self.join_inner else torch.stack
        stacked = [join([_bytes(part[...]) for part in parts]) for parts in self.parts]
        return torch.stack(stacked).view(self.parts[0][0][...].dtype)[index]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 tensors as bytes, which every operation that only moves data takes."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


class DequantizedSlice:
    """Stands for a tensor of the checkpoint like a slice of safetensors, and dequantises it when it is read."""

    def __init__(self, weight, scale, block_size: tuple[int, int], dtype: torch.dtype):
        self.weight, self.scale, self.block_size, self.dtype = weight, scale, block_size, dtype

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> torch.Tensor:
        return dequantize(self.weight[...], self.scale[...], self.block_size, self.dtype)[index]


def check_scale_values(where: str, scale: torch.Tensor) -> None:
    """Raises `ValueError`, beginning with `where`, for scales that are not finite or not above 0."""
    values = scale.float().flatten()
    wrong = (~(values.isfinite() & (values > 0))).nonzero()
    if len(wrong):
        place = wrong[0, 0].item()
        raise ValueError(
            f"{where} holds {values[place].item()} (element {place}), expected finite scales above 0: download or copy it again"
        )


def checkpoint_slices(files: list[str], block_size: tuple[int, int]) -> tuple[dict, set[str]]:
    """Name -> lazy tensor over all files, and which of them are FP8 weights; each has its scales, wherever these are stored.

    Raises:
        ValueError: for an FP8 weight without scales, scales without a weight, and scales that are not one finite number above 0
            per block, naming the tensors.
    """
    slices, places = {}, {}
    for path in files:
        tensors = safe_open(path, framework="pt")
        found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        slices |= found
        places |= dict.fromkeys(found, path)
    quantized = {name for name, lazy in slices.items() if lazy.get_dtype() in FP8_DTYPES}
    scales = {name for name in slices if name.endswith(SCALE_SUFFIX)}
    for name in sorted(quantized):
        if name + SCALE_SUFFIX not in scales:
            raise ValueError(
                f"{name} is FP8, but its scales {name + SCALE_SUFFIX} are in none of the {len(files)} files."
            )
    for name in sorted(scales):
        weight, where = name.removesuffix(SCALE_SUFFIX), f"{places[name]}: {name}"
        if weight not in quantized:
            raise ValueError(f"{name} has no FP8 weight {weight} that it belongs to.")
        shape = slices[weight].get_shape()
        grid = [-(-size // block) for size, block in zip(shape, block_size, strict=False)]
        if len(shape) != 2 or slices[name].get_shape() != grid:
            raise ValueError(
                f"{where} is {slices[name].get_shape()}, expected {grid}, one per block {list(block_size)} of {weight} {shape}: "
                "check weight_block_size in the quantization_config."
            )
        check_scale_values(where, slices[name][...])
    return slices, quantized


def dequantized_state_dict(
    files: list[str], block_size: tuple[int, int], dtype: torch.dtype
) -> dict[str, DequantizedSlice]:
    """Name -> lazy tensor over all files, FP8 weights dequantised when they are read; errors as in [`checkpoint_slices`]."""
    slices, quantized = checkpoint_slices(files, block_size)
    return {
        name: DequantizedSlice(lazy, slices[name + SCALE_SUFFIX], block_size, dtype) if name in quantized else lazy
        for name, lazy in slices.items()
        if name.removesuffix(SCALE_SUFFIX) not in quantized or name in quantized
    }


def without_fp8(config_class, path, config, kwargs: dict):
    """The config to load `path` with: for a block-FP8 checkpoint a copy without `quantization_config`, else `config` itself."""
    if "quantization_config" in kwargs or kwargs.get("state_dict") is not None or path is None:
        return config
    if not isinstance(config, PreTrainedConfig):
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            stored, _ = PreTrainedConfig.get_config_dict(path if config is None else config, **hub)
        except OSError:  # no config here: an adapter's folder, or transformers says what is wrong
            return config
        if "quantization_config" not in stored:
            return config
        kept = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
        config, unused = config_class.from_pretrained(
            path if config is None else config, return_unused_kwargs=True, **{**kwargs, **hub}
        )
        kwargs.clear()
        kwargs.update({**unused, **kept, **hub})
    config = copy.deepcopy(config)
    block_size = _take_fp8_config(config)
    if block_size is not None:
        config._fp8_block_size = block_size
        config.dtype = config.dtype or torch.bfloat16
    return config


def _take_fp8_config(config) -> tuple[int, int] | None:
    """Takes the `quantization_config` of a block-FP8 checkpoint out of `config`; returns its block size, else `None`."""
    quantization = getattr(config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ValueError(
                f"The quantization_config has quant_method {method!r}; expected 'fp8' or another of {known}."
            )
        return None
    block_size = block_size_of(quantization, "The quantization_config")
    del config.quantization_config  # which transformers would act upon
    if config.fp8_weights == "keep":
        config._fp8_quantization_config = quantization
    else:
        logger.warning_once("The checkpoint is stored in FP8: its weights are dequantised exactly while they are read.")
    return block_size


def block_size_of(quantization: dict, where: str) -> tuple[int, int]:
    """Rows and columns of a block by a `quantization_config`; the official 128 x 128 where it says nothing.

    Raises:
        ValueError: beginning with `where`, for a `weight_block_size` that is none.
    """
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(
            f"{where} has weight_block_size {block!r}; expected rows and columns, [128, 128] in the releases"
        )
    return tuple(block)
