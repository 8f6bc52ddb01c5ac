"""The mixture of experts: routed experts with fused weights, and the block that adds the shared ones."""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from .balance import Routing
from .dispatch import experts_at_once, sorted_by_expert
from .dtypes import cast, has_fast_gemm
from .layers import DeepseekMLP
from .products import expert_products, experts_meet_in_c, large_enough
from .router import DeepseekTopkRouter

# Tokens up to which, and from which, another form than grouped_mm is faster on a CPU without gradients: benchmarks/experts.py
FEW_TOKENS, MANY_TOKENS = 1, 512
# Tokens per expert from which a CPU that is slow at 16 bits is faster when it converts the weights: measured
TOKENS_TO_CONVERT = 16
SMALL_WEIGHTS = 2**20  # of the chosen experts together: copying them costs less than asking for each


ALL_EXPERTS_FUNCTIONS.register("auto", grouped_mm_experts_forward)  # for other classes that get a config of ours


class _WithAuto(ExpertsInterface):
    """transformers' implementations by their names, and "auto"."""

    def get_interface(self, experts_implementation: str | None, default: Callable) -> Callable:
        if experts_implementation == "auto":
            return partial(auto_experts_forward, default)
        return ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)


def auto_experts_forward(
    sorted_loop: Callable,
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The implementation that is fastest for so many tokens on this device; all give the same but for rounding."""
    tokens, arguments = hidden_states.shape[0], (hidden_states, top_k_index, top_k_weights)
    if hidden_states.dtype == torch.float64 and not torch.compiler.is_compiling():
        return sorted_loop(experts, *arguments)  # PyTorch's grouped product has no fp64
    device, held = hidden_states.device.type, experts.gate_up_proj.dtype
    eager_gpu = device not in ("cpu", "meta") and not torch.compiler.is_compiling()
    if eager_gpu and held == torch.float32 and torch.is_autocast_enabled(device):
        # autocast does not reach PyTorch's grouped product, which would run in fp32
        return sorted_loop(experts, *arguments)
    if torch.is_grad_enabled() or torch.compiler.is_exporting():  # an export is for any number of tokens
        return grouped_mm_experts_forward(experts, *arguments)
    if device != "cpu":  # copies are read and written: not measured on a GPU
        few = 3 * top_k_index.numel() <= experts.num_experts
        return (batched_mm_experts_forward if few else grouped_mm_experts_forward)(experts, *arguments)
    found = experts_in_c(experts, *arguments)
    if found is not None:
        return found
    weights = top_k_index.numel() * experts.hidden_dim * experts.intermediate_dim
    if weights <= SMALL_WEIGHTS and not getattr(experts, "_is_expert_parallel", True):  # transformers 5.17 does not say
        return gathered_experts_forward(experts, *arguments)
    slow = hidden_states.dtype == experts.gate_up_proj.dtype and not has_fast_gemm("cpu", hidden_states.dtype)
    if slow and not torch.compiler.is_compiling() and top_k_index.numel() >= TOKENS_TO_CONVERT * experts.num_experts:
        return sorted_experts_forward(experts, *arguments, torch.float32)
    if torch.compiler.is_compiling() or FEW_TOKENS < tokens < MANY_TOKENS:
        return grouped_mm_experts_forward(experts, *arguments)
    return few_tokens_experts_forward(experts, *arguments) if tokens <= FEW_TOKENS else sorted_loop(experts, *arguments)


def gathered_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Two products over copies of the chosen weights."""
    tokens, top_k = top_k_index.shape
    width, hidden_dim, chosen = experts.intermediate_dim, experts.hidden_dim, top_k_index.flatten()
    gate_up = experts.gate_up_proj.index_select(0, chosen).view(tokens, top_k * 2 * width, hidden_dim)
    hidden = experts._apply_gate(torch.bmm(gate_up, hidden_states.unsqueeze(-1)).view(tokens * top_k, 2 * width))
    output = torch.bmm(experts.down_proj.index_select(0, chosen), hidden.unsqueeze(-1))
    output = cast(output.view(tokens, top_k, hidden_dim), top_k_weights.dtype)
    return cast(torch.bmm(top_k_weights.unsqueeze(1), output).squeeze(1), hidden_states.dtype)


def experts_in_c(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """Two products over the chosen weights where they lie, in C; `None` where they cannot be, or would take longer."""
    if not large_enough(experts.hidden_dim * experts.intermediate_dim):
        return None
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts_meet_in_c(hidden_states, gate_up, down, top_k_index.numel()):
        return None
    up, down = (partial(expert_products, weights) for weights in (gate_up, down))
    arguments = (hidden_states, top_k_index, top_k_weights, experts.num_experts)
    return experts_at_once(*arguments, up, experts._apply_gate, down)


def few_tokens_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One product per token and expert, each reading the expert's weights where they lie."""
    chosen, top_k = top_k_index.flatten().tolist(), top_k_index.shape[-1]
    pairs = [(place, expert) for place, expert in enumerate(chosen) if expert != experts.num_experts]
    if not pairs:
        return torch.zeros_like(hidden_states)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    rows = hidden_states.split(1)
    hidden = [F.linear(rows[place // top_k], gate_up[expert]) for place, expert in pairs]
    hidden = experts._apply_gate(torch.cat(hidden)).split(1)
    output = hidden_states.new_zeros(len(chosen), hidden_states.shape[-1], dtype=top_k_weights.dtype)
    for row, (place, expert) in zip(hidden, pairs, strict=True):
        output[place] = F.linear(row, down[expert])
    gates = top_k_weights.unsqueeze(-2)
    return torch.bmm(gates, output.view(-1, top_k, hidden_states.shape[-1])).squeeze(1).to(hidden_states.dtype)


def sorted_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compute: torch.dtype,
) -> torch.Tensor:
    """Tokens sorted by expert, one product per expert, in `compute`, which weights of another dtype are converted to one by one.

    The weights are unbound once: indexing a 3-D parameter per expert makes the backward pass many times slower. An index
    of `num_experts` (a token that expert parallelism serves elsewhere) adds nothing.
    """
    tokens, places, counts = sorted_by_expert(top_k_index, experts.num_experts)
    gates = top_k_weights.flatten()[places].unsqueeze(-1)
    states = cast(hidden_states, compute)
    output = torch.zeros_like(states)
    start = 0
    weights = zip(experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), counts, strict=True)
    for expert, (gate_up, down, count) in enumerate(weights):
        if count or expert == 0:  # the first also on no tokens: other ranks wait for gradients of all weights
            rows = tokens[start : start + count]
            hidden = experts._apply_gate(F.linear(states[rows], cast(gate_up, compute)))
            expert_output = F.linear(hidden, cast(down, compute)) * gates[start : start + count]
            output.index_add_(0, rows, expert_output.to(output.dtype))
            start += count
    return cast(output, hidden_states.dtype)


@use_experts_implementation(experts_interface=_WithAuto())
class DeepseekExperts(nn.Module):
    """All routed experts of a layer: `gate_up_proj` `[E, 2I, d]` and `down_proj` `[E, d, I]`.

    The forward below is the "eager" implementation; transformers puts another one in its place by
    `config._experts_implementation`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """`load_state_dict` takes per-expert keys as well, all of them or, from one shard of many, some: Trainer resumes so."""
        per_expert = re.compile(re.escape(prefix) + r"(\d+)\.(gate|up|down)_proj\.weight")
        found = {match.groups(): key for key in state_dict if (match := per_expert.fullmatch(key))}
        kinds = ("gate", "up", "down")
        for (expert, kind), key in list(found.items()):
            expected = self._weight_of(int(expert), kind).shape if int(expert) < self.num_experts else None
            if state_dict[key].shape != expected:
                error_msgs.append(
                    f"size mismatch for {key}: {tuple(state_dict.pop(key).shape)}, the model has {expected}."
                )
                del found[expert, kind]
        if len(found) == len(kinds) * self.num_experts:
            gate, up, down = (
                torch.stack([state_dict.pop(found[str(expert), kind]) for expert in range(self.num_experts)])
                for kind in kinds
            )
            state_dict[f"{prefix}gate_up_proj"], state_dict[f"{prefix}down_proj"] = torch.cat((gate, up), dim=1), down
        for (expert, kind), key in found.items():
            if key in state_dict:
                self._weight_of(int(expert), kind).copy_(state_dict.pop(key))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _weight_of(self, expert: int, kind: str) -> torch.Tensor:
        """The part of the fused weights that is `experts.<expert>.<kind>_proj.weight` on disk."""
        if kind == "down":
            return self.down_proj[expert]
        return self.gate_up_proj[expert].chunk(2)[kind == "up"]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` `[N, d]`, experts and gates `[N, K]` -> `[N, d]`: see [`sorted_experts_forward`]."""
        return sorted_experts_forward(self, hidden_states, top_k_index, top_k_weights, hidden_states.dtype)


class DeepseekMoE(nn.Module):
    """Shared experts plus the routed ones that the router chose (DeepSeekMoE paper, section 3): `[..., d] -> [..., d]`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.experts = DeepseekExperts(config)
        self.gate = DeepseekTopkRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekMLP(config.hidden_size, width, config.hidden_act, config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        _, gates, chosen = self.gate(hidden_states, routing)
        routed = self.experts(hidden_states.flatten(0, -2), chosen, gates).view_as(hidden_states)
        shared_experts = self.shared_experts
        return routed if shared_experts is None else routed + shared_experts(hidden_states)
