"""Latent attention of a few new tokens in Triton, which only `ops` calls: the cache is cut into pieces (split-KV, as in
Flash-Decoding), and every latent that is read serves all rows of a tile, 16 to 64 heads, as key and as value.

Where Triton is not installed the module still imports, and `AVAILABLE` is False.
"""

from types import SimpleNamespace

import torch

from .triton_kernels import ceil_div

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
except ImportError:
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=lambda value: value)
    OutOfResources = ()

AVAILABLE = hasattr(triton, "cdiv")
LOG2_E = 1.4426950408889634
HIDDEN = tl.constexpr(-3.4028234663852886e38)  # score of what a mask hides: a row that sees nothing is spread evenly

# Query rows (heads times new tokens) of a tile -> warps, then tokens of a block and buffers of latents, best first: the first pair
# that fits the GPU's shared memory is taken. Chosen by reasoning and by what ptxas says for sm_90 (registers, spills, shared
# memory, what is in flight while products run), not yet by measurement: benchmarks/gpu_decode.py --sweep does that.
# Hopper's wgmma wants 64 rows. 16 heads are the narrow side of scores [64 TOKENS, ROWS], so that nothing is padded; 64 rows are the
# long side of [ROWS, TOKENS]. An H100 gives a block of threads 227 KiB. 16 heads, bf16, 512 + 64: queries 16 x 576 x 2 B = 18 KiB,
# a buffer of 64 latents 64 x 512 x 2 B = 64 KiB, their rope keys 8 KiB, weights 2 KiB: with three buffers 220 KiB, and while one
# is multiplied (2.2 MFLOP: about 0.5 us at half of a processor's rate) the next is read (2.9 us at 1 / 132 of 3.35 TB/s): reading
# binds. Two buffers are too few: Triton asks for the next block after the products. The rope keys have no third buffer to fit in,
# and are asked for by hand, one block ahead. 64 rows: 72 + 4 x 32 + 4 + 4 = 208 KiB.
_TILES = {
    16: (4, ((64, 3), (64, 2), (32, 2), (16, 2), (16, 1))),
    64: (8, ((32, 4), (32, 3), (32, 2), (16, 2), (16, 1))),
}
MIN_BLOCKS = 2  # of a split: a shorter one costs as much to combine as to read
MAX_SPLITS = 256
SCAN = 16  # blocks whose mask is looked at together
COMBINED = 8192  # partial results that a program adds up: 64 registers per thread
_too_large: set[tuple] = set()  # tiles for which Triton wanted more than was reckoned, which its version decides


