"""CPU memory that is used again."""

import math
import threading

import torch

_held = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """CPU memory of this thread that its next call gets again: fresh memory takes longer than what is done with it."""
    size = math.prod(shape)
    held = _memory(size, dtype)
    return held[:size].view(shape)


def scratch_pointer(size: int, dtype: torch.dtype) -> int:
    """Where [`scratch`] has room for `size` numbers."""
    return _memory(size, dtype).data_ptr()


def _memory(size: int, dtype: torch.dtype) -> torch.Tensor:
    held = _held.__dict__.get(dtype)
    if held is not None and held.shape[0] >= size:
        return held
    with torch.inference_mode(False):  # or nothing could be written there outside of it
        new = torch.empty(size, dtype=dtype, device="cpu")
    if type(new) is torch.Tensor:  # else it is under a mode that pretends
        _held.__dict__[dtype] = new
    return new
