"""Kernels that others have written for attention in latent space, from the Hub by the `kernels` package; for `ops` alone."""

import functools
from collections.abc import Callable

import torch

FLASH_ATTENTION_3 = (
    "kernels-community/flash-attn3"  # takes the rope part as the head, and 512 more query columns beside it
)


@functools.cache
def _flash_attention_3() -> Callable:
    from transformers.integrations.hub_kernels import get_kernel

    return get_kernel(FLASH_ATTENTION_3, version=1).flash_attn_with_kvcache


def fa3_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one new token over all of its cache, for Hopper GPUs in bf16 or fp16. Never run on a GPU by us.

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
