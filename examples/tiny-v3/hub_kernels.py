"""Kernels that others have written for attention in latent space; for `ops` alone. None of them was run by us."""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

FLASH_ATTENTION_3 = (
    "kernels-community/flash-attn3"  # takes the rope part as the head, and 512 more query columns beside it
)
FLASHINFER_WORKSPACE = 128 * 2**20  # bytes, as its documentation recommends
ALIGNED = 16  # bytes, which these kernels read at a time
FLASHMLA_PAGE = 64  # tokens; it takes no other


@functools.cache
def _flash_attention_3() -> Callable:
    from transformers.integrations.hub_kernels import get_kernel

    return get_kernel(FLASH_ATTENTION_3, version=1).flash_attn_with_kvcache


def fa3_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one new token over all of its cache, for Hopper GPUs in bf16 or fp16, by the `kernels` package.

    Args:
        q_latent `[B, H, 1, c]`, q_rope `[B, H, 1, r]`: queries, the first times `w_uk`.
        latent `[B, T, c]`, k_rope `[B, T, r]`: the cache, or views of it.
        scaling: softmax scale.

    Returns:
        `[B, H, 1, c]`.

    Raises:
        ImportError: without the `kernels` package.
    """
    q_latent, q_rope = q_latent.transpose(1, 2), q_rope.transpose(1, 2)
    keys, values = k_rope.unsqueeze(2), latent.unsqueeze(2)  # one head
    output = _flash_attention_3()(q_rope, keys, values, qv=q_latent, softmax_scale=scaling)
    return output.transpose(1, 2)


class _Planned:
    """FlashInfer's wrapper on one device, and what it was planned for: a plan serves all layers of a step."""

    def __init__(self, device: torch.device):
        try:
            from flashinfer.mla import BatchMLAPagedAttentionWrapper
        except ImportError as error:
            raise ImportError("MLA_DECODE = 'flashinfer' wants the package flashinfer-python: install it.") from error
        self.wrapper = BatchMLAPagedAttentionWrapper(
            torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
        )
        self.plan = None


_planned = functools.cache(_Planned)


