"""Attention in latent space and of a prefill in plain PyTorch: as a reference, and in the forms that suit a CPU. `ops` chooses."""

import functools

import torch
import torch.nn.functional as F

from .dtypes import cast, has_fast_gemm
from .quantized import QuantizedStates, is_quantized, read, rotate, space

QUERY_BLOCK, SCORES = 128, 2**23  # queries that attend at a time, and how many scores they may have together on a CPU
GPU_SCORES = 2**27  # likewise: half a GB of them, some times over (by reasoning)
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
    q_latent = per_head(cast(q_nope, compute), w_uk).reshape(batch, heads * length, -1)
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
    return cast(per_head(context, w_uv.transpose(1, 2)), dtype), cast(probs, dtype)


def _scores(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Queries `[B, R, c]` and `[B, R, r]`, cache `[B, T, c]` and `[B, T, r]` -> `[B, R, T]`."""
    if q_rope.shape[1] > FEW_ROWS:
        rope = torch.bmm(q_rope, k_rope.transpose(1, 2))
        return torch.baddbmm(rope, q_latent, latent.transpose(1, 2), beta=scaling, alpha=scaling)
    rope = torch.bmm(k_rope, q_rope.transpose(1, 2))
    return torch.baddbmm(rope, latent, q_latent.transpose(1, 2), beta=scaling, alpha=scaling).transpose(1, 2)


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
    q_latent = per_head(cast(q_nope, compute), w_uk)
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
    return cast(per_head(context, w_uv.transpose(1, 2)), dtype)


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
    step = min(length, max(16, min(QUERY_BLOCK, SCORES // max(1, batch * heads * keys)))) or 1
    if mask is None:  # the most that a score may be
        later = torch.ones(step, step, dtype=torch.bool, device=query.device).triu_(1)
        bounds = query.new_full((step, step), float("inf")).masked_fill_(later, float("-inf"))
    for start in range(0, length, step):
        end = min(start + step, length)
        own = None if mask is None else mask[..., start:end, :]
        first, seen = (start, end) if mask is None else _bounds(own)
        # of the two, the fewer numbers are scaled; fp16 ends at 65504
        if seen <= query.shape[-1] and compute != torch.float16:
            scores = torch.matmul(query[:, :, start:end], key[..., :seen]).mul_(scaling)
        else:
            scores = torch.matmul(query[:, :, start:end] * scaling, key[..., :seen])
        if mask is None:
            own = scores[..., first:]  # a quarter of the time of masked_fill_
            torch.minimum(own, bounds[: end - start, : end - start], out=own)
        else:  # the lowest number, not -inf: a row that sees nothing is spread evenly, never NaN
            scores = scores.float() if compute == torch.float16 else scores
            scores[..., first:].masked_fill_(~own[..., first:seen], torch.finfo(scores.dtype).min)
        probs = cast(scores.softmax(dim=-1), compute)  # within itself in fp32, whatever the dtype
        output[:, start:end] = torch.matmul(probs, value[:, :, :seen]).transpose(1, 2)
    return output


def _bounds(mask: torch.Tensor) -> tuple[int, int]:
    """The first key that some query does not see, and the end of those that any sees: all, where a query sees none."""
    rows = mask.flatten(0, -2)
    hidden, seen = (~rows.all(0)).nonzero(), rows.any(0).nonzero()
    keys = mask.shape[-1]
    return int(hidden[0]) if len(hidden) else keys, int(seen[-1]) + 1 if rows.any(1).all() else keys


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
    queries = (per_head(cast(q_nope, compute), w_uk), q_rope)
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
    return cast(per_head(context, w_uv.transpose(1, 2)), dtype)


def per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` `[B, H, S, i]` times `weight` `[H, i, o]` -> `[B, H, S, o]` like `x`, one matrix product per head over all B * S rows."""
    batch, heads, length, _ = x.shape
    if weight.dtype != x.dtype:  # converted some heads at a time, which stay in the processor's cache
        pieces = zip(x.split(UPCAST_HEADS, dim=1), weight.split(UPCAST_HEADS), strict=True)
        return torch.cat([per_head(own, held.to(x.dtype)) for own, held in pieces], dim=1)
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
