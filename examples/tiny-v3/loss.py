"""Cross entropy in pieces: logits of a wide vocabulary are never all there in fp32, or never all there at all."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

LOSS_ROWS = 512  # tokens whose logits exist at a time: 0.26 GB in fp32 for DeepSeek-V3's vocabulary
LOSS_PIECE = 2**26  # logits that are converted to fp32 at a time
LOSS_PIECE_CPU = 2**20  # fits a processor's cache


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over the rows that have a target of `logsumexp(logits) - logits[target]`, in fp32. Keeps the logits as they are."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        seen, targets = _seen(targets, ignore_index)
        spread = _spread(logits)
        ctx.save_for_backward(logits, targets, seen, spread)
        return _summed(logits, targets, seen, spread)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        _refuse_second_derivative()
        logits, targets, seen, spread = ctx.saved_tensors
        # rows without a target have a gradient of 0, whatever their logits and however few targets the others have
        return (
            _gradient(logits, targets, seen, spread, torch.where(seen, gradient, 0.0), torch.empty_like(logits)),
            None,
            None,
        )


class _SummedCrossEntropyOfStates(torch.autograd.Function):
    """[`_SummedCrossEntropy`] of `states @ weight.T`: both gradients are made with the loss, so that logits are made once.

    Where 16 bits are asked for by autocast, `dtype`, products are in it.
    """

    @staticmethod
    def forward(
        ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, dtype: torch.dtype
    ):
        with torch.autocast(states.device.type, enabled=False):
            head = weight.to(dtype)
            d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
            d_weight = None
            if ctx.needs_input_grad[1]:  # in 16 bits it would lose a digit over many pieces
                d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            all_seen, targets = _seen(targets, ignore_index)
            for start in range(0, len(states), LOSS_ROWS):
                here = slice(start, start + LOSS_ROWS)
                own, target, seen = states[here].to(dtype), targets[here], all_seen[here]
                logits = F.linear(own, head)
                spread = _spread(logits)
                total += _summed(logits, target, seen, spread)
                gradient = _gradient(logits, target, seen, spread, seen.float(), logits)
                if d_states is not None:
                    d_states[here] = gradient @ head
                if d_weight is None:
                    continue
                if d_weight.dtype == dtype:
                    d_weight.addmm_(gradient.T, own)
                else:
                    d_weight += gradient.T @ own
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        ctx.save_for_backward(d_states, d_weight, all_seen.any())
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        _refuse_second_derivative()
        d_states, d_weight, any_seen = ctx.saved_tensors
        gradient = torch.where(any_seen, gradient, 0.0)
        return *(None if each is None else each * gradient for each in (d_states, d_weight)), None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True, which would get zeros
        raise RuntimeError(
            "This cross entropy has no second derivative, which create_graph=True asks for: set model.loss_function to "
            "ForCausalLMLoss of transformers.loss.loss_utils, which has one."
        )


def _seen(targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the rows have a target, and the targets, 0 for those that have none; both `[N, 1]`."""
    seen = (targets != ignore_index).unsqueeze(1)
    return seen, targets.unsqueeze(1).masked_fill(~seen, 0)


def _rows(logits: torch.Tensor) -> int:
    """How many rows are converted to fp32 at a time."""
    return max(1, (LOSS_PIECE_CPU if logits.device.type == "cpu" else LOSS_PIECE) // logits.shape[1])


def _spread(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp of every row, fp32 `[N, 1]`."""
    spread, rows = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device), _rows(logits)
    for own, out in zip(logits.split(rows), spread.split(rows), strict=True):
        torch.logsumexp(own.float(), dim=-1, keepdim=True, out=out)
    return spread


def _summed(logits, targets, seen, spread) -> torch.Tensor:
    return torch.where(seen, spread - logits.gather(1, targets).float(), 0.0).sum()


def _gradient(logits, targets, seen, spread, factor, result) -> torch.Tensor:
    """That of the sum times `factor` `[N, 1]`, written to `result`, which may be the logits themselves."""
    minus = factor.new_full((), -1.0)
    pieces = (tensor.split(_rows(logits)) for tensor in (logits, targets, seen, factor, spread, result))
    for own, target, has_target, weight, total, out in zip(*pieces, strict=True):
        probs = torch.sub(own.float(), total, out=out if out.dtype == torch.float32 else None).exp_()
        probs.scatter_add_(1, target, minus.expand_as(target)).mul_(weight).masked_fill_(~has_target, 0.0)
        if probs is not out:
            out.copy_(probs)
    return result


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
    is transformers' own. A second derivative is an error: `model.loss_function = ForCausalLMLoss` has one.
    """
    if torch.compiler.is_compiling():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    total = _SummedCrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    return _per_item(total, num_items_in_batch)


def _per_item(total: torch.Tensor, items: torch.Tensor | int) -> torch.Tensor:
    return total / (items.to(total.device) if torch.is_tensor(items) else items)


def shifted(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Target of every token of `labels` `[B, S]`: the next one; the last has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def loss_of_states(
    head: Callable, loss_function: Callable, states: torch.Tensor, targets: torch.Tensor, items, **kwargs
) -> torch.Tensor:
    """`loss_function` of `head(states)`, for `LOSS_ROWS` tokens at a time, once here and once more in the backward pass.

    Args:
        states `[B, S, d]` or `[N, d]`, targets `[B, S]` or `[N]`: what the head reads, and the token that each of them predicts.
        items: what the sum of the losses is divided by.
    """

    def loss(states, targets, items):
        return loss_function(logits=head(states), labels=None, shift_labels=targets, num_items_in_batch=items, **kwargs)

    rows, targets = states.reshape(-1, states.shape[-1]), targets.flatten()
    pieces = zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
    return sum(checkpoint(loss, *piece, items, use_reentrant=False) for piece in pieces)


def loss_of_weight(
    weight: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, items, ignore_index: int = -100
) -> torch.Tensor | None:
    """[`causal_lm_loss`] of `states @ weight.T`, `LOSS_ROWS` tokens at a time, once: their gradients are made on the way.

    They are kept until the backward pass, which is why it is for as many tokens as `weight` `[V, d]` is wide at least, whose logits
    would be larger than its gradient, and for weights that do not learn. PyTorch 2.13 has the same as
    `F.linear_cross_entropy(options=...)`; its loss is rounded to bf16 where the weights are.

    Returns:
        `None` where there is no gradient to be made, or that is not the way to make it: under torch.compile and in fp16, whose
        range is too small for gradients that are scaled later.
    """
    rows, dtype, kinds = states.numel() // weight.shape[1], states.dtype, {states.dtype, weight.dtype}
    if torch.is_autocast_enabled(states.device.type) and torch.float64 not in kinds:
        dtype = torch.get_autocast_dtype(states.device.type)
        kinds = {dtype}
    learns = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    fits = len(kinds) == 1 and dtype != torch.float16 and states.device == weight.device
    fits = fits and targets.numel() == rows  # else what is left to others says what is wrong
    many = rows >= weight.shape[1] or not weight.requires_grad
    if not (learns and fits and many) or torch.compiler.is_compiling():
        return None
    states = states.reshape(rows, weight.shape[1])
    return _per_item(_SummedCrossEntropyOfStates.apply(states, weight, targets.flatten(), ignore_index, dtype), items)
