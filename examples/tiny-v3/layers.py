"""The leaves that every block uses: RMSNorm, linear layers as a step of generation meets them, and the SwiGLU MLP."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.integrations import use_kernel_forward_from_hub

from .products import large_enough, plain_product

_linear_forward = nn.Linear.forward
# by value and dtype, as CPU tensors without dimensions: operations with a number, or one of another dtype, make one each time
_numbers: dict[tuple[float, torch.dtype], torch.Tensor] = {}


@use_kernel_forward_from_hub("RMSNorm")
class DeepseekRMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in fp32 and rounded once to the dtype of `x`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        for dtype in (torch.float32, torch.float64):
            if (eps, dtype) not in _numbers:
                with torch.inference_mode(False):
                    number = torch.tensor(eps, dtype=dtype, device="cpu")
                if type(number) is torch.Tensor:  # not under a mode that pretends
                    _numbers[eps, dtype] = number

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, eps = self.weight, self.variance_epsilon
        if weight.dtype != hidden_states.dtype:
            return weight * F.rms_norm(hidden_states, weight.shape, eps=eps)
        wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        width, number = hidden_states.shape[-1], _numbers.get((eps, wide))
        few_steps = hidden_states.is_cpu and type(hidden_states) is torch.Tensor and number is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not few_steps or weight.numel() != width:
            return F.rms_norm(hidden_states, weight.shape, weight, eps)
        # PyTorch has a kernel for it on GPUs only; this takes fewer operations than what it does on a CPU
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=wide)
        scale = torch.addcmul(number, norm, norm, value=1 / width).rsqrt()
        normed = hidden_states * scale * weight
        return normed if normed.dtype == hidden_states.dtype else normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`. What is nothing but a large `nn.Linear` without bias meets few tokens on a CPU in C."""
    known = type(module) is nn.Linear and type(x) is torch.Tensor
    if known and x.is_cpu and large_enough(module.in_features * module.out_features):
        output = plain_product(x, module.weight) if is_bare(module) and module.bias is None else None
        if output is not None:
            return output
    return module(x)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of `module` is that of its class's `forward` on its weights: no hook, wrapper or offloading."""
    if "forward" in vars(module) and not _is_only_placed(module):
        return False
    if nn.Linear.forward is not _linear_forward:  # somebody put another one in its place
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or _has_any_global_hook())


def _is_only_placed(module: nn.Module) -> bool:
    """Whether all that wraps it is accelerate's hook of a `device_map`, which moves inputs to where the weight lies."""
    held = vars(module)
    hook, wrapped, wrapper = held.get("_hf_hook"), held.get("_old_forward"), getattr(held["forward"], "func", None)
    if type(hook).__name__ != "AlignDevicesHook" or getattr(wrapper, "__module__", None) != "accelerate.hooks":
        return False
    more = hook.offload or hook.no_grad or hook.io_same_device or {"pre_forward", "post_forward"} & vars(hook).keys()
    own = getattr(wrapped, "__self__", None) is module and wrapped.__func__ is type(module).forward
    return own and not more


class DeepseekMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`: `[..., hidden_size] -> [..., hidden_size]`."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "silu", bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(linear(self.gate_proj, hidden_states)) * linear(self.up_proj, hidden_states)
        return linear(self.down_proj, hidden)
