"""The hot operations, each as a plain reference and as the form that is used."""

import torch
import torch.nn.functional as F

from .quantized import QuantizedStates, is_quantized, read, rotate, space
from .triton_kernels import AVAILABLE, GROUP
from .triton_kernels import block_scaled_product as triton_block_scaled_product

_ONEDNN = torch.backends.mkldnn.is_available()
SLOW_ON_CPU = {  # looked up once: torch.compile cannot ask
    dtype
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    if not (_ONEDNN and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
}
FP8_PRODUCT = "auto"  # or "kernel", "dequantize": how a block-FP8 weight is multiplied; set it to choose
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
    q_latent = _per_head(q_nope.to(compute), w_uk.to(compute)).reshape(batch, heads * length, -1)
    q_rope = q_rope.to(compute).reshape(batch, heads * length, -1)
    scores = [
        torch.baddbmm(
            torch.bmm(q_rope, keys.to(compute).transpose(1, 2)),
            q_latent,
            latents.to(compute).transpose(1, 2),
            beta=scaling,
            alpha=scaling,
        )
        for latents, keys in zip(latent.split(block, dim=1), k_rope.split(block, dim=1), strict=True)
    ]
    scores = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    probs = _masked_softmax(scores.view(batch, heads, length, -1), mask).to(compute)
    if dropout:
        probs = F.dropout(probs, p=dropout)
    pieces = zip(probs.flatten(1, 2).split(block, dim=-1), latent.split(block, dim=1), strict=True)
    context = sum(torch.bmm(piece, latents.to(compute)) for piece, latents in pieces).view(batch, heads, length, -1)
    return _per_head(context, w_uv.to(compute).transpose(1, 2)).to(dtype), probs.to(dtype)


def has_fast_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` are worth running as they are.

    A CPU without bf16 (fp16) instructions is many times slower at them than at converting to fp32 and back.
    """
    return device != "cpu" or dtype not in SLOW_ON_CPU


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` `[B, H, S, i]` times `weight` `[H, i, o]` -> `[B, H, S, o]`, one matrix product per head over all B * S rows."""
    batch, heads, length, _ = x.shape
    rows = torch.bmm(x.transpose(0, 1).reshape(heads, batch * length, -1), weight)
    return rows.view(heads, batch, length, -1).transpose(0, 1)


def _masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension in fp32. A row that sees nothing (a padded query) is spread evenly, never NaN."""
    return _masked(scores, mask).softmax(dim=-1)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores in fp32, the lowest number where the mask hides a key."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
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
    batch, heads, length, _ = q_nope.shape
    device, dtype, keys = q_nope.device, q_nope.dtype, latent.shape[2]
    compute = dtype if has_fast_gemm(device.type, dtype) else torch.float32
    sums = torch.promote_types(compute, torch.float32)
    held = (latent, k_rope)
    queries = (_per_head(q_nope.to(compute), w_uk.to(compute)), q_rope)
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
    return _per_head(context, w_uv.to(compute).transpose(1, 2)).to(dtype)


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
    if FP8_PRODUCT not in ("auto", "kernel", "dequantize"):
        raise ValueError(f"FP8_PRODUCT is 'auto', 'kernel' or 'dequantize', got {FP8_PRODUCT!r}.")
    fits = AVAILABLE and weight.dtype == torch.float8_e4m3fn and block_size[1] == GROUP
    if FP8_PRODUCT == "kernel" and not fits:
        raise ValueError(
            f"FP8_PRODUCT = 'kernel' wants Triton and E4M3 weights with blocks of {GROUP} columns, got {weight.dtype} and "
            f"{tuple(block_size)}: leave it at 'auto'."
        )
    if FP8_PRODUCT != "auto":
        return FP8_PRODUCT == "kernel"
    return fits and weight.device.type == "cuda" and gpu_multiplies_fp8(weight.device)


def gpu_multiplies_fp8(device: torch.device | None = None) -> bool:
    """Whether the GPU `device` (the current one) has products of FP8, and Triton is there to use them."""
    return AVAILABLE and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)
