"""The hot operations, each as a plain reference and as the form that is used."""

import torch
import torch.nn.functional as F


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
    scores = torch.baddbmm(
        torch.bmm(q_rope.reshape(batch, heads * length, -1), k_rope.transpose(1, 2)),
        _per_head(q_nope, w_uk).reshape(batch, heads * length, -1),
        latent.transpose(1, 2),
        beta=scaling,
        alpha=scaling,
    )
    probs = _masked_softmax(scores.view(batch, heads, length, -1), mask).to(q_nope.dtype)
    if dropout:
        probs = F.dropout(probs, p=dropout)
    context = torch.bmm(probs.view(batch, heads * length, -1), latent).view(batch, heads, length, -1)
    return _per_head(context, w_uv.transpose(1, 2)), probs


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` `[B, H, S, i]` times `weight` `[H, i, o]` -> `[B, H, S, o]`, one matrix product per head over all B * S rows."""
    batch, heads, length, _ = x.shape
    rows = torch.bmm(x.transpose(0, 1).reshape(heads, batch * length, -1), weight)
    return rows.view(heads, batch, length, -1).transpose(0, 1)


def _masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension in fp32. A row that sees nothing (a padded query) is spread evenly, never NaN."""
    scores = scores.float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores = scores + mask.float()
    return scores.softmax(dim=-1)
