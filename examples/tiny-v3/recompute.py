"""Selective recomputation: what is cheap to compute again is not kept for the backward pass (DeepSeek-V3 report, section 3.2.3)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODES = ("full", "selective")


def checkpointing_function(given: Callable) -> tuple[bool, Callable]:
    """Whether the mode is "selective", and what checkpoints, of the function that transformers makes of the user's arguments.

    Raises:
        ValueError: for a mode that is neither "full" nor "selective", and for the latter with `use_reentrant=True`.
    """
    options = dict(getattr(given, "keywords", {}))
    if "mode" not in options:
        return False, given
    mode = options.pop("mode")
    if mode not in MODES:
        raise ValueError(f"The mode of gradient checkpointing is {mode!r}: expected 'full' or 'selective'.")
    if options.setdefault("use_reentrant", False) and mode == "selective":
        raise ValueError(
            "Selective gradient checkpointing is never reentrant: leave use_reentrant out, or set it to False."
        )
    return mode == "selective", partial(given.func, *given.args, **options)


class _Remember(torch.autograd.Function):
    """The identity; the last step of a checkpointed function, whose results are among what the checkpoint computes again."""

    @staticmethod
    def forward(ctx, *outputs: torch.Tensor):
        ctx.save_for_backward(*outputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class _Recipe:
    """Finds `outputs` among the tensors that are kept for a backward pass, and computes them again in it."""

    def __init__(self, outputs: tuple[torch.Tensor, ...]):
        self.node = outputs[0].grad_fn
        self.places = {output.untyped_storage().data_ptr(): place for place, output in enumerate(outputs)}
        self.places.pop(0, None)  # has no memory of its own: an empty tensor, or one that is a shell around others
        self.uses = self.left = 0
        self.task, self.found = None, ()

    def pack(self, tensor: torch.Tensor):
        place = self.places.get(tensor.untyped_storage().data_ptr())
        if place is None:
            return tensor.detach()  # itself, it may be what the step gives, and hold the step that holds it
        self.uses += 1
        return place, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, kept):
        if isinstance(kept, torch.Tensor):
            return kept
        place, *geometry = kept
        task = torch._C._current_graph_task_id()  # which backward pass this is: the checkpoint answers once in each
        if not self.found or self.task != task:
            self.task, self.left, self.found = task, self.uses, self.node.saved_tensors
        tensor = self.found[place].as_strided(*geometry)
        self.left -= 1
        if not self.left:
            self.found = ()
        return tensor


def recomputed(by: Callable | None, function: Callable, *inputs: torch.Tensor) -> AbstractContextManager:
    """Gives `function(*inputs)`, a tensor or a tuple of them, to the block of a `with`.

    With `by`, a checkpointing function that is not reentrant, neither what `function` keeps for the backward pass nor, within the
    block, its result itself stays in memory: both are computed again, once, when the first of them is asked for. So the steps
    in the block must keep the result itself or views of it, as products and attention kernels do. `None` keeps everything.
    """
    if by is None and not torch.compiler.is_compiling():  # some versions of which lose what nullcontext was given
        return nullcontext(function(*inputs))
    return _recomputed(by, function, *inputs)


@contextmanager
def _recomputed(by: Callable | None, function: Callable, *inputs: torch.Tensor) -> Iterator:
    if by is None:
        yield function(*inputs)
        return
    if torch.is_autocast_enabled(inputs[0].device.type):
        logger.warning_once(
            "Selective recomputation saves little under autocast, which keeps its own copies of what is recomputed: load the "
            'model in bfloat16, or take {"mode": "full"}.'
        )
    single = False

    def remembered(*inputs):
        nonlocal single
        outputs = function(*inputs)
        single = isinstance(outputs, torch.Tensor)
        return _Remember.apply(*(outputs,) if single else outputs)

    outputs = by(remembered, *inputs)
    result = outputs[0] if single else outputs
    if outputs[0].grad_fn is None:
        yield result
        return
    recipe = _Recipe(outputs)
    with saved_tensors_hooks(recipe.pack, recipe.unpack):
        yield result
