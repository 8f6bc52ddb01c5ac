"""Load of the experts: the balance losses, token dropping, and what the routers of one forward pass leave behind."""

import torch
from torch import nn
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
    weights: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
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
        best `[N, K]`: what the expert-level loss counts in the place of `chosen`.
        weights `[R]`: of each of R sequences in that mean, with a sum of 1; `None`: all alike. One without tokens has a loss of 0.
    """
    experts, top_k = scores.shape[-1], chosen.shape[-1]
    if rows is None:
        rows = chosen.new_zeros(len(chosen))
    if weights is None:
        num_rows = int(rows.max()) + 1 if len(rows) else 1
        weights = scores.new_full((num_rows,), 1 / num_rows)
    num_rows = len(weights)
    tokens = torch.bincount(rows, minlength=num_rows).clamp(min=1)[:, None]
    f = expert_counts(chosen, experts, rows, num_rows) * experts / (top_k * tokens)
    f_best = f if best is None else expert_counts(best, experts, rows, num_rows) * experts / (top_k * tokens)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    p = shares.new_zeros(num_rows, experts).index_add(0, rows, shares) / tokens
    per_group = p.unflatten(-1, (n_group, -1)).sum(-1)
    sent = torch.zeros(len(chosen), n_group, device=chosen.device).scatter(1, chosen // (experts // n_group), 1.0)
    sent = sent.new_zeros(num_rows, n_group).index_add(0, rows, sent) * n_group / (topk_group * tokens)
    expert = (f_best * p).sum(-1) @ weights
    device = (f.unflatten(-1, (n_group, -1)).mean(-1) * per_group).sum(-1) @ weights
    return expert, device, (sent * per_group).sum(-1) @ weights


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
    rank = torch.where(protected[:, None], 2.0, scores).gather(1, chosen).flatten()  # no affinity is over 1
    order = rank.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, the dearest first
    starts = torch.searchsorted(group[order], torch.arange(n_group, device=group.device))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - starts[group[order]]
    return (place < budget).view(tokens, top_k) | protected[:, None]


def sequence_ids(
    like: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """A number per sequence of a batch `like` `[B, S, ...]`, `[B, S]`: rows, or the packed documents in them; -1 for padding.

    Documents are told apart as in attention: where `position_ids` restart and no `attention_mask` is given.
    """
    batch, length = like.shape[:2]
    ids = torch.arange(batch, device=like.device)[:, None].repeat(1, length) * length
    if attention_mask is not None and attention_mask.ndim == 2:
        return ids.masked_fill(attention_mask[:, -length:] == 0, -1)
    if position_ids is not None and attention_mask is None:
        packed = find_packed_sequence_indices(position_ids.expand(batch, -1))
        ids = ids if packed is None else ids + packed
    return ids


def seen_tokens(ids: torch.Tensor, width: int, depth: int = 0) -> torch.Tensor:
    """Which of the first `width` tokens of all rows count at an MTP depth (0: in the main layers), `[B * width]`.

    No padding does, nor a token that is merged with one of padding, of another sequence or behind the end. ids: `sequence_ids`.
    """
    further = torch.full_like(ids, -1)
    further[:, : max(0, ids.shape[1] - depth)] = ids[:, depth:]
    return ((ids == further) & (ids >= 0))[:, :width].flatten()


class Routing:
    """What the routers of one forward pass share. It collects while `open`; a recomputed forward finds it closed.

    No dataclass: FSDP makes copies of those that are arguments of a layer, and what a copy collects is lost.

    ids `[B, S]`: `sequence_ids` of its tokens.
    padded: whether there is padding among them.
    protected `[B]`: sequences of which no token is dropped, or `None` where nothing is.
    """

    def __init__(self, ids: torch.Tensor, padded: bool, protected: torch.Tensor | None = None):
        self.ids, self.padded, self.protected, self.open = ids, padded, protected, True
        self.scores: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []
        self.best: list[torch.Tensor] = []
        self.depths: list[int] = []

    def collect(self, scores: torch.Tensor, chosen: torch.Tensor, best: torch.Tensor, depth: int) -> None:
        """Takes `[B, S', E]` and twice `[B, S', K]` of a router, with S' smaller at the MTP depths."""
        self.scores.append(scores)
        self.chosen.append(chosen)
        self.best.append(best)
        self.depths.append(depth)

    def close(self) -> None:
        """Nothing is collected any more, and what was is let go."""
        self.open = False
        self.scores.clear()
        self.chosen.clear()
        self.best.clear()

    def seen(self, width: int, depth: int, device: torch.device) -> torch.Tensor | slice:
        """[`seen_tokens`] of a router on `device` that reads `width` tokens."""
        return seen_tokens(self.ids, width, depth).to(device) if self.padded or depth else slice(None)

    def losses(
        self, per_sequence: bool, n_group: int, topk_group: int, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums over all routers of the three [`balance_losses`], `[3]`.

        A sequence weighs as much as it has `targets` `[B, S]`, tokens behind which the language model's loss has one (`None`: as
        it has tokens): so the parts of a step (packed rows, micro-batches, ranks) add up to the whole.
        """
        weights = self.ids.new_ones(1, dtype=torch.float32)
        if per_sequence:
            rows = self.ids.unique(return_inverse=True)[1]
            counted = self.ids >= 0 if targets is None else targets & (self.ids >= 0)
            weights = torch.bincount(rows.flatten(), weights=counted.flatten().float())
            weights = weights / weights.sum().clamp(min=1)
        total = 0
        for scores, chosen, best, depth in zip(self.scores, self.chosen, self.best, self.depths, strict=True):
            width, device = scores.shape[1], scores.device  # of a model on several GPUs each layer has its own
            seen = self.seen(width, depth, device)
            of_rows = rows[:, :width].flatten().to(device)[seen] if per_sequence else None
            scores, chosen, best = (each.flatten(0, 1)[seen] for each in (scores, chosen, best))
            found = balance_losses(scores, chosen, of_rows, n_group, topk_group, weights.to(device), best)
            total = total + torch.stack(found).to(self.ids.device)
        return total


def new_routing(
    config: PreTrainedConfig,
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Routing:
    """What the routers share in a training forward over `like` `[B, S, ...]`."""
    padded, protected = attention_mask is not None and attention_mask.ndim == 2, None
    if config.moe_capacity_factor:
        protected = torch.rand(len(like), device=like.device) < NEVER_DROPPED
    return Routing(sequence_ids(like, attention_mask, position_ids), padded, protected)


def targets_of(labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """Behind which tokens `[B, S]` the language model's loss has a target."""
    ignored = kwargs.get("ignore_index", -100)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)
    return shift_labels != ignored


def share_of_step(labels: torch.Tensor, num_items_in_batch=None, **kwargs) -> torch.Tensor | float:
    """How much of an optimiser step these `labels` are: balance losses of its parts are weighted by their targets."""
    if num_items_in_batch is None:
        return 1.0
    return targets_of(labels, **kwargs).sum() / (num_items_in_batch + (num_items_in_batch == 0))
