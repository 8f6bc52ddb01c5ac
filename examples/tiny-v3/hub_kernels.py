"""Kernels that others have written for attention in latent space; for `ops` alone. None of them was run by us."""

import functools
from collections.abc import Callable

import torch

FLASH_ATTENTION_3 = (
    "kernels-community/flash-attn3"  # takes the rope part as the head, and 512 more query columns beside it
)
FLASHINFER_WORKSPACE = 128 * 2**20  # bytes, as its documentation recommends


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
    (batch, heads, _, rank), length, rope = q_latent.shape, latent.shape[1], q_rope.shape[-1]
    held, device = (latent, k_rope), latent.device
    rows = {length if batch == 1 else x.stride(0) / x.shape[2] for x in held}  # tokens from one row to the next
    behind_each_other = all(x.stride()[1:] == (x.shape[2], 1) for x in held)
    if not behind_each_other or len(rows) > 1 or not float(*rows).is_integer():
        latent, k_rope, rows = latent.contiguous(), k_rope.contiguous(), {length}
    rows = int(*rows)
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
    ckv, kpe = (x.as_strided((pages, 1, x.shape[-1]), (x.shape[-1], x.shape[-1], 1)) for x in (latent, k_rope))
    q_latent, q_rope = (x.squeeze(2).contiguous() for x in (q_latent, q_rope))
    output = planned.wrapper.run(q_nope=q_latent, q_pe=q_rope, ckv_cache=ckv, kpe_cache=kpe)
    return output.unsqueeze(2)


DECODES = {"fa3": fa3_decode, "flashinfer": flashinfer_decode}
