"""CPU memory that is used again."""

import math
import threading

import torch

_held = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """CPU memory of this thread that its next call gets again: fresh memory takes longer than what is done with it."""
    size = math.prod(shape)
    if size > len(_held.__dict__.get(dtype, ())):
        with torch.inference_mode(False):  # or nothing could be written there outside of it
            new = torch.empty(size, dtype=dtype, device="cpu")
        if type(new) is not torch.Tensor:  # under a mode that pretends
            return new.view(shape)
        _held.__dict__[dtype] = new
    return _held.__dict__[dtype][:size].view(shape)
