"""The hot operations, each as a plain reference and as the form that is used."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from .cpu_kernels import fp8_dequantize, fp8_product, fp8_products, kernels_available, kernels_loaded
from .hub_kernels import DECODES
from .quantized import QuantizedStates, is_quantized, read, rotate, space
from .triton_kernels import AVAILABLE, GROUP
from .triton_kernels import block_scaled_product as triton_block_scaled_product
from .triton_mla import AVAILABLE as DECODE_KERNEL
from .triton_mla import mla_decode

_ONEDNN = torch.backends.mkldnn.is_available()
SLOW_ON_CPU = {  # looked up once: torch.compile cannot ask
    dtype
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    if not (_ONEDNN and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
}
FP8_PRODUCT = "auto"  # or "kernel", "c", "dequantize": how a block-FP8 weight is multiplied; set it to choose
C_MIN_WEIGHTS = 2**20  # of a weight that is worth the second which a compiler takes, once per process
C_MAX_TOKENS = 8  # measured: up to 8 tokens the C product is faster than a matrix product of dequantised pieces
MLA_DECODE = "auto"  # or "kernel", "fa3", "flashinfer", "torch": how new tokens meet a cache; set it to choose
MLA_DECODE_MAX_QUERIES = 16  # by reasoning, not measured: more are bound by the products, which cuBLAS does as well
QUERY_BLOCK, SCORES = 64, 2**23  # queries that attend at a time, and how many scores they may have together
FEW_ROWS = 256  # heads times new tokens: measured, a CPU has their scores faster as [tokens, rows]
KEY_BLOCK = 4096  # latents at a time, where scores are too many for one block; half as many where they are converted
UPCAST_HEADS = 8  # whose weights are converted at a time
UPCAST_BLOCK = 1024  # tokens whose latents are converted at a time: their fp32 copy stays in the processor's cache


def absorbed_attention_reference(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in latent space, letter by letter (DeepSeek-V2 paper, section 2.1 and appendix C).

    Args:
        q_nope `[B, H, S, n]`, q_rope `[B, H, S, r]`: queries without and with (rotated) position.
        latent `[B, T, c]`, k_rope `[B, T, r]`: cached latents after their norm, and rotated shared keys.
        w_uk `[H, n, c]`, w_uv `[H, v, c]`: the key and value rows of `kv_b_proj`, per head.
        scaling: softmax scale.
        mask `[B or 1, H or 1, S, T]`: boolean (True attends) or additive; `None` lets every query see all T.

    Returns:
        outputs `[B, H, S, v]` and attention weights `[B, H, S, T]`, in the dtype of the queries.
    """
    q_latent = torch.einsum("bhsn,hnc->bhsc", q_nope, w_uk)
    scores = torch.einsum("bhsc,btc->bhst", q_latent, latent) + torch.einsum("bhsr,btr->bhst", q_rope, k_rope)
    probs = _masked_softmax(scores * scaling, mask).to(q_nope.dtype)
    context = torch.einsum("bhst,btc->bhsc", probs, latent)
    return torch.einsum("bhsc,hvc->bhsv", context, w_uv), probs


