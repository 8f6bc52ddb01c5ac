"""The hot operations: one door for each, which chooses between its plain form and the kernels that there are for it."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from .cpu_kernels import (
    fp8_dequantize,
    fp8_product,
    kernels_available,
    kernels_loaded,
    multiplies_pairs,
    products,
)
from .cpu_mla import decode_available, decodes, vector_lanes
from .cpu_mla import mla_decode as cpu_mla_decode
from .dtypes import cast, has_fast_gemm, has_numbers, runs_as_it_is
from .hub_kernels import DECODES, present
from .plain_attention import (
    GPU_SCORES,
    SCORES,
    absorbed_attention,
    absorbed_attention_in_blocks,
    absorbed_attention_quantized,
    per_head,
)
from .quantized import QuantizedStates, is_quantized, rotate
from .trials import is_right, seconds, tried
from .triton_kernels import AVAILABLE, GROUP
from .triton_kernels import block_scaled_product as triton_block_scaled_product
from .triton_mla import AVAILABLE as DECODE_KERNEL
from .triton_mla import mla_decode

FP8_PRODUCT = "auto"  # or "kernel", "c", "dequantize": how a block-FP8 weight is multiplied; set it to choose
# Of a weight (for attention w_uk: 16 heads) that is worth the second which a compiler takes, once per process.
C_MIN_WEIGHTS = 2**20
C_MAX_TOKENS = 8  # measured: up to 8 tokens the C product is faster than a matrix product of dequantised pieces;
C_MAX_TOKENS_IN_PAIRS = 24  # and up to 24 in bf16 where the processor multiplies it
# How new tokens meet a cache, for you to set: "auto", "c" (on CPUs), "kernel", "fa3", "flashinfer", "flashmla" or "torch".
MLA_DECODE = "auto"
MLA_DECODE_TRIED = 2, 4000  # rows and tokens of the cache that kernels are tried with
MLA_DECODE_MARGIN = 0.9  # of the time of our kernel: another one that takes less is taken in its place
MLA_DECODE_MAX_QUERIES = 16  # by reasoning, not measured: more are bound by the products, which cuBLAS does as well


def attend_latents(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[`absorbed_attention`], or the kernel that [`decode_kernel`] names; `weights` says if they are wanted.

    Returns:
        outputs `[B, H, S, v]`, and attention weights `[B, H, S, T]` or `None`.
    """
    tensors = (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    kernel = None if weights or dropout else decode_kernel(tensors, mask)
    if kernel == "c":
        return cpu_mla_decode(*tensors, scaling, mask), None
    if kernel is None:
        most = SCORES if latent.device.type == "cpu" else GPU_SCORES
        many = math.prod(q_nope.shape[:3]) * latent.shape[1] > most
        if many and not (weights or dropout or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return absorbed_attention_in_blocks(*tensors, scaling, mask), None
        return absorbed_attention(*tensors, scaling, mask=mask, dropout=dropout)
    q_latent = per_head(q_nope, w_uk)
    if kernel in DECODES:
        context = DECODES[kernel](q_latent, q_rope, latent, k_rope, scaling)
    else:
        context = mla_decode(q_latent, q_rope, latent, k_rope, scaling, mask)
    return per_head(context, w_uv.transpose(1, 2)), None


def attend_quantized_latents(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: QuantizedStates,
    k_rope: QuantizedStates | torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`absorbed_attention_quantized`], in C, or, latents in 8 bits, in the Triton kernel, where [`decode_kernel`] names them."""
    states = (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    if latent.device.type == "cpu" and MLA_DECODE in ("auto", "c") and decodes_in_c(states, mask):
        return cpu_mla_decode(*states, scaling, mask)
    eight_bits = latent.bits == 8 and not is_quantized(k_rope)
    if eight_bits and decode_kernel((q_nope, q_rope, k_rope, k_rope, w_uk, w_uv), mask, quantized=True):
        query, codes, scales = rotate(per_head(q_nope, w_uk)), latent.codes, latent.multipliers(torch.float32)
        tensors = (cast(query, q_nope.dtype), q_rope, codes.squeeze(1), k_rope.squeeze(1))
        context = rotate(mla_decode(*tensors, scaling, mask, scales=scales.squeeze(1)))
        return per_head(cast(context, q_nope.dtype), w_uv.transpose(1, 2))
    return absorbed_attention_quantized(*states, scaling, mask)


def decode_kernel(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, quantized: bool = False) -> str | None:
    """Which kernel these queries, latents and weights attend in, by [`MLA_DECODE`]; `None` for the plain form.

    "auto" takes up to `MLA_DECODE_MAX_QUERIES` new tokens in 16 bits on NVIDIA GPUs from compute capability 8.0 on to the kernel
    that [`gpu_decodes`] has found right and fast there, and on CPUs what [`decodes_in_c`] says yes to to "c", which is for CPUs
    alone. "fa3" (Flash Attention 3 of the `kernels` package, for Hopper), "flashinfer" and "flashmla" (for Hopper) are for one
    new token without a mask; the rest goes to the Triton kernel, "kernel".
    Whatever was chosen, what needs gradients, runs under autocast, or has an additive mask or one per head takes the plain form.

    Raises:
        ValueError: for another `MLA_DECODE`, and for a kernel's name where there is none.
    """
    if MLA_DECODE not in ("auto", "c", "kernel", *DECODES, "torch"):
        kernels = ", ".join(map(repr, DECODES))
        raise ValueError(f"MLA_DECODE is 'auto', 'c', 'kernel', {kernels} or 'torch', got {MLA_DECODE!r}.")
    queries, device = tensors[0], tensors[2].device
    if MLA_DECODE == "c" or (MLA_DECODE == "auto" and device.type == "cpu"):
        return "c" if decodes_in_c(tensors, mask) else None
    if MLA_DECODE == "torch" or (MLA_DECODE == "auto" and device.type != "cuda"):
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    one_kind = len(dtypes) == 1 and dtypes < {torch.bfloat16, torch.float16, torch.float32}
    if MLA_DECODE != "auto" and not (DECODE_KERNEL and one_kind):
        raise ValueError(
            f"MLA_DECODE = {MLA_DECODE!r} wants Triton, and queries, latents and weights that are all bf16, fp16 or fp32, got "
            f"{', '.join(sorted(map(str, dtypes)))}: leave it at 'auto'."
        )
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    plain_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    if not plain_mask or trains or torch.is_autocast_enabled(device.type):
        return None
    names = MLA_DECODE, "kernel"
    if MLA_DECODE == "auto":
        if not one_kind or queries.element_size() != 2 or queries.shape[2] > MLA_DECODE_MAX_QUERIES:
            return None
        heads, _, rank = tensors[4].shape  # of a weight: torch.compile knows these numbers
        kind = (bool(queries.shape[2] > 1), mask is not None, quantized)
        names = gpu_decodes(device, queries.dtype, heads, rank, tensors[1].shape[3], *kind)
    elif quantized or mask is not None or queries.shape[2] > 1:
        names = ("kernel",)
    return names[0] if names else None


def decodes_in_c(tensors: tuple[torch.Tensor | QuantizedStates, ...], mask: torch.Tensor | None) -> bool:
    """Whether these meet in C: on x86 CPUs with AVX2 and a compiler, for no gradients, from 16 heads of DeepSeek-V2 on.

    Raises:
        ValueError: for `MLA_DECODE` "c" where there is no such kernel.
    """
    if MLA_DECODE == "auto" and tensors[4].numel() < C_MIN_WEIGHTS:
        return False
    if not runs_as_it_is():
        return False
    if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors):
        return False
    if MLA_DECODE == "c" and not decode_available():
        raise ValueError(
            "MLA_DECODE = 'c' wants an x86 CPU with AVX2 and a C compiler with OpenMP: leave it at 'auto'."
        )
    return decodes(*tensors, mask) and decode_available()


def cpu_absorbed_rate(dtype: torch.dtype, weights: int, keys: int, width: int, keeps_weights: bool) -> float:
    """Multiply-adds per second in latent space by those of the expanded form on this CPU: at least 1, measured.

    Args:
        weights: numbers in `w_uk`.
        keys, width: tokens, and numbers in the keys and values of each: once all leave the caches, expanding is slow.
        keeps_weights: of attention, which is for the plain form.
    """
    known = dtype in (torch.float32, torch.bfloat16) and (weights >= C_MIN_WEIGHTS or MLA_DECODE == "c")
    in_c = (
        MLA_DECODE in ("auto", "c") and known and not keeps_weights and runs_as_it_is() and not torch.is_grad_enabled()
    )
    if not in_c or not decode_available():
        return 1.2
    wide, beyond_caches = vector_lanes() == 16, keys * width * dtype.itemsize > 2**25
    if beyond_caches:
        return 2.0 if wide else 1.5
    if dtype == torch.bfloat16 and has_fast_gemm("cpu", dtype):
        return 1.25 if wide and keys >= 1024 else 1.0
    return 1.7 if wide else 1.0


@torch.compiler.assume_constant_result
def gpu_decodes(device: torch.device, *about) -> tuple[str, ...]:
    """Names of the kernels that decode on this GPU, the one to take first: [`try_decodes`], once for each kind of decoding."""
    if not DECODE_KERNEL or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return ()
    return tried(try_decodes, device, *about, unknown=("kernel",), failed=())


def try_decodes(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    rank: int,
    rope: int,
    several: bool = False,
    masked: bool = False,
    quantized: bool = False,
) -> tuple[str, ...]:
    """Names of the kernels that give on `device` what the plain form gives in fp32; the one to take first.

    That is ours, unless another one takes less than `MLA_DECODE_MARGIN` of its time (and never under deterministic algorithms,
    where a choice by time has no place). `several` new tokens, a mask, and latents in 8 bits are for ours alone.
    """
    generator = torch.Generator(device).manual_seed(0)
    (rows, tokens), queries = MLA_DECODE_TRIED, 3 if several else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    q_latent, q_rope = normal(rows, heads, queries, rank), normal(rows, heads, queries, rope)
    latent, k_rope = normal(rows, tokens, rank + rope).split((rank, rope), dim=-1)
    mask, scales, wide = None, None, latent.float()
    if masked:
        mask = torch.ones(rows, 1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
        mask[0, ..., : tokens // 3] = False
    if quantized:
        latent = (latent * 30).round().clamp(-127, 127).to(torch.int8)
        scales = torch.linspace(0.5, 1.5, tokens, device=device).repeat(rows, 1) / 30
        wide = latent.float() * scales[..., None]
    scaling = (rank + rope) ** -0.5
    scores = torch.einsum("bhsc,btc->bhst", q_latent.float(), wide)
    scores = (scores + torch.einsum("bhsr,btr->bhst", q_rope.float(), k_rope.float())) * scaling
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    expected = torch.einsum("bhst,btc->bhsc", scores.softmax(-1), wide)

    arguments = (q_latent, q_rope, latent, k_rope, scaling)
    forms = {"kernel": functools.partial(mla_decode, *arguments, mask, scales=scales)}
    if not (several or masked or quantized):
        forms |= {name: functools.partial(DECODES[name], *arguments) for name in present(device, rank, rope)}
    right = [name for name, call in forms.items() if is_right(f"The kernel {name!r} for MLA_DECODE", call, expected)]
    if len(right) < 2 or torch.are_deterministic_algorithms_enabled():
        return tuple(right)
    times = {name: seconds(forms[name], device) for name in right}
    first = min(right, key=lambda name: times[name] * (MLA_DECODE_MARGIN if name == "kernel" else 1))
    return first, *(name for name in right if name != first)


@torch.compiler.assume_constant_result
def gpu_wants_padded_values(
    device: torch.device, dtype: torch.dtype, keys: int, values: int, trains: bool, dropout: float
) -> bool:
    """Whether PyTorch's causal attention on this GPU is flash attention only where `values` wide values are padded to `keys`.

    PyTorch is asked what it would choose: flash attention wants equal widths, cuDNN takes 192 / 128 as it is, but is preferred on
    some GPUs only. Without either it runs memory-efficient attention, which is slower (to be measured).
    """
    query = torch.empty(1, 1, 256, keys, dtype=dtype, device=device, requires_grad=trains)
    narrow = torch.empty(1, 1, 256, values, dtype=dtype, device=device, requires_grad=trains)
    fast = [int(getattr(SDPBackend, name)) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION")]

    def takes_fast(value: torch.Tensor) -> bool:
        try:
            return torch._fused_sdp_choice(query, query, value, None, dropout, True) in fast
        except RuntimeError:  # none of the kernels that the user allows takes these
            return False

    return not takes_fast(narrow) and takes_fast(query)


def block_scaled_product_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], ue8m0: bool = False
) -> torch.Tensor:
    """`x` times a block-FP8 weight as in DeepSeek-V3's inference code: the activations are rounded to E4M3 too (report, 3.3.2).

    Args:
        x `[..., n]`: every 1 x 128 of it gets a scale, amax (at least 1e-4) / 448.
        weight `[m, n]` in FP8 with scales `[ceil(m / rows), ceil(n / columns)]` of `block_size`.
        ue8m0: rounds the scales of `x` up to a power of two, as in V3.1.

    Returns:
        `[..., m]` in the dtype of `x`, summed in fp32.
    """
    groups = -(-x.shape[-1] // GROUP)
    padded = F.pad(x.float(), (0, groups * GROUP - x.shape[-1])).unflatten(-1, (groups, GROUP))
    x_scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
    if ue8m0:
        mantissa, exponent = torch.frexp(x_scale)
        x_scale = torch.ldexp(torch.ones_like(x_scale), exponent - (mantissa == 0.5).int())
    rounded = ((padded / x_scale).to(torch.float8_e4m3fn).float() * x_scale).flatten(-2)[..., : x.shape[-1]]
    rows, columns = (
        torch.arange(size, device=x.device) // block for size, block in zip(weight.shape, block_size, strict=True)
    )
    return F.linear(rounded, weight.float() * scale.float()[rows][:, columns]).to(x.dtype)


def block_scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], ue8m0: bool = False
) -> torch.Tensor:
    """[`block_scaled_product_reference`] in one kernel, which multiplies in FP8; for what [`multiplies_fp8`] says yes to."""
    flat = x.reshape(-1, x.shape[-1])
    return triton_block_scaled_product(flat, weight, scale, block_size[0], ue8m0).view(*x.shape[:-1], weight.shape[0])


def multiplies_fp8(weight: torch.Tensor, block_size: tuple[int, int]) -> bool:
    """Whether a product with this FP8 weight runs in FP8: by [`FP8_PRODUCT`], on GPUs that can (compute capability 8.9).

    Raises:
        ValueError: for another `FP8_PRODUCT`, and for "kernel" where there is none.
    """
    if FP8_PRODUCT not in ("auto", "kernel", "c", "dequantize"):
        raise ValueError(f"FP8_PRODUCT is 'auto', 'kernel', 'c' or 'dequantize', got {FP8_PRODUCT!r}.")
    fits = AVAILABLE and weight.dtype == torch.float8_e4m3fn and block_size[1] == GROUP
    if FP8_PRODUCT == "kernel" and not fits:
        raise ValueError(
            f"FP8_PRODUCT = 'kernel' wants Triton and E4M3 weights with blocks of {GROUP} columns, got {weight.dtype} and "
            f"{tuple(block_size)}: leave it at 'auto'."
        )
    if FP8_PRODUCT != "auto":
        return FP8_PRODUCT == "kernel"
    return fits and weight.device.type == "cuda" and gpu_multiplies_fp8(weight.device)


def has_c_form(weight: torch.Tensor, at_least: int) -> bool:
    """Whether this FP8 weight is one for the C kernels: on a CPU, real (no tracing, no fake tensors), of that many elements.

    Raises:
        ValueError: for `FP8_PRODUCT` "c" where there is no compiler.
    """
    if FP8_PRODUCT not in ("auto", "c") or torch.compiler.is_compiling() or not has_numbers(weight):
        return False
    fits = weight.dtype == torch.float8_e4m3fn and weight.device.type == "cpu" and weight.stride(-1) == 1
    if FP8_PRODUCT == "c":
        if not kernels_available():
            raise ValueError("FP8_PRODUCT = 'c' wants a C compiler: install one, or leave it at 'auto'.")
        return fits
    return fits and weight.numel() >= at_least and kernels_available()


def multiplies_in_c(weight: torch.Tensor, tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens in `dtype` meet this FP8 weight, or one of a stack of them, in C."""
    if not 0 < tokens <= C_MAX_TOKENS_IN_PAIRS or dtype == torch.float64 or not has_c_form(weight, C_MIN_WEIGHTS):
        return False
    return tokens <= C_MAX_TOKENS or (dtype == torch.bfloat16 and multiplies_pairs())


def blocks_of(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[int, ...]:
    """Of a weight `[m, n]`: `(ceil(m / rows), ceil(n / columns))`, the last ones partial."""
    return tuple(-(-size // block) for size, block in zip(weight.shape, block_size, strict=True))


def dequantizing_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]
) -> torch.Tensor | None:
    """`x` `[..., n]` times the dequantised weight `[m, n]`, summed in fp32, in one pass over the weight; `[..., m]` like `x`.

    `None` where that is not the way to do it: elsewhere than on a CPU, for many tokens, for weights as [`has_c_form`] says.
    Its plain twin is `F.linear(x, dequantize(weight, scale, block_size))`, up to the order of the sums.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    if not multiplies_in_c(weight, tokens, x.dtype):
        return None
    if x.shape[-1] != weight.shape[1] or tuple(scale.shape) != blocks_of(weight, block_size):
        return None  # what is left to PyTorch says what is wrong
    rows = x.reshape(tokens, -1).contiguous()
    return fp8_product(rows, weight, scale.float().contiguous(), block_size).to(x.dtype).view(*x.shape[:-1], -1)


def dequantizing_products(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    chosen: list[int],
    starts: list[int],
    block_size: tuple[int, int],
) -> torch.Tensor | None:
    """[`dequantizing_product`] with several of the weights `[E, m, n]`, which `[E, ...]` scales belong to, in one call.

    Rows `starts[i]` to `starts[i + 1]` of `x` `[N, n]` meet `weights[chosen[i]]` -> `[N, m]`. `None` as there, and where one
    weight meets many tokens.
    """
    most = max((end - start for start, end in itertools.pairwise(starts)), default=0)
    if not multiplies_in_c(weights, most, x.dtype):
        return None
    expected = (len(weights), *blocks_of(weights[0], block_size))
    if x.shape[-1] != weights.shape[2] or tuple(scales.shape) != expected:
        return None
    if not set(chosen) <= set(range(len(weights))):
        return None
    return products(x.contiguous(), weights, chosen, starts, scales.float().contiguous(), block_size).to(x.dtype)


def dequantize_in_c(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], out: torch.Tensor) -> bool:
    """Writes the dequantised weight to `out`, rounded once, if it is one for C; bit by bit what fp8.py's plain form gives."""
    fits = out.dtype in (torch.float32, torch.bfloat16) and out.is_contiguous() and type(out) is torch.Tensor
    fits = fits and out.shape == weight.shape and tuple(scale.shape) == blocks_of(weight, block_size)
    if not fits or not has_c_form(weight, 1 if kernels_loaded() else C_MIN_WEIGHTS):
        return False
    fp8_dequantize(weight, scale.float().contiguous(), block_size, out)
    return True


@torch.compiler.assume_constant_result
def gpu_multiplies_fp8(device: torch.device | None = None) -> bool:
    """Whether the GPU `device` (the current one) has products of FP8, and our kernel for them is right there, by a trial."""
    if not AVAILABLE or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    return tried(try_fp8_product, device, unknown=True, failed=False)


def try_fp8_product(device: torch.device) -> bool:
    """Whether the Triton product gives on `device` what its reference gives, for one token and for many."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(320, 384, device=device, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, device=device, generator=generator) + 0.5
    right = True
    for tokens in (1, 200):
        x = torch.randn(tokens, 384, dtype=torch.bfloat16, device=device, generator=generator)
        expected = block_scaled_product_reference(x.float(), weight, scale, (GROUP, GROUP))
        call = functools.partial(block_scaled_product, x, weight, scale, (GROUP, GROUP))
        right = right and is_right("The block-FP8 product", call, expected)
    return right
