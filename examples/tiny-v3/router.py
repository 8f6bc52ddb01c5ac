"""Routing: scores, group limits, expert choice and gates; and the module that holds the router's weight and bias."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from .balance import Routing, within_capacity


def router_scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Affinities `[N, E]` of fp32 router logits: softmax over all experts (V2) or sigmoid of each (V3)."""
    return logits.softmax(dim=-1) if scoring_func == "softmax" else logits.sigmoid()


def group_limited(scores: torch.Tensor, n_group: int, topk_group: int, group_top: int) -> torch.Tensor:
    """`scores` `[N, E]` with -inf outside the `topk_group` best of `n_group` equal groups of experts.

    A group is worth the sum of its `group_top` best scores: 1 in V2 (section 2.2.2), 2 in V3 (section 2.1.2). The mask is
    -inf, not 0: V3's `score + bias` may be negative.
    """
    grouped = scores.unflatten(-1, (n_group, -1))
    group_scores = grouped.topk(min(group_top, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = group_scores.topk(topk_group, dim=-1, sorted=False).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, chosen, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)


def choose_experts(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    topk_method: str,
    n_group: int = 1,
    topk_group: int = 1,
) -> torch.Tensor:
    """Indices `[N, top_k]` of the experts that each token visits; `bias` `[E]` takes part in the ranking only."""
    ranking = scores if bias is None else scores + bias
    if topk_method != "greedy" and topk_group < n_group:
        ranking = group_limited(ranking, n_group, topk_group, group_top=2 if topk_method == "noaux_tc" else 1)
    return ranking.topk(top_k, dim=-1, sorted=False).indices


def gate_values(
    scores: torch.Tensor, chosen: torch.Tensor, normalize: bool, scaling: float, scale_normalized: bool
) -> torch.Tensor:
    """Gates `[N, top_k]`: the chosen scores, optionally divided by their sum, times `scaling`.

    `scale_normalized` tells the families apart: V3 always scales, V2 scales only gates that were not normalised.
    """
    gates = scores.gather(1, chosen)
    if normalize and (scale_normalized or gates.shape[-1] > 1):
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        scaling = scaling if scale_normalized else 1.0
    return gates if scaling == 1.0 else gates * scaling


class DeepseekTopkRouter(nn.Module):
    """Router logits, gates and expert choice of `hidden_states` `[..., hidden_size]`; all in fp32 whatever the model's dtype.

    What the routers of one forward pass in training share comes as `routing`: with the call, so that a layer that is computed again
    has that of its own pass.

    Returns:
        `router_logits` `[N, E]`, `topk_weights` `[N, K]` (both fp32) and `topk_indices` `[N, K]`, N tokens in row-major order.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.n_group = config.n_group or 1
        self.topk_group = config.topk_group or self.n_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.scales_normalized_gates = config.scales_normalized_gates
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))
        self.e_score_correction_bias: torch.Tensor | None
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if self.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.capacity_factor = config.moe_capacity_factor
        self.depth = 0  # of the MTP layer that it is in, 0 in the main ones

    def _apply(self, fn, recurse=True):
        """Moves with the model, and stays in fp32 when this is cast."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(
        self, hidden_states: torch.Tensor, routing: Routing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        device = tokens.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            weight, single = self.weight, torch.float32
            if tokens.dtype != single or weight.dtype != single:
                tokens, weight = tokens.float(), weight.float()
            router_logits = F.linear(tokens, weight)
            scores = router_scores(router_logits, self.scoring_func)
        chosen = choose_experts(
            scores.detach() if scores.requires_grad else scores,
            self.e_score_correction_bias,
            self.top_k,
            self.topk_method,
            self.n_group,
            self.topk_group,
        )
        gates = gate_values(
            scores, chosen, self.norm_topk_prob, self.routed_scaling_factor, self.scales_normalized_gates
        )
        if routing is not None:
            batch = hidden_states.shape[:-1]
            if routing.open:
                # V3's loss counts the best scores themselves, without bias and limit of groups (report, equation 18)
                best = scores.detach().topk(self.top_k, dim=-1).indices if self.topk_method == "noaux_tc" else chosen
                routing.collect(*(each.view(*batch, -1) for each in (scores, chosen, best)), self.depth)
            if routing.protected is not None:
                protected = routing.protected[:, None].expand(batch).flatten().to(scores.device)
                seen = routing.seen(batch[1], self.depth, scores.device)
                stay = torch.ones_like(chosen, dtype=torch.bool)
                stay[seen] = within_capacity(
                    scores.detach()[seen], chosen[seen], protected[seen], self.n_group, self.capacity_factor
                )
                gates = gates * stay
        return router_logits, gates, chosen
