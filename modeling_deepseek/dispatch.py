"""Tokens to their experts, and the experts' answers back to the tokens."""

import itertools
from collections.abc import Callable

import torch

# of `x` `[n, in]` with the weights `chosen`, of which `chosen[i]` meets rows `starts[i]` to `starts[i + 1]`; `None`: not possible
Product = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor | None]


def sorted_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Of the pairs of token and expert in `chosen` `[N, K]`, those of one expert behind each other, in the order of the tokens.

    Returns:
        The token and the place in `chosen.flatten()` of every pair, both `[N * K]`, and how many each of the `num_experts` has,
        for which the device is asked once. Behind them lie those with the index `num_experts`, which are served elsewhere.
    """
    experts, places = chosen.flatten().sort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts + 1)[:num_experts].tolist()
    return places // chosen.shape[-1], places, counts


def experts_at_once(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    up: Product,
    activation: Callable[[torch.Tensor], torch.Tensor],
    down: Product,
) -> torch.Tensor | None:
    """What routed experts give, by one product for all of them before the activation and one behind it.

    Args:
        hidden_states `[N, d]`; experts and gates `[N, K]`, where `num_experts` stands for one that is served elsewhere.
        up, activation, down: `[n, d]` -> `[n, 2I]` -> `[n, I]` -> `[n, d]`.

    Returns:
        `[N, d]`, summed over the experts in fp32; `None` where a product cannot be.
    """
    tokens, places, counts = sorted_by_expert(top_k_index, num_experts)
    chosen = [expert for expert, count in enumerate(counts) if count]
    starts = [0, *itertools.accumulate(filter(None, counts))]
    if starts[-1] < len(tokens):
        tokens, places = tokens[: starts[-1]], places[: starts[-1]]
    hidden = up(hidden_states[tokens], chosen, starts)
    found = None if hidden is None else down(activation(hidden), chosen, starts)
    if found is None:
        return None
    found = found * top_k_weights.flatten()[places].float().unsqueeze(-1)
    output = torch.zeros(hidden_states.shape, dtype=found.dtype, device=found.device)
    return output.index_add_(0, tokens, found).to(hidden_states.dtype)
