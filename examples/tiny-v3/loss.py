"""Cross entropy in pieces: logits of a wide vocabulary are never all there in fp32, or never all there at all."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

LOSS_ROWS = 512  # tokens whose logits exist at a time: 0.26 GB in fp32 for DeepSeek-V3's vocabulary
LOSS_PIECE = 2**26  # logits that are converted to fp32 at a time
LOSS_PIECE_CPU = 2**21  # fits a processor's cache


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over the rows that have a target of `logsumexp(logits) - logits[target]`, in fp32. Keeps the logits as they are."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        seen = targets != ignore_index
        targets = targets.masked_fill(~seen, 0).unsqueeze(1)
        spread = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
        piece = LOSS_PIECE_CPU if logits.device.type == "cpu" else LOSS_PIECE
        ctx.rows = max(1, piece // logits.shape[1])
        for own, out in zip(logits.split(ctx.rows), spread.split(ctx.rows), strict=True):
            torch.logsumexp(own.float(), dim=-1, keepdim=True, out=out)
        ctx.save_for_backward(logits, targets, seen, spread)
        return torch.where(seen, (spread - logits.gather(1, targets).float()).squeeze(1), 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        logits, targets, seen, spread = ctx.saved_tensors
        result = torch.empty_like(logits)
        # rows without a target have a gradient of 0, whatever their logits and however few targets the others have
        seen, minus = seen.unsqueeze(1), gradient.new_full((), -1.0)
        weight = torch.where(seen, gradient, 0.0)
        pieces = (tensor.split(ctx.rows) for tensor in (logits, targets, seen, weight, spread, result))
        for own, target, has_target, factor, total, out in zip(*pieces, strict=True):
            probs = torch.sub(own.float(), total, out=out if out.dtype == torch.float32 else None).exp_()
            probs.scatter_add_(1, target, minus.expand_as(target)).mul_(factor).masked_fill_(~has_target, 0.0)
            if probs is not out:
                out.copy_(probs)
        return result, None, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss`, arguments and result, with logits converted to fp32 in pieces, forward and backward.

    Instead of two copies of `logits` `[B, S, V]` in fp32 there is their gradient, in their dtype. What torch.compile compiles
    is transformers' own. There is no second derivative: `model.loss_function = ForCausalLMLoss` has one.
    """
    if torch.compiler.is_compiling():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    total = _SummedCrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def shifted(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Target of every token of `labels` `[B, S]`: the next one; the last has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def loss_of_states(
    head: Callable, loss_function: Callable, states: torch.Tensor, targets: torch.Tensor, items, **kwargs
) -> torch.Tensor:
    """`loss_function` of `head(states)`, for `LOSS_ROWS` tokens at a time, once here and once more in the backward pass.

    Args:
        states `[B, S, d]`, targets `[B, S]`: what the head reads, and the token that each of them predicts.
        items: what the sum of the losses is divided by.
    """

    def loss(states, targets, items):
        return loss_function(logits=head(states), labels=None, shift_labels=targets, num_items_in_batch=items, **kwargs)

    pieces = zip(states.flatten(0, 1).split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS), strict=True)
    return sum(checkpoint(loss, *piece, items, use_reentrant=False) for piece in pieces)