def absorbed_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`absorbed_attention_reference`], with the heads folded into the query axis: the latent is read once for all of them."""
    batch, heads, length, _ = q_nope.shape
    dtype, compute, block = q_nope.dtype, q_nope.dtype, latent.shape[1]
    if not has_fast_gemm(latent.device.type, dtype):
        compute, block = torch.float32, UPCAST_BLOCK
    q_latent = _per_head(cast(q_nope, compute), w_uk).reshape(batch, heads * length, -1)
    q_rope = cast(q_rope, compute).reshape(batch, heads * length, -1)
    blocks = list(zip(_split(latent, 1, block), _split(k_rope, 1, block), strict=True))
    scores = [_scores(q_latent, q_rope, *(cast(x, compute) for x in each), scaling) for each in blocks]
    scores = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    probs = cast(_masked_softmax(scores.view(batch, heads, length, -1), mask), compute)
    if dropout:
        probs = F.dropout(probs, p=dropout)
    pieces = zip(_split(probs.flatten(1, 2), 2, block), blocks, strict=True)
    context = functools.reduce(torch.add, (torch.bmm(piece, cast(latents, compute)) for piece, (latents, _) in pieces))
    context = context.view(batch, heads, length, -1)
    return cast(_per_head(context, w_uv.transpose(1, 2)), dtype), cast(probs, dtype)


def _scores(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Queries `[B, R, c]` and `[B, R, r]`, cache `[B, T, c]` and `[B, T, r]` -> `[B, R, T]`."""
    if q_rope.shape[1] > FEW_ROWS:
        rope = torch.bmm(q_rope, k_rope.transpose(1, 2))
        return torch.baddbmm(rope, q_latent, latent.transpose(1, 2), beta=scaling, alpha=scaling)
    rope = torch.bmm(k_rope, q_rope.transpose(1, 2))
    return torch.baddbmm(rope, latent, q_latent.transpose(1, 2), beta=scaling, alpha=scaling).transpose(1, 2)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, without asking PyTorch where nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def _split(x: torch.Tensor, dim: int, size: int) -> tuple[torch.Tensor, ...]:
    return (x,) if x.shape[dim] <= size else x.split(size, dim=dim)


