"""New tokens of MLA over a latent cache on an x86 CPU, in C: one call from queries to the heads' outputs; for `ops` alone.

The kernel is [`mla_source`]; its plain twins are `absorbed_attention` and, where latents are quantised,
`absorbed_attention_quantized`.
"""

import ctypes
import functools
import platform

import torch

from .compiler import compiled
from .mla_source import SOURCE
from .quantized import QuantizedStates, is_quantized
from .scratch import scratch_pointer

HELD = 2**23  # fp32 numbers that are kept between calls: fresh memory takes longer than what is done with it
SPLIT = 256  # tokens at least that a thread meets at a time
MOST_WIDTH = 1024  # of latent and rope key together


class _Tensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("scales", "rope_scales", "mask", "out")]
    _fields_ += [("scaling", ctypes.c_float)]


_Shapes = ctypes.c_int64 * 29


@functools.cache
def _library(*flags: str) -> ctypes.CDLL | None:
    """The translated functions, where they are worth calling."""
    library = compiled(SOURCE, *flags) if platform.machine().lower() in ("x86_64", "amd64") else None
    if library is None or not library.mla_lanes():
        return None
    library.mla_decode.argtypes = [_Shapes, ctypes.POINTER(_Tensors), ctypes.c_void_p, ctypes.c_int64]
    library.mla_decode.restype = None
    library.lanes = library.mla_lanes()
    return library


def decode_available() -> bool:
    """Whether there is the kernel: on x86 with AVX2 and OpenMP. The first to ask waits about a second for the compiler."""
    return _library() is not None


def vector_lanes() -> int:
    """How many fp32 numbers are multiplied at once: 8 (AVX2) or 16 (AVX512)."""
    return _library().lanes


def decodes(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor | QuantizedStates,
    k_rope: torch.Tensor | QuantizedStates,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> bool:
    """Whether the kernel knows these shapes, dtypes and layouts."""
    dtype, tokens, rank, rope = q_nope.dtype, latent.shape[-2], latent.shape[-1], k_rope.shape[-1]
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    for x in (q_nope, q_rope, latent, k_rope, w_uk, w_uv):
        kind = dtype
        if is_quantized(x):
            kind, x = (torch.int8 if x.bits == 8 else torch.uint8), x.codes
        if x.dtype != kind or not x.is_cpu or x.stride(-1) != 1 or type(x) not in (torch.Tensor, torch.nn.Parameter):
            return False
    batch, heads, length, nope = q_nope.shape
    if (
        rank % 64
        or rope % 2
        or nope % 2
        or w_uv.shape[1] % 4
        or rank + rope > MOST_WIDTH
        or not tokens
        or not q_nope.numel()
    ):
        return False
    agree = (
        q_rope.shape == (batch, heads, length, rope)
        and latent.shape[0] == k_rope.shape[0] == batch
        and k_rope.shape[-2] == tokens
        and w_uk.shape == (heads, nope, rank)
        and (w_uv.shape[0], w_uv.shape[2]) == (heads, rank)
    )
    seen = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1 and mask.is_cpu)
    return agree and seen and (is_quantized(latent) or not is_quantized(k_rope))


def mla_decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor | QuantizedStates,
    k_rope: torch.Tensor | QuantizedStates,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The outputs `[B, H, S, v]` of [`absorbed_attention`], or of its quantised twin; for what [`decodes`] says yes to.

    Tensors are as there, latents `[B, T, c]` and rope keys `[B, T, r]`, or quantised `[B, 1, T, ...]`. A row that sees nothing is
    spread evenly.
    """
    (batch, heads, length, nope), tokens, rank = q_nope.shape, latent.shape[-2], latent.shape[-1]
    rope, value, threads, library = k_rope.shape[-1], w_uv.shape[1], torch.get_num_threads(), _library()
    bits, scales, pointers = [0, 0], [None, None], [None, None]
    if is_quantized(latent):
        for i, x in enumerate((latent, k_rope)):
            if is_quantized(x):
                bits[i], scales[i] = x.bits, x.multipliers(torch.float32).contiguous()
                pointers[i] = scales[i].data_ptr()
        latent, k_rope = ((x.codes if is_quantized(x) else x).squeeze(1) for x in (latent, k_rope))
    seen, mask_strides = None, (0, 0)
    if mask is not None:
        mask = mask.expand(batch, 1, length, tokens)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        seen, mask_strides = mask.data_ptr(), (mask.stride(0), mask.stride(2))
    out = torch.empty(batch, heads, length, value, dtype=q_nope.dtype, device="cpu")
    strides = (
        *q_nope.stride()[:3], *q_rope.stride()[:3], *latent.stride()[:2], *k_rope.stride()[:2], *w_uk.stride()[:2],
        *w_uv.stride()[:2], *mask_strides, out.stride(0),
    )  # fmt: skip
    all_states, all_weights = (q_nope, q_rope, out), (w_uk, w_uv)
    at_a_time = heads
    while True:  # fewer heads at a time, where all are too many for the memory that is kept
        padded = -(-at_a_time * length // library.lanes) * library.lanes
        splits = max(1, min(tokens // SPLIT, -(-4 * threads // (batch * -(-padded // 64)))))
        size = batch * (at_a_time * length * rank + padded * (rank + rope) + splits * padded * (rank + 2))
        if size <= HELD or at_a_time == 1:
            break
        at_a_time = -(-at_a_time // 2)
    room = scratch_pointer(size, torch.float32)
    for start in range(0, heads, at_a_time):
        if at_a_time < heads:
            here = slice(start, start + at_a_time)
            q_nope, q_rope, out = (x[:, here] for x in all_states)
            w_uk, w_uv = (x[here] for x in all_weights)
        shapes = _Shapes(
            batch, q_nope.shape[1], length, tokens, nope, rope, rank, value, *strides, *bits, splits, threads
        )
        of = _Tensors(
            q_nope.data_ptr(), q_rope.data_ptr(), latent.data_ptr(), k_rope.data_ptr(), w_uk.data_ptr(), w_uv.data_ptr(),
            *pointers, seen, out.data_ptr(), scaling,
        )  # fmt: skip
        library.mla_decode(shapes, of, room, q_nope.dtype == torch.bfloat16)
    return all_states[2]
