"""Numbers in 16 bits: which of them this processor multiplies fast, and casts that cost nothing where none is needed.

And which tensors have numbers at all.
"""

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_ONEDNN = torch.backends.mkldnn.is_available()
SLOW_ON_CPU = {  # looked up once: torch.compile cannot ask
    dtype
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    if not (_ONEDNN and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
}


def has_fast_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` are worth running as they are.

    A CPU without bf16 (fp16) instructions is many times slower at them than at converting to fp32 and back.
    """
    return device != "cpu" or dtype not in SLOW_ON_CPU


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, without asking PyTorch where nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def has_numbers(x: torch.Tensor) -> bool:
    """Whether the memory of `x`, by its strides, is what it says, and operations do no more than their own by [`is_transformed`].

    Not so: subclasses (a fake tensor, say), other layouts, and what is negative only by a flag.
    """
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided and not x.is_nested
    return plain and not x.is_neg() and not is_transformed()


def is_transformed() -> bool:
    """Whether PyTorch does more with its operations than to run them, of which a C function would know nothing.

    That is a transform of `torch.func`, a level of forward derivatives, tracing, or a mode, which may count, record or change; but
    for the default device.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
    )


def _has_function_mode() -> bool:
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def runs_as_it_is() -> bool:
    """Whether operations on a CPU are run now as they are written: not compiled, cast or transformed."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_transformed())