def absorbed_attention_in_blocks(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The outputs of [`absorbed_attention`], where its scores would be too many: a block of latents meets both products.

    Every block has a softmax of its own, and their sums are weighed in the end. Scores lie as `[tokens, heads]`, which the matrix
    products of a CPU prefer. Not for gradients.
    """
    batch, heads, length, _ = q_nope.shape
    dtype = q_nope.dtype
    compute = dtype if has_fast_gemm(latent.device.type, dtype) else torch.float32
    sums = torch.promote_types(compute, torch.float32)
    q_latent = _per_head(cast(q_nope, compute), w_uk)
    q_latent, q_rope = (
        (x * scaling).reshape(batch, heads * length, -1).transpose(1, 2).contiguous()
        for x in (q_latent, cast(q_rope, compute))
    )
    found, block = [], _key_block(latent)
    for start in range(0, latent.shape[1], block):
        latents, keys = (cast(x[:, start : start + block], compute) for x in (latent, k_rope))
        scores = cast(torch.baddbmm(torch.bmm(keys, q_rope), latents, q_latent), sums)
        if mask is not None:
            seen = mask[..., start : start + block].permute(0, 3, 1, 2)
            scores = _masked(scores.view(batch, -1, heads, length), seen).flatten(2)
        largest = scores.amax(1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        context = torch.bmm(cast(weights, compute).transpose(1, 2), latents)
        found.append((largest[:, 0], weights.sum(1), cast(context, sums)))
    largest, totals, contexts = (torch.stack(each, dim=-1) for each in zip(*found, strict=True))
    shares = (largest - largest.amax(-1, keepdim=True)).exp()
    shares = shares / (totals * shares).sum(-1, keepdim=True)
    context = cast(torch.matmul(contexts, shares.unsqueeze(-1)).squeeze(-1), compute)
    context = context.view(batch, heads, length, -1)
    return cast(_per_head(context, w_uv.transpose(1, 2)), dtype)


def _key_block(latent: torch.Tensor) -> int:
    return KEY_BLOCK if has_fast_gemm(latent.device.type, latent.dtype) else KEY_BLOCK // 2


def blocked_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of a prefill on a CPU, a block of queries at a time against the keys up to it; for no gradients.

    PyTorch's own kernel leaves the fast path where keys and values differ in width. Where 16 bits are slow it runs in fp32.

    Args:
        query `[B, H, S, d]`, key `[B, H, T, d]`, value `[B, H, T, v]`.
        mask `[B or 1, H or 1, S, T]`: boolean (True attends); `None`: query i sees the first i + 1 keys.

    Returns:
        `[B, S, H, v]` in the dtype of the queries.
    """
    batch, heads, length, _ = query.shape
    keys, dtype = key.shape[2], query.dtype
    compute = dtype if has_fast_gemm(query.device.type, dtype) else torch.float32
    query, key, value = (cast(x, compute) for x in (query, key.transpose(2, 3), value))
    output = query.new_empty(batch, length, heads, value.shape[-1], dtype=dtype)
    step = max(16, min(QUERY_BLOCK, SCORES // (batch * heads * keys)))
    for start in range(0, length, step):
        end = min(start + step, length)
        seen = end if mask is None else keys
        if (
            seen <= query.shape[-1] and compute != torch.float16
        ):  # whose range ends at 65504: the fewer numbers are scaled
            scores = torch.matmul(query[:, :, start:end], key[..., :seen]).mul_(scaling)
        else:
            scores = torch.matmul(query[:, :, start:end] * scaling, key[..., :seen])
        if mask is None:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(hidden, float("-inf"))
            probs = scores.softmax(dim=-1, dtype=torch.promote_types(compute, torch.float32))
        else:
            probs = _masked_softmax(scores, mask[..., start:end, :])
        output[:, start:end] = torch.matmul(cast(probs, compute), value[:, :, :seen]).transpose(1, 2)
    return output


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
    """[`absorbed_attention`], in one Triton kernel for what [`decodes_in_kernel`] says yes to; `weights` says if they are wanted.

    Returns:
        outputs `[B, H, S, v]`, and attention weights `[B, H, S, T]` or `None`.
    """
    tensors = (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    if weights or dropout or not decodes_in_kernel(tensors, mask):
        many = latent.device.type == "cpu" and math.prod(q_nope.shape[:3]) * latent.shape[1] > SCORES
        if many and not (weights or dropout or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return absorbed_attention_in_blocks(*tensors, scaling, mask), None
        return absorbed_attention(*tensors, scaling, mask=mask, dropout=dropout)
    q_latent = _per_head(q_nope, w_uk)
    if MLA_DECODE in DECODES and mask is None and q_nope.shape[2] == 1:
        context = DECODES[MLA_DECODE](q_latent, q_rope, latent, k_rope, scaling)
    else:
        context = mla_decode(q_latent, q_rope, latent, k_rope, scaling, mask)
    return _per_head(context, w_uv.transpose(1, 2)), None


def decodes_in_kernel(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> bool:
    """Whether the attention of these queries, latents and weights runs in a kernel: by [`MLA_DECODE`].

    "auto" takes the Triton kernel for up to `MLA_DECODE_MAX_QUERIES` new tokens in 16 bits on NVIDIA GPUs from compute capability
    8.0 on. "fa3" takes Flash Attention 3 of the `kernels` package (Hopper), "flashinfer" FlashInfer, for one new token without a
    mask, and the Triton kernel for the rest; neither was run by us. Whatever was chosen, what needs gradients, runs under autocast,
    or has an additive mask or one per head takes the plain form.

    Raises:
        ValueError: for another `MLA_DECODE`, and for a kernel's name where there is none.
    """
    if MLA_DECODE not in ("auto", "kernel", *DECODES, "torch"):
        raise ValueError(f"MLA_DECODE is 'auto', 'kernel', 'fa3', 'flashinfer' or 'torch', got {MLA_DECODE!r}.")
    queries, device = tensors[0], tensors[2].device
    if MLA_DECODE == "auto" and device.type != "cuda":
        return False
    dtypes = {tensor.dtype for tensor in tensors}
    one_kind = len(dtypes) == 1 and dtypes < {torch.bfloat16, torch.float16, torch.float32}
    if MLA_DECODE in ("kernel", *DECODES) and not (DECODE_KERNEL and one_kind):
        raise ValueError(
            f"MLA_DECODE = {MLA_DECODE!r} wants Triton, and queries, latents and weights that are all bf16, fp16 or fp32, got "
            f"{', '.join(sorted(map(str, dtypes)))}: leave it at 'auto'."
        )
    if MLA_DECODE == "auto":
        fits = queries.shape[2] <= MLA_DECODE_MAX_QUERIES and queries.element_size() == 2
        if not (fits and one_kind and gpu_decodes_in_kernel(device)):
            return False
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    plain_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return MLA_DECODE != "torch" and plain_mask and not trains and not torch.is_autocast_enabled(device.type)


@torch.compiler.assume_constant_result
def gpu_decodes_in_kernel(device: torch.device) -> bool:
    """Whether `device` is a GPU that the decode kernel was written for, and Triton is there."""
    return DECODE_KERNEL and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def has_fast_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` are worth running as they are.

    A CPU without bf16 (fp16) instructions is many times slower at them than at converting to fp32 and back.
    """
    return device != "cpu" or dtype not in SLOW_ON_CPU


@torch.compiler.assume_constant_result
def gpu_wants_padded_values(
    device: torch.device, dtype: torch.dtype, keys: int, values: int, trains: bool, dropout: float
) -> bool:
    """Whether PyTorch's causal attention on this GPU is flash attention only where `values` wide values are padded to `keys`.

    PyTorch is asked: flash attention wants equal widths, cuDNN (on Hopper, from 9.11) takes 192 / 128 as it is. Without either it
    runs memory-efficient attention, which is slower (to be measured).
    """
    query = torch.empty(1, 1, 256, keys, dtype=dtype, device=device, requires_grad=trains)
    narrow = torch.empty(1, 1, 256, values, dtype=dtype, device=device, requires_grad=trains)
    ask = torch.backends.cuda
    as_it_is, padded = (ask.SDPAParams(query, query, value, None, dropout, True, False) for value in (narrow, query))
    if ask.can_use_flash_attention(as_it_is) or ask.can_use_cudnn_attention(as_it_is):
        return False
    return ask.can_use_flash_attention(padded)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` `[B, H, S, i]` times `weight` `[H, i, o]` -> `[B, H, S, o]` like `x`, one matrix product per head over all B * S rows."""
    batch, heads, length, _ = x.shape
    if weight.dtype != x.dtype:  # converted some heads at a time, which stay in the processor's cache
        pieces = zip(x.split(UPCAST_HEADS, dim=1), weight.split(UPCAST_HEADS), strict=True)
        return torch.cat([_per_head(own, held.to(x.dtype)) for own, held in pieces], dim=1)
    if batch == 1:
        return torch.bmm(x.squeeze(0), weight).unsqueeze(0)
    rows = torch.bmm(x.transpose(0, 1).reshape(heads, batch * length, -1), weight)
    return rows.view(heads, batch, length, -1).transpose(0, 1)


def _masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension in fp32. A row that sees nothing (a padded query) is spread evenly, never NaN."""
    return _masked(scores, mask).softmax(dim=-1)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores in fp32, the lowest number where the mask hides a key."""
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min)
    return scores


def absorbed_attention_quantized(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: QuantizedStates,
    k_rope: QuantizedStates | torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The outputs of [`absorbed_attention`] over latents `[B, 1, T, c]` and rope keys `[B, 1, T, r]` that stay quantised.

    Queries are rotated instead of what is cached, and scales meet scores and weights, so that a block of tokens only becomes
    numbers, once, for both products: the softmax is that of a running maximum. Not for gradients.
    """
    eight_bits = latent.bits == 8 and not is_quantized(k_rope)
    if eight_bits and decodes_in_kernel((q_nope, q_rope, k_rope, k_rope, w_uk, w_uv), mask):
        query, codes, scales = rotate(_per_head(q_nope, w_uk)), latent.codes, latent.multipliers(torch.float32)
        tensors = (cast(query, q_nope.dtype), q_rope, codes.squeeze(1), k_rope.squeeze(1))
        context = rotate(mla_decode(*tensors, scaling, mask, scales=scales.squeeze(1)))
        return _per_head(cast(context, q_nope.dtype), w_uv.transpose(1, 2))
    batch, heads, length, _ = q_nope.shape
    device, dtype, keys = q_nope.device, q_nope.dtype, latent.shape[2]
    compute = dtype if has_fast_gemm(device.type, dtype) else torch.float32
    sums = torch.promote_types(compute, torch.float32)
    held = (latent, k_rope)
    queries = (_per_head(cast(q_nope, compute), w_uk), q_rope)
    queries = [rotate(query) if is_quantized(x) else query for query, x in zip(queries, held, strict=True)]
    queries = [(query.to(sums) * scaling).to(compute).reshape(batch, heads * length, -1) for query in queries]
    scales = [x.multipliers(sums) if is_quantized(x) else None for x in held]
    block = min(keys, max(128, UPCAST_BLOCK // batch) if device.type == "cpu" else keys)
    rooms = space((batch * block * latent.shape[-1], batch * block * k_rope.shape[-1]), compute, device)
    largest = torch.full((batch, heads * length, 1), torch.finfo(sums).min, dtype=sums, device=device)
    total, context = torch.zeros_like(largest), torch.zeros(queries[0].shape, dtype=sums, device=device)
    for start in range(0, keys, block):
        here = slice(start, min(start + block, keys))
        numbers = [read(x, here, room) for x, room in zip(held, rooms, strict=True)]
        scores = 0
        for query, number, scale in zip(queries, numbers, scales, strict=True):
            part = torch.bmm(query, number.transpose(1, 2)).to(sums)
            scores = part + scores if scale is None else part.mul_(scale[..., here]).add_(scores)
        seen = None if mask is None else mask[..., here]
        scores = _masked(scores.view(batch, heads, length, -1), seen).flatten(1, 2)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, decay = (scores - largest).exp_(), (before - largest).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        weights = weights.mul_(scales[0][..., here]).to(compute)
        context = context * decay + torch.bmm(weights, numbers[0])
    context = rotate(context / total).to(compute).view(batch, heads, length, -1)
    return cast(_per_head(context, w_uv.transpose(1, 2)), dtype)


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
    if FP8_PRODUCT not in ("auto", "c") or torch.compiler.is_compiling() or type(weight.detach()) is not torch.Tensor:
        return False
    fits = weight.dtype == torch.float8_e4m3fn and weight.device.type == "cpu" and weight.stride(-1) == 1
    if FP8_PRODUCT == "c":
        if not kernels_available():
            raise ValueError("FP8_PRODUCT = 'c' wants a C compiler: install one, or leave it at 'auto'.")
        return fits
    return fits and weight.numel() >= at_least and kernels_available()


def multiplies_in_c(weight: torch.Tensor, tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens in `dtype` meet this FP8 weight, or one of a stack of them, in C."""
    return 0 < tokens <= C_MAX_TOKENS and dtype != torch.float64 and has_c_form(weight, C_MIN_WEIGHTS)


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
    rows = x.reshape(tokens, -1).float().contiguous()
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
    rows, scales = x.float().contiguous(), scales.float().contiguous()
    return fp8_products(rows, weights, scales, chosen, starts, block_size).to(x.dtype)


def dequantize_in_c(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], out: torch.Tensor) -> bool:
    """Writes the dequantised weight to `out`, rounded once, if it is one for C; bit by bit what fp8.py's plain form gives."""
    fits = out.dtype in (torch.float32, torch.bfloat16) and out.is_contiguous() and type(out) is torch.Tensor
    fits = fits and out.shape == weight.shape and tuple(scale.shape) == blocks_of(weight, block_size)
    if not fits or not has_c_form(weight, 1 if kernels_loaded() else C_MIN_WEIGHTS):
        return False
    fp8_dequantize(weight, scale.float().contiguous(), block_size, out)
    return True


def gpu_multiplies_fp8(device: torch.device | None = None) -> bool:
    """Whether the GPU `device` (the current one) has products of FP8, and Triton is there to use them."""
    return AVAILABLE and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)