@torch.compiler.disable
def flashinfer_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As [`fa3_decode`], by FlashInfer's `BatchMLAPagedAttentionWrapper`, to which every token of the cache is a page.

    Raises:
        ImportError: without the package `flashinfer-python`.
    """
    (batch, heads, _, rank), length, rope, device = q_latent.shape, latent.shape[1], q_rope.shape[-1], latent.device
    rows = {_tokens_per_row(x) for x in (latent, k_rope)}
    if None in rows or len(rows) > 1:
        latent, k_rope, rows = latent.contiguous(), k_rope.contiguous(), {length}
    (rows,) = rows
    planned = _planned(device)
    plan = (batch, length, rows, heads, rank, rope, scaling, q_latent.dtype)
    if planned.plan != plan:
        one_each = torch.arange(batch + 1, dtype=torch.int32)
        tokens = torch.arange(batch, device=device)[:, None] * rows + torch.arange(length, device=device)
        planned.wrapper.plan(
            qo_indptr=one_each,
            kv_indptr=one_each * length,
            kv_indices=tokens.flatten().int(),
            kv_len_arr=torch.full((batch,), length, dtype=torch.int32),
            num_heads=heads,
            head_dim_ckv=rank,
            head_dim_kpe=rope,
            page_size=1,
            causal=False,
            sm_scale=scaling,
            q_data_type=q_latent.dtype,
            kv_data_type=latent.dtype,
        )
        planned.plan = plan
    pages = (batch - 1) * rows + length
    ckv, kpe = (x.as_strided((pages, 1, x.shape[2]), (x.stride(1), x.stride(1), 1)) for x in (latent, k_rope))
    q_latent, q_rope = (x.squeeze(2).contiguous() for x in (q_latent, q_rope))
    output = planned.wrapper.run(q_nope=q_latent, q_pe=q_rope, ckv_cache=ckv, kpe_cache=kpe)
    return output.unsqueeze(2)


def _tokens_per_row(held: torch.Tensor) -> int | None:
    """Tokens from one row of `[B, T, n]` to the next, if FlashInfer can read them where they lie."""
    row, token, element = held.stride()
    if element != 1 or token == 0 or not _is_aligned(held):
        return None
    if held.shape[0] == 1:
        return held.shape[1]
    return None if row % token else row // token


def _is_aligned(held: torch.Tensor) -> bool:
    """Whether every token of `[B, T, n]` begins where it can be read in one go."""
    return held.data_ptr() % ALIGNED == held.stride(1) * held.element_size() % ALIGNED == 0


@torch.compiler.disable
def flashmla_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As [`fa3_decode`], by FlashMLA, which is for widths of 512 + 64 on Hopper.

    Raises:
        ImportError: without the package `flash_mla`.
    """
    (batch, heads, _, rank), length, pages = q_latent.shape, latent.shape[1], in_pages(latent, k_rope)
    plan = _flashmla_plan(latent.device, batch, heads, length, len(pages) // batch)
    query = torch.cat((q_latent, q_rope), dim=-1).transpose(1, 2)
    output, _ = _flash_mla().flash_mla_with_kvcache(query, pages, head_dim_v=rank, softmax_scale=scaling, **plan)
    return output.transpose(1, 2)


def _flash_mla():
    try:
        import flash_mla
    except ImportError as error:
        raise ImportError(
            "MLA_DECODE = 'flashmla' wants the package flash_mla: install it from github.com/deepseek-ai/FlashMLA."
        ) from error
    return flash_mla


@functools.lru_cache(maxsize=16)  # a plan serves all layers of a step, on every device that has some
def _flashmla_plan(device: torch.device, batch: int, heads: int, length: int, pages: int) -> dict:
    """What FlashMLA wants to know beside the tensors, for rows of `length` tokens in `pages` pages each."""
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    metadata, splits = _flash_mla().get_mla_metadata(lengths, heads, 1)
    return dict(
        block_table=torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
        cache_seqlens=lengths,
        tile_scheduler_metadata=metadata,
        num_splits=splits,
    )


def in_pages(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """latent `[B, T, c]`, k_rope `[B, T, r]` -> pages `[P, 64, 1, c + r]`, of which every row of the batch has as many.

    The memory itself where [`LatentCache`] has both side by side, as on a GPU; otherwise a copy. What lies behind the tokens is
    anything.
    """
    batch, length, rank = latent.shape
    width = rank + k_rope.shape[-1]
    page = FLASHMLA_PAGE * width
    needed = -(-length // FLASHMLA_PAGE) * page
    row = latent.stride(0) if batch > 1 else needed
    memory, start = latent.untyped_storage(), latent.storage_offset()
    as_it_is = (
        latent.dtype == k_rope.dtype
        and memory.data_ptr() == k_rope.untyped_storage().data_ptr()
        and k_rope.storage_offset() == start + rank
        and latent.stride()[1:] == k_rope.stride()[1:] == (width, 1)
        and (batch == 1 or k_rope.stride(0) == row)
        and row % page == 0
        and row >= needed
        and (start + batch * row) * latent.element_size() <= memory.nbytes()
        and _is_aligned(latent)
    )
    if not as_it_is:
        both = F.pad(torch.cat((latent, k_rope), dim=-1), (0, 0, 0, -length % FLASHMLA_PAGE))
        return both.view(-1, FLASHMLA_PAGE, 1, width)
    return latent.as_strided((batch * row // page, FLASHMLA_PAGE, 1, width), (page, width, width, 1))


DECODES = {"fa3": fa3_decode, "flashinfer": flashinfer_decode, "flashmla": flashmla_decode}


def present(device: torch.device, rank: int, rope: int) -> list[str]:
    """Those of [`DECODES`] that are installed, for this GPU and these widths, and ready.

    Flash Attention 3 is loaded from the Hub and FlashInfer compiles, for a minute or more, when they are first used: these wait to
    be named.
    """
    fits = (rank, rope) == (512, 64) and torch.cuda.get_device_capability(device) == (9, 0)
    return ["flashmla"] if fits and _is_installed("flash_mla") else []


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # something that stands in for it, without a spec
        return False
