"""Kernels meet GPUs that they were never run on: each is tried once, against the plain form, before its results count."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOLERANCE = 0.02  # relative, of norms: three times what bf16 leaves at 512 + 64 in Triton's interpreter
CALLS = 5

Answer = TypeVar("Answer")
_answers: dict = {}
_one_at_a_time = threading.RLock()  # or trials would spoil each other's times


def tried(trial: Callable[..., Answer], device: torch.device, *about, unknown: Answer, failed: Answer) -> Answer:
    """What `trial(device, *about)` finds, once per process: about a GPU nothing is asked twice.

    `unknown` stands for it where operations do not run now: while a CUDA graph records them, and on tensors without numbers, as an
    export has them. `failed` does where memory ran out, which may be otherwise at the next call.
    """
    question = (trial, device, *about)
    if question in _answers:
        return _answers[question]
    with _one_at_a_time, torch.no_grad():
        if question in _answers:
            return _answers[question]
        if torch.cuda.is_current_stream_capturing() or type(torch.empty(0, device=device)) is not torch.Tensor:
            return unknown
        try:
            answer = _answers[question] = trial(device, *about)
        except torch.OutOfMemoryError:
            return failed
    return answer


def is_right(name: str, call: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether `call` gives `expected` up to `TOLERANCE`; a warning says so if it does not, or fails.

    Raises:
        torch.OutOfMemoryError: as `call` does.
    """
    try:
        output = call()
        if output.shape != expected.shape:
            raise ValueError(f"{tuple(output.shape)} came out, expected {tuple(expected.shape)}")
        error = ((output.to(expected.dtype) - expected).norm() / expected.norm()).item()
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a compiler, a driver or a package of others raises
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        logger.warning_once(f"{name} fails on this GPU and is not used: {reason}")
        return False
    if not error <= TOLERANCE:
        logger.warning_once(f"{name} is wrong on this GPU (relative error {error:.1e}) and is not used.")
        return False
    return True


def seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Of the fastest of a few calls."""
    found = []
    for _ in range(CALLS):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
