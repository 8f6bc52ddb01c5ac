"""Cached vectors in 8 or 6 bits: how they are rounded, packed, and read again."""

import functools
import math

import torch

from .scratch import scratch

OFFSET, PER_OCTAVE = 160, 8  # a scale is 2^((byte - OFFSET) / PER_OCTAVE): from 1e-6 to 3444
NOT_FINITE = 255  # the byte of a vector that holds NaN, infinity or more than the largest scale can reach


class QuantizedStates:
    """Vectors `[B, 1, T, n]` as a cache keeps them: rotated, one signed number of `bits` bits per element, one scale per vector.

    The rotation (Hadamard, in blocks of the largest power of two that divides n) spreads outliers over a vector; it is orthogonal,
    so that a product with rotated vectors is the product itself. A step is 2^(1/8) times amax / 127 (8 bits) or amax / 31 (6 bits)
    at most, amax being the largest element after rotation, or 4e-6 where that is more. The error of an element is half a step at
    most before it is rotated back, that of a vector `sqrt(n) / 2` steps. A vector with NaN or infinity is read as NaN.

    Args:
        codes `[B, 1, T, n]` int8 (8 bits), or `[B, 1, T, 3 * ceil(n / 4)]` uint8 (6 bits: four numbers in three bytes).
        scales `[B, 1, T, 1]` uint8: logarithms, an eighth of an octave apart.
        width: n.
        dtype: of the vectors when they are read.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: int, width: int, dtype: torch.dtype):
        self.codes, self.scales, self.bits, self.width, self.dtype = codes, scales, bits, width, dtype

    @classmethod
    @torch.no_grad()
    def of(cls, states: torch.Tensor, bits: int) -> "QuantizedStates":
        """Rounds `[B, 1, T, n]`."""
        step = 2 ** (8 - bits)
        most = 127 // step
        rotated = rotate(states)
        largest = rotated.abs().amax(-1, keepdim=True) / (most * step)
        scales = (largest.log2() * PER_OCTAVE).ceil() + OFFSET
        scales = torch.where(scales < NOT_FINITE, scales.clamp_min(0), NOT_FINITE).to(torch.uint8)
        codes = (rotated / (_multipliers(scales) * step)).round().clamp(-most - 1, most).mul(step).to(torch.int8)
        return cls(codes if bits == 8 else pack(codes), scales, bits, states.shape[-1], states.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.width))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def multipliers(self, dtype: torch.dtype) -> torch.Tensor:
        """`[B, 1, T]`: what the numbers of each vector are to be multiplied with."""
        return _multipliers(self.scales).squeeze(-1).to(dtype)

    def dequantize(self) -> torch.Tensor:
        """The vectors `[B, 1, T, n]` in `dtype`."""
        numbers = self.codes if self.bits == 8 else unpack(self.codes, self.width)
        return rotate(numbers * _multipliers(self.scales)).to(self.dtype)


def is_quantized(states) -> bool:
    """Whether these are [`QuantizedStates`], also those of another copy of this code: a model may be remote code."""
    return type(states) is not torch.Tensor and hasattr(states, "codes")


def as_tensor(states: torch.Tensor | QuantizedStates | None) -> torch.Tensor | None:
    """Vectors that may be quantised, as a tensor."""
    return states.dequantize() if is_quantized(states) else states


def read(states: torch.Tensor | QuantizedStates, here: slice, room: torch.Tensor) -> torch.Tensor:
    """Vectors `here` of `[B, 1, T, n]` as `[B, t, n]`, in memory and dtype of `room`; quantised ones without their scale."""
    held = (states.codes if is_quantized(states) else states)[:, 0, here]
    out = room[: held.shape[0] * held.shape[1] * states.shape[-1]].view(*held.shape[:2], states.shape[-1])
    packed = is_quantized(states) and states.bits == 6
    return out.copy_(unpack_briefly(held, states.width) if packed else held)


def space(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Uninitialised vectors of these sizes; on a CPU in memory that the next call uses again."""
    if device.type == "cpu":
        return scratch((sum(sizes),), dtype).split(sizes)
    return torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)


def _multipliers(scales: torch.Tensor) -> torch.Tensor:
    values = torch.exp2((scales.float() - OFFSET) / PER_OCTAVE)
    return values.masked_fill(scales == NOT_FINITE, torch.nan)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`x` `[..., n]` times an orthogonal, symmetric matrix, in fp32 at least: doing it twice gives `x`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    block = x.shape[-1] & -x.shape[-1]
    columns = 1 << (block.bit_length() // 2)
    rows = block // columns
    grid = x.unflatten(-1, (-1, rows, columns)) @ hadamard(columns, x.dtype, x.device)
    return (hadamard(rows, x.dtype, x.device) @ grid).flatten(-3)


def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix `[size, size]`, orthogonal: `size` is a power of two."""
    if torch.compiler.is_compiling():
        return _sylvester(size).to(device, dtype)
    return _held_hadamard(size, dtype, device)


@functools.lru_cache
def _held_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # or a graph could not hold it
        return _sylvester(size).to(device, dtype)


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 multiples of 4 `[..., n]` -> uint8 `[..., 3 * ceil(n / 4)]`.

    A byte has a number of one of the first three quarters in its lower six bits; the upper two bits of the three bytes that
    belong together are the number of the last quarter.
    """
    quarter = -(-codes.shape[-1] // 4)
    codes = torch.nn.functional.pad(codes, (0, 4 * quarter - codes.shape[-1])).view(torch.uint8)
    first, last = codes.split((3 * quarter, quarter), dim=-1)
    upper = torch.cat((last & 0xC0, (last << 2) & 0xC0, (last << 4) & 0xC0), dim=-1)
    return first >> 2 | upper


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """What [`pack`] was given, `[..., width]`."""
    one, two, three = packed.split(packed.shape[-1] // 3, dim=-1)
    last = (one & 0xC0) | ((two >> 2) & 0x30) | ((three >> 4) & 0x0C)
    return torch.cat((packed << 2, last), dim=-1).view(torch.int8)[..., :width]


def unpack_briefly(packed: torch.Tensor, width: int) -> torch.Tensor:
    """[`unpack`]; on a CPU in memory that the next call uses again."""
    quarter = packed.shape[-1] // 3
    shapes = [(*packed.shape[:-1], size) for size in (4 * quarter, quarter)]
    room = space(tuple(map(math.prod, shapes)), torch.uint8, packed.device)
    codes, spare = (memory.view(shape) for memory, shape in zip(room, shapes, strict=True))
    torch.bitwise_left_shift(packed, 2, out=codes[..., : 3 * quarter])
    one, two, three = packed.split(quarter, dim=-1)
    last = torch.bitwise_and(one, 0xC0, out=codes[..., 3 * quarter :])
    last |= torch.bitwise_right_shift(two, 2, out=spare).bitwise_and_(0x30)
    last |= torch.bitwise_right_shift(three, 4, out=spare).bitwise_and_(0x0C)
    return codes.view(torch.int8)[..., :width]
