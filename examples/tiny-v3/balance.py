"""Load of the experts: the balance losses, token dropping, and what the routers of one forward pass leave behind."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import find_packed_sequence_indices

NEVER_DROPPED = 0.1  # share of the sequences of which no token is dropped (DeepSeek-V2 paper, section 2.2.4)


def expert_counts(chosen: torch.Tensor, num_experts: int, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """How often each expert was chosen, `[num_rows, E]` in fp32: `chosen` `[N, K]`, token n counted in row `rows[n]`."""
    flat = (rows[:, None] * num_experts + chosen).flatten()
    return torch.bincount(flat, minlength=num_rows * num_experts).view(num_rows, num_experts).float()


def balance_losses(
    scores: torch.Tensor,
    chosen: torch.Tensor,
    rows: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert-, device- and communication-level balance loss, without their factors: 1 at perfect balance.

    With f_i the share of the tokens that chose expert i times E / K, and P_i its mean score, sum f_i P_i; over groups g of
    experts (devices) sum of mean f_i times sum P_i; and with f''_g = D / M times the share of tokens sent to group g. The counts
    carry no gradient. (DeepSeekMoE paper, section 3.3, equations 12 to 17; DeepSeek-V2 paper, section 2.2.3, equations 23 to 31;
    for V3's sigmoid scores its report's section 2.1.2, equations 17 to 20, where they are normalised.)

    Args:
        scores `[N, E]`: affinities of N tokens, in fp32; divided by their sum here.
        chosen `[N, K]`: the experts that each of them visits.
        rows `[N]`: which sequence a token belongs to, from 0 on: the losses of each are computed apart, and their mean returned.
            `None`: all tokens are one batch.
        n_group, topk_group: D groups of experts, of which a token may visit M.
    """
    experts, top_k = scores.shape[-1], chosen.shape[-1]
    if rows is None:
        rows = chosen.new_zeros(len(chosen))
    num_rows = int(rows.max()) + 1 if len(rows) else 1
    tokens = torch.bincount(rows, minlength=num_rows).clamp(min=1)[:, None]
    f = expert_counts(chosen, experts, rows, num_rows) * experts / (top_k * tokens)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    p = shares.new_zeros(num_rows, experts).index_add(0, rows, shares) / tokens
    per_group = p.unflatten(-1, (n_group, -1)).sum(-1)
    sent = torch.zeros(len(chosen), n_group, device=chosen.device).scatter(1, chosen // (experts // n_group), 1.0)
    sent = sent.new_zeros(num_rows, n_group).index_add(0, rows, sent) * n_group / (topk_group * tokens)
    expert = (f * p).sum(-1).mean()
    device = (f.unflatten(-1, (n_group, -1)).mean(-1) * per_group).sum(-1).mean()
    return expert, device, (sent * per_group).sum(-1).mean()


def within_capacity(
    scores: torch.Tensor, chosen: torch.Tensor, protected: torch.Tensor, n_group: int, factor: float
) -> torch.Tensor:
    """Which of the visits `[N, K]` stay when every group of experts serves at most `factor` times its average share.

    A group that is over its budget drops those of the lowest affinity; `protected` `[N]` tokens stay in any case, and come first
    (DeepSeek-V2 paper, section 2.2.4).
    """
    tokens, top_k = chosen.shape
    budget = int(factor * tokens * top_k / n_group)
    group = (chosen // (scores.shape[-1] // n_group)).flatten()
    rank = torch.where(protected[:, None], 2.0 + scores.max(), scores).gather(1, chosen).flatten()
    order = rank.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, the dearest first
    starts = torch.searchsorted(group[order], torch.arange(n_group, device=group.device))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - starts[group[order]]
    return (place < budget).view(tokens, top_k) | protected[:, None]


@dataclass
class Routing:
    """What the routers of one forward pass share. It collects while `open`; a recomputed forward finds it closed.

    mask `[B, S]`: False for padding; `None` without any.
    documents `[B, S]`: an id per packed document and row, from 0 on.
    protected `[B]`: sequences of which no token is dropped, or `None` where nothing is.
    """

    mask: torch.Tensor | None
    documents: torch.Tensor
    protected: torch.Tensor | None = None
    open: bool = True
    scores: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)

    def collect(self, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        """Takes `[B, S', E]` and `[B, S', K]` of a router, with S' smaller at the MTP depths."""
        if self.open:
            self.scores.append(scores)
            self.chosen.append(chosen)

    def close(self) -> None:
        """Nothing is collected any more, and what was is let go."""
        self.open = False
        self.scores.clear()
        self.chosen.clear()

    def seen(self, width: int) -> torch.Tensor | slice:
        """Which of the first `width` tokens of all rows, `[B * width]`, are no padding."""
        return slice(None) if self.mask is None else self.mask[:, :width].flatten()

    def losses(self, per_sequence: bool, n_group: int, topk_group: int) -> torch.Tensor:
        """Sums over all routers of the three [`balance_losses`], `[3]`."""
        total = 0
        for scores, chosen in zip(self.scores, self.chosen, strict=True):
            width = scores.shape[1]
            seen, rows = self.seen(width), None
            if per_sequence:
                _, rows = self.documents[:, :width].flatten()[seen].unique(return_inverse=True)
            parts = balance_losses(scores.flatten(0, 1)[seen], chosen.flatten(0, 1)[seen], rows, n_group, topk_group)
            total = total + torch.stack(parts)
        return total


def new_routing(
    config: PreTrainedConfig,
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Routing:
    """What the routers share in a training forward over `like` `[B, S, ...]`; packed documents are told apart as in attention."""
    batch, length = like.shape[:2]
    documents = torch.arange(batch, device=like.device)[:, None].expand(-1, length) * length
    mask = protected = None
    if attention_mask is not None and attention_mask.ndim == 2:
        mask = attention_mask[:, -length:].bool()
    elif position_ids is not None and attention_mask is None:
        packed = find_packed_sequence_indices(position_ids.expand(batch, -1))
        documents = documents if packed is None else documents + packed
    if config.moe_capacity_factor:
        protected = torch.rand(batch, device=like.device) < NEVER_DROPPED
    return Routing(mask, documents, protected)


def share_of_step(labels: torch.Tensor, num_items_in_batch=None, **kwargs) -> torch.Tensor | float:
    """How much of an optimiser step these `labels` are: balance losses of its parts are weighted by their tokens."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != kwargs.get("ignore_index", -100)).sum() / num_items_in_batch