@triton.jit
def _dot(left, right, total, UPCAST: tl.constexpr):
    """`total + left @ right` in fp32, without TF32. Triton's interpreter multiplies the bits of bf16: there it needs UPCAST."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc=total, input_precision="ieee")


@triton.jit
def _attend_split(
    q_latent,
    q_rope,
    latent,
    k_rope,
    scales,
    mask,
    starts,
    ends,
    contexts,
    highs,
    totals,
    heads,
    queries,
    length,
    scaling_log2,
    q_latent_b,
    q_latent_h,
    q_latent_s,
    q_rope_b,
    q_rope_h,
    q_rope_s,
    latent_b,
    latent_t,
    k_rope_b,
    k_rope_t,
    scales_b,
    scales_t,
    mask_b,
    mask_s,
    mask_t,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ONE: tl.constexpr,
    SCALED: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """ROWS rows of queries against every `splits`-th block of tokens: weighted sums, their weights' totals and maxima."""
    split, splits, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < heads * queries
    head, query = row // queries, row % queries
    rank, rope, place = tl.arange(0, RANK_TILE), tl.arange(0, ROPE_TILE), tl.arange(0, TOKENS)
    batch64 = batch.to(tl.int64)

    q_latent += batch64 * q_latent_b + head * q_latent_h + query * q_latent_s
    q_rope += batch64 * q_rope_b + head * q_rope_h + query * q_rope_s
    if ROWS_FIRST:
        content = tl.load(q_latent[:, None] + rank[None, :], mask=(rank < RANK)[None, :] & real[:, None], other=0.0)
        position = tl.load(q_rope[:, None] + rope[None, :], mask=(rope < ROPE)[None, :] & real[:, None], other=0.0)
        context = tl.zeros((ROWS, RANK_TILE), dtype=tl.float32)
    else:
        content = tl.load(q_latent[None, :] + rank[:, None], mask=(rank < RANK)[:, None] & real[None, :], other=0.0)
        position = tl.load(q_rope[None, :] + rope[:, None], mask=(rope < ROPE)[:, None] & real[None, :], other=0.0)
        context = tl.zeros((RANK_TILE, ROWS), dtype=tl.float32)

    start, end = 0, length
    if STARTS:
        start = tl.maximum(tl.load(starts + batch), 0)
    if ENDS:
        end = tl.minimum(tl.load(ends + batch), length)
    blocks = tl.cdiv(tl.maximum(end - start, 0), TOKENS)
    first, past = (
        0,
        tl.cdiv(tl.maximum(blocks - split, 0), splits),
    )  # of this split: its i-th block is number i * splits + split
    if MASKED:
        mask += batch64 * mask_b
        count, first, past = past, past, 0
        for begin in range(0, count, SCAN):  # the blocks at both ends of which nothing is seen are not read
            mine = begin + tl.arange(0, SCAN)
            token = start + (mine * splits + split)[:, None] * TOKENS + place[None, :]
            seen = tl.zeros((SCAN, TOKENS), dtype=tl.int1)
            for each in range(queries):
                values = tl.load(
                    mask + each * mask_s + token.to(tl.int64) * mask_t,
                    mask=(mine < count)[:, None] & (token < end),
                    other=0,
                )
                seen = seen | (values != 0)
            any_seen = tl.max(seen.to(tl.int32), axis=1) > 0
            first = tl.minimum(first, tl.min(tl.where(any_seen, mine, count)))
            past = tl.maximum(past, tl.max(tl.where(any_seen, mine + 1, 0)))

    latent += batch64 * latent_b
    k_rope += batch64 * k_rope_b
    high = tl.full((ROWS,), HIDDEN, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    next_begin = start + (first * splits + split) * TOKENS
    keys = tl.load(
        k_rope + next_begin.to(tl.int64) * k_rope_t + (place[:, None] * k_rope_t + rope[None, :]),
        mask=(next_begin + place < end)[:, None] & (rope < ROPE)[None, :],
        other=0.0,
    )
    for mine in tl.range(first, past, num_stages=STAGES):
        begin = start + (mine * splits + split) * TOKENS
        begin64 = begin.to(tl.int64)  # 128k tokens of 32 rows are more elements than int32 counts
        inside = begin + place < end
        if MASKED:  # asked for early, to arrive while the products run
            seen = mask + begin64 * mask_t
            if ONE:
                seen = tl.load(seen + place * mask_t, mask=inside, other=0)[:, None]
            else:
                visible = real[None, :] & inside[:, None]
                seen = tl.load(seen + (place[:, None] * mask_t + query[None, :] * mask_s), mask=visible, other=0)
        latents = tl.load(
            latent + begin64 * latent_t + (place[:, None] * latent_t + rank[None, :]),
            mask=inside[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        if SCALED:
            latents = latents.to(tl.float32 if UPCAST else content.dtype)
            scale = tl.load(scales + batch64 * scales_b + begin64 * scales_t + place * scales_t, mask=inside, other=0.0)
        if ROWS_FIRST:
            scores = _dot(content, tl.trans(latents), tl.zeros((ROWS, TOKENS), dtype=tl.float32), UPCAST)
            if SCALED:
                scores *= scale[None, :]
            scores = tl.trans(_dot(position, tl.trans(keys), scores, UPCAST))  # a name for other axes: nothing moves
        else:
            scores = _dot(latents, content, tl.zeros((TOKENS, ROWS), dtype=tl.float32), UPCAST)
            if SCALED:
                scores *= scale[:, None]
            scores = _dot(keys, position, scores, UPCAST)
        scores *= scaling_log2
        next_begin = begin + splits * TOKENS
        keys = tl.load(
            k_rope + next_begin.to(tl.int64) * k_rope_t + (place[:, None] * k_rope_t + rope[None, :]),
            mask=(next_begin + place < end)[:, None] & (rope < ROPE)[None, :],
            other=0.0,
        )
        if MASKED:
            scores = tl.where(seen != 0, scores, HIDDEN)
        if CAUSAL:
            scores = tl.where((begin + place)[:, None] <= (end - queries + query)[None, :], scores, HIDDEN)
        scores = tl.where(inside[:, None], scores, float("-inf"))

        higher = tl.maximum(high, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher[None, :])
        fading = tl.exp2(high - higher)
        total = total * fading + tl.sum(weights, axis=0)
        if SCALED:
            weights *= scale[:, None]
        weights = weights.to(content.dtype)
        if ROWS_FIRST:
            context = _dot(tl.trans(weights), latents, context * fading[:, None], UPCAST)
        else:
            context = _dot(tl.trans(latents), weights, context * fading[None, :], UPCAST)
        high = higher

    if ROWS_FIRST:
        context = tl.trans(context)
    result = (batch64 * splits + split) * (heads * queries) + row
    tl.store(contexts + result[None, :] * RANK + rank[:, None], context, mask=(rank < RANK)[:, None] & real[None, :])
    tl.store(highs + result, high, mask=real)
    tl.store(totals + result, total, mask=real)


@triton.jit
def _combine_splits(
    contexts,
    highs,
    totals,
    output,
    rows,
    queries,
    splits,
    output_b,
    output_h,
    output_s,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS of the context of one row: the splits' sums, brought to one maximum, over their total. No token gives zeros."""
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = (batch * splits + split) * rows + row
    high = tl.load(highs + place, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(high - tl.max(high, axis=0))
    total = tl.sum(weight * tl.load(totals + place, mask=split < splits, other=0.0), axis=0)
    inside = (split < splits)[:, None] & (column < RANK)[None, :]
    sums = tl.load(contexts + place[:, None] * RANK + column[None, :], mask=inside, other=0.0)
    context = tl.sum(sums * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    head, query = row // queries, row % queries
    tl.store(
        output + batch * output_b + head.to(tl.int64) * output_h + query * output_s + column,
        context.to(output.dtype.element_ty),
        mask=column < RANK,
    )


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention in latent space from absorbed queries on: softmax in fp32, products in the dtype of the queries.

    The shapes alone decide what is launched, and nothing waits for the GPU: CUDA graphs may record it.

    Args:
        q_latent `[B, H, S, c]`, q_rope `[B, H, S, r]`: queries, the first times `w_uk`. bf16, fp16 or fp32 (then without TF32).
        latent `[B, T, c]`, k_rope `[B, T, r]`: the cache, or views of it with any strides of rows and tokens, in that dtype.
        scaling: softmax scale.
        mask `[B or 1, 1, S or 1, T]`: boolean, True attends. Blocks at both ends that it hides from all are not read.
        causal: query s sees the tokens up to `end - S + s`.
        starts, ends `[B]`: int32, the slots that row b holds tokens in; from 0 and to T where they are missing.
        scales `[B, T]`: fp32 scale of each latent, which is then FP8 (E4M3) or int8.
        splits: pieces that the tokens are cut into; by default as many as keep the GPU busy.

    Returns:
        `[B, H, S, c]` in the dtype of the queries. A query that sees nothing gets the mean of the latents that its splits read, as
        in `absorbed_attention_reference`, or zeros where none was read; never NaN.
    """
    if latent.is_cuda and latent.device.index != torch.cuda.current_device():
        with torch.cuda.device(latent.device):  # where Triton launches
            return mla_decode(q_latent, q_rope, latent, k_rope, scaling, mask, causal, starts, ends, scales, splits)
    (batch, heads, queries, rank), length, rope = q_latent.shape, latent.shape[1], q_rope.shape[-1]
    q_latent, q_rope, latent, k_rope = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, latent, k_rope)
    )
    processors, shared = _device(latent.device)
    rank_tile, rope_tile = (max(16, _power_of_2(width)) for width in (rank, rope))
    item = q_latent.element_size()
    wanted = (heads * queries, rank_tile, rope_tile, item, shared, scales is not None)
    tile = rows, tokens, stages, warps = _tile(*wanted)
    row_blocks = ceil_div(heads * queries, rows)
    given = splits
    if splits is None:
        splits = _splits(batch * row_blocks, ceil_div(length, tokens), processors)
    if mask is not None:
        mask = mask.expand(batch, 1, queries, length).view(torch.uint8)

    contexts = latent.new_empty((batch, splits, heads * queries, rank), dtype=torch.float32)
    highs, totals = (latent.new_empty(contexts.shape[:3], dtype=torch.float32) for _ in range(2))
    output = q_latent.new_empty((heads, batch, queries, rank)).transpose(0, 1)  # as the product with w_uv reads it
    try:
        _attend_split[row_blocks, splits, batch](
            q_latent,
            q_rope,
            latent,
            k_rope,
            scales,
            mask,
            starts,
            ends,
            contexts,
            highs,
            totals,
            heads,
            queries,
            length,
            scaling * LOG2_E,
            *q_latent.stride()[:3],
            *q_rope.stride()[:3],
            *latent.stride()[:2],
            *k_rope.stride()[:2],
            *((0, 0) if scales is None else scales.stride()),
            *((0, 0, 0) if mask is None else (mask.stride(0), mask.stride(2), mask.stride(3))),
            RANK=rank,
            ROPE=rope,
            RANK_TILE=rank_tile,
            ROPE_TILE=rope_tile,
            ROWS=rows,
            TOKENS=tokens,
            STAGES=stages,
            SCAN=SCAN,
            CAUSAL=causal,
            MASKED=mask is not None,
            ONE=queries == 1,
            SCALED=scales is not None,
            STARTS=starts is not None,
            ENDS=ends is not None,
            ROWS_FIRST=rows >= 64,
            UPCAST=not latent.is_cuda,
            num_warps=warps if scales is None else 8,  # which converts the latents in registers
        )
    except OutOfResources:
        _too_large.add((tile, *wanted[1:]))
        return mla_decode(q_latent, q_rope, latent, k_rope, scaling, mask, causal, starts, ends, scales, given)
    pieces = _power_of_2(splits)
    columns = min(rank_tile, COMBINED // pieces)
    _combine_splits[heads * queries, ceil_div(rank, columns), batch](
        contexts,
        highs,
        totals,
        output,
        heads * queries,
        queries,
        splits,
        *output.stride()[:3],
        RANK=rank,
        SPLITS=pieces,
        COLUMNS=columns,
    )
    return output


def _power_of_2(number: int) -> int:
    """The next one. Triton's own cannot be traced by torch.compile."""
    return 1 << (number - 1).bit_length()


@torch.compiler.assume_constant_result
def _device(device: torch.device) -> tuple[int, int]:
    """Processors and the bytes of shared memory that one block of threads may have; an H100's for the interpreter."""
    if device.type != "cuda":
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _tile(rows: int, rank: int, rope: int, item: int, shared: int, scaled: bool = False) -> tuple[int, int, int, int]:
    """Rows, tokens, stages and warps of a tile for `rows` rows of queries; `rank` and `rope` items wide, as the latents are."""
    for tile in (16,) if rows <= 16 else (64, 16):
        warps, blocks = _TILES[tile]
        for tokens, stages in blocks:
            found = tile, tokens, stages, warps
            fits = item * (tile * (rank + rope) + tokens * (stages * rank + rope + tile)) <= shared
            if fits and (found, rank, rope, item, shared, scaled) not in _too_large:
                return found
    raise ValueError(f"Latents of {rank} + {rope} items do not fit the {shared} bytes of this GPU's shared memory.")


def _splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many the tokens are cut for `programs` row blocks of the batch: rounds of the GPU that are as good as full."""
    most = max(1, min(MAX_SPLITS, blocks // MIN_BLOCKS))
    best, filled = 1, 0.0
    for rounds in range(1, 9):
        splits = min(most, max(1, rounds * processors // programs))
        share = splits * programs / (ceil_div(splits * programs, processors) * processors)
        if share > filled + 0.05:  # more rounds are more to combine
            best, filled = splits, share
    return best
