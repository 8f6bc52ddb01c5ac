"""Block-FP8 weights (V3, R1, V3.1): the rule, the product, and the modules that keep them."""

import itertools
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.activations import ACT2FN

from .dispatch import Product, experts_at_once, sorted_by_expert
from .dtypes import has_fast_gemm
from .ops import (
    C_MAX_TOKENS_IN_PAIRS,
    block_scaled_product,
    blocks_of,
    dequantize_in_c,
    dequantizing_product,
    dequantizing_products,
    multiplies_fp8,
)
from .scratch import scratch

SCALE_SUFFIX = "_scale_inv"  # a multiplier, whatever the name says: W = W_fp8 * scale
DEFAULT_BLOCK = (128, 128)
FP8_MAX = 448.0  # of E4M3
PIECE, GPU_PIECE = 2**20, 2**26  # elements of a weight that are dequantised at a time


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` `[m, n]` in FP8 times its block scales `[ceil(m / rows), ceil(n / columns)]` in fp32, then cast to `dtype`.

    The last block of a row or column may be partial: kv_a_proj_with_mqa has 576 = 4.5 * 128 rows. With `out`, a tensor of this
    shape and dtype, the result is written there.

    Raises:
        ValueError: when the scales are not one per block.
    """
    blocks = blocks_of(weight, block_size)
    if tuple(scale.shape) != blocks:
        raise ValueError(
            f"Scales {tuple(scale.shape)}, but a weight {tuple(weight.shape)} has {blocks} blocks of {tuple(block_size)}: "
            "check weight_block_size in the quantization_config."
        )
    if not weight.numel():
        return torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    rows, columns = block_size
    scale = scale.float()
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    if weight.device.type != "cpu":
        return dequantize_at_once(weight, scale, block_size, result)
    if dequantize_in_c(weight, scale, block_size, result):
        return result
    real = type(weight.detach()) is torch.Tensor and not torch.compiler.is_compiling()
    quick = real and weight.dtype == torch.float8_e4m3fn
    for block, spread in enumerate(scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]):
        part = slice(block * rows, (block + 1) * rows)
        if not (quick and _multiply(weight[part], spread, result[part])):
            result[part] = weight[part].float() * spread
    return result


def dequantize_at_once(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """`out = weight.float() * scale` per block, rounded once, in as few bytes as PyTorch's operations move; `scale` in fp32."""
    (rows, columns), (outer, inner) = block_size, weight.shape
    whole = outer // rows if inner % columns == 0 and out.is_contiguous() and not scale.requires_grad else 0
    if whole:
        held = out.dtype if out.dtype.itemsize == 2 else torch.float32  # FP8 fits in 16 bits
        exact = weight[: whole * rows].to(held)
        blocks, target = (each.view(whole, rows, -1, columns) for each in (exact, out[: whole * rows]))
        torch.mul(blocks, scale[:whole, None, :, None], out=target)
    if whole * rows < outer:
        spread = scale[whole:].repeat_interleave(rows, 0)[: outer - whole * rows].repeat_interleave(columns, 1)
        out[whole * rows :] = weight[whole * rows :].float() * spread[:, :inner]
    return out


def _multiply(weight: torch.Tensor, spread: torch.Tensor, out: torch.Tensor) -> bool:
    """`out = weight.float() * spread` on a CPU, whose own cast from E4M3 takes many times as long; False where that cast must do.

    The bits of E4M3, moved up by 7, are those of the value times 2^-8 in fp16 (biases 7 and 15). Left to the cast are its NaN,
    which has no such form, and a scale that 2^8 makes infinite.
    """
    bits = weight.view(torch.int8)
    if torch.bitwise_and(bits, 0x7F, out=scratch(bits.shape, torch.int8)).max() == 0x7F or spread.max() >= 2.0**120:
        return False
    codes = scratch(bits.shape, torch.int16)
    codes.copy_(bits).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values = out if out.dtype == torch.float32 else scratch(bits.shape, torch.float32)
    values.copy_(codes.view(torch.float16))
    values.mul_(spread * 256)
    if values is not out:
        out.copy_(values)
    return True


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
    scale = torch.ones(grid, dtype=torch.float32, device=weight.device)
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
    """Rows of a block-FP8 weight `[m, n]`, dequantised a million elements at a time, and which they are.

    On a CPU the next piece overwrites the one before: fresh memory takes longer than the product.
    """
    rows = block_size[0]
    piece = PIECE if weight.device.type == "cpu" else GPU_PIECE
    step = max(1, piece // (rows * weight.shape[1]))  # in blocks
    buffer = None
    if weight.device.type == "cpu":
        buffer = scratch((min(step * rows, weight.shape[0]), weight.shape[1]), dtype)
    for block in range(0, scale.shape[0], step):
        part = slice(block * rows, (block + step) * rows)
        own = weight[part]
        out = None if buffer is None else buffer[: len(own)]
        yield part, dequantize(own, scale[block : block + step], block_size, dtype, out)


class _BlockScaledProduct(torch.autograd.Function):
    """`x @ W.T` for a frozen block-FP8 `W`, which is never there as a whole in another dtype, backward neither."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], ue8m0: bool
    ):
        ctx.save_for_backward(weight, scale)
        ctx.block_size = block_size
        if multiplies_fp8(weight, block_size):
            return block_scaled_product(x, weight, scale, block_size, ue8m0)
        output = dequantizing_product(x, weight, scale, block_size)
        if output is not None:
            return output
        output, compute = x.new_empty((*x.shape[:-1], weight.shape[0])), _compute_dtype(x)
        x = x.to(compute)
        for part, piece in dequantized_pieces(weight, scale, block_size, compute):
            output[..., part] = F.linear(x, piece)
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight, scale = ctx.saved_tensors
        result, compute = 0, _compute_dtype(gradient)
        wide, sums = gradient.to(compute), torch.promote_types(compute, torch.float32)
        for part, piece in dequantized_pieces(weight, scale, ctx.block_size, compute):
            result = result + (wide[..., part] @ piece).to(sums)
        return result.to(gradient.dtype), None, None, None, None


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Where products in the dtype of `x` are slow, weights that are dequantised in fp32 anyway are multiplied so."""
    return x.dtype if has_fast_gemm(x.device.type, x.dtype) else torch.float32


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], ue8m0: bool = False
) -> torch.Tensor:
    """`x` `[..., n]` times a block-FP8 weight `[m, n]`: `[..., m]` in the dtype of `x`. The weight gets no gradient.

    On a GPU that multiplies FP8 the activations are rounded too (`ops.block_scaled_product_reference`, with its `ue8m0`), and
    the gradient is that of the plain product. Elsewhere its plain twin is `F.linear(x, dequantize(weight, scale, block_size))`.
    """
    return _BlockScaledProduct.apply(x, weight, scale, block_size, ue8m0)


class _KeepsFP8:
    """A module that is cast as a whole keeps its FP8 weights and their scales as they are, and only moves them."""

    block_size: tuple[int, int]
    ue8m0: bool  # whether activations that are rounded to FP8 get scales that are powers of two
    compute_dtype: torch.dtype = torch.float32  # of the model; PEFT gives its adapters this one, not the weight's

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """`load_state_dict` copies bytes: a plain weight would be cast to FP8 beside the scales of another."""
        for name, held in self._parameters.items():
            found = state_dict.get(prefix + name)
            if found is not None and name != "bias" and found.dtype != held.dtype:
                error_msgs.append(_other_dtype(prefix + name, state_dict.pop(prefix + name), held))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn, recurse=True):
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        held = (*self._parameters.items(), *self._buffers.items())
        kept = {name: tensor.data for name, tensor in held if tensor is not None and name != "bias"}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            moved = getattr(self, name)
            if moved.dtype != data.dtype:
                moved.data = data.to(moved.device)
        return self


def _other_dtype(key: str, found: torch.Tensor, held: torch.Tensor) -> str:
    return f"dtype mismatch for {key}: {found.dtype}, the model keeps it in {held.dtype}; call dequantize_fp8() of the model first."


class FP8Linear(_KeepsFP8, nn.Linear):
    """A linear layer `[..., in] -> [..., out]` whose frozen weight stays in block FP8."""

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        block_size: tuple[int, int],
        bias: nn.Parameter | None,
        ue8m0: bool = False,
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.block_size, self.ue8m0 = tuple(block_size), ue8m0
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = fp8_linear(x, self.weight, self.weight_scale_inv, self.block_size, self.ue8m0)
        return output if self.bias is None else output + self.bias

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight `[out, in]` in `dtype`."""
        return dequantize(self.weight, self.weight_scale_inv, self.block_size, dtype)


class FP8Experts(_KeepsFP8, nn.Module):
    """Routed experts whose frozen weights stay in block FP8, fused as in `DeepseekExperts`.

    `gate_up_proj` `[E, 2I, d]` with scales `[E, 2, ceil(I / rows), ceil(d / columns)]`, for gate and up apart: I need not be a
    multiple of the block. `down_proj` `[E, d, I]` with scales `[E, ceil(d / rows), ceil(I / columns)]`.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], block_size: tuple[int, int], hidden_act: str, ue8m0: bool = False
    ):
        super().__init__()
        self.block_size, self.ue8m0 = tuple(block_size), ue8m0
        self.num_experts, _, self.intermediate_dim = weights["down_proj"].shape
        self.act_fn = ACT2FN[hidden_act]
        # by name of a weight: A [E, r, in], B [E, out, r] and scale of every adapter that is to be heard; see lora.py
        self.low_rank: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
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

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """`load_state_dict` takes per-expert keys as well, all of them or, from one shard of many, some: Trainer resumes so."""
        per_expert = re.compile(re.escape(prefix) + rf"(\d+)\.((?:gate|up|down)_proj)\.weight({SCALE_SUFFIX})?")
        found = {key: match.groups() for key in state_dict if (match := per_expert.fullmatch(key))}
        taken = 0
        for key, (expert, name, suffix) in found.items():
            value = state_dict.pop(key)
            held = self.weights_of(int(expert))[name][suffix is not None] if int(expert) < self.num_experts else None
            if held is None or value.shape != held.shape:
                expected = None if held is None else tuple(held.shape)
                error_msgs.append(f"size mismatch for {key}: {tuple(value.shape)}, the model has {expected}.")
            elif suffix is None and value.dtype != held.dtype:
                error_msgs.append(_other_dtype(key, value, held))
            else:
                held.copy_(value)
                taken += 1
        if taken == 6 * self.num_experts:  # all that there is: none of the fused ones is missing
            state_dict |= {
                prefix + name: tensor.data for name, tensor in (*self._parameters.items(), *self._buffers.items())
            }
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def dequantized(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """All of "gate_up_proj" or "down_proj" in `dtype`."""
        kinds = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        experts = map(self.weights_of, range(self.num_experts))
        return torch.stack([torch.cat([dequantize(*e[k], self.block_size, dtype) for k in kinds]) for e in experts])

    def _with_adapters(self, product: torch.Tensor, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`product` of `x` `[n, in]` with the weight `name` of `expert`, plus what adapters add to it."""
        for a, b, scale in self.low_rank.get(name, ()):
            product = product + (F.linear(F.linear(x.to(a.dtype), a[expert]), b[expert]) * scale).to(product.dtype)
        return product

    def _together(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """What `forward` gives, by one product for all experts before the activation and one behind it; `None` if it cannot be."""
        if self.low_rank or self.intermediate_dim % self.block_size[0] or hidden_states.device.type != "cpu":
            return None
        few = 0 < top_k_index.numel() <= C_MAX_TOKENS_IN_PAIRS * self.num_experts
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not few:
            return None

        def product(weights: torch.Tensor, scales: torch.Tensor) -> Product:
            return lambda x, chosen, starts: dequantizing_products(x, weights, scales, chosen, starts, self.block_size)

        up = product(
            self.gate_up_proj, self.gate_up_proj_scale_inv.flatten(1, 2)
        )  # blocks of gate and up lie behind each other
        down = product(self.down_proj, self.down_proj_scale_inv)
        return experts_at_once(hidden_states, top_k_index, top_k_weights, self.num_experts, up, self._apply_gate, down)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` `[N, d]`, experts and gates `[N, K]` -> `[N, d]`: all experts together, or one after another."""
        if is_parametrized(self):
            raise ValueError(
                "A parametrization was put on experts that are kept in FP8, which it cannot add to: load with "
                "fp8_weights='dequantize', or leave the experts out. LoRA works on them, injected into the model as a whole."
            )
        together = self._together(hidden_states, top_k_index, top_k_weights)
        if together is not None:
            return together
        output = torch.zeros_like(hidden_states)
        tokens, places, counts = sorted_by_expert(top_k_index, self.num_experts)
        gates = top_k_weights.flatten()[places].unsqueeze(-1)
        ends = list(itertools.accumulate(counts))
        for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
            if not count and (expert or ends[-1]):  # without any tokens the first runs: adapters get their gradients
                continue
            here = slice(end - count, end)
            rows = tokens[here]
            product = {name: (*pair, self.block_size, self.ue8m0) for name, pair in self.weights_of(expert).items()}
            x = hidden_states[rows]
            if self.intermediate_dim % self.block_size[0]:
                gate_up = torch.cat([fp8_linear(x, *product[name]) for name in ("gate_proj", "up_proj")], dim=-1)
            else:  # their blocks lie behind each other as if they were those of one weight
                scale = self.gate_up_proj_scale_inv[expert].flatten(0, 1)
                gate_up = fp8_linear(x, self.gate_up_proj[expert], scale, self.block_size, self.ue8m0)
            hidden = self._apply_gate(self._with_adapters(gate_up, "gate_up_proj", x, expert))
            found = self._with_adapters(fp8_linear(hidden, *product["down_proj"]), "down_proj", hidden, expert)
            output.index_add_(0, rows, (found * gates[here]).to(output.dtype))
        return output
