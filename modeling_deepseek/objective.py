"""What a causal model is trained on: next tokens, those of the MTP depths, and balanced experts."""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import logging

from .attention import plain_weight
from .balance import Routing, new_routing, share_of_step, targets_of
from .loss import causal_lm_loss, loss_of_states, loss_of_weight, shifted
from .mtp import mtp_targets

logger = logging.get_logger(__name__)


@torch.compiler.assume_constant_result
def takes_shift_labels(function: Callable) -> bool:
    return "shift_labels" in inspect.signature(function).parameters


class TrainingObjectiveMixin:
    """The parts of a causal model's loss, beside its `config` and `lm_head`."""

    @property
    def loss_function(self):
        """What was set; else transformers' loss, without logits in fp32 that are all there at once."""
        chosen = super().loss_function
        return causal_lm_loss if chosen is ForCausalLMLoss and "_loss_function" not in vars(self) else chosen

    @loss_function.setter
    def loss_function(self, value) -> None:
        self._loss_function = value

    def _lm_loss(self, states, logits, labels, **kwargs) -> torch.Tensor:
        """The next-token loss of `logits` `[B, S, V]`; `None`: of what the head makes of `states` `[B, S, d]`, in pieces."""
        if logits is not None:
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kwargs["vocab_size"] = self.config.vocab_size
        targets, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        ignored = kwargs.get("ignore_index", -100)
        if targets is None:
            targets = shifted(labels, ignored)
        if items is None:
            items = (targets != ignored).sum()
        if not takes_shift_labels(self.loss_function):
            raise ValueError(
                f"config.training_logits is False, and the model's loss function, {self.loss_function}, takes no shift_labels, so "
                "that it cannot be computed in pieces: set training_logits to True."
            )
        return self._loss_of_states(states, targets.to(states.device), items, **kwargs)

    def _loss_of_states(self, states: torch.Tensor, targets: torch.Tensor, items, **kwargs) -> torch.Tensor:
        """The loss of what the head makes of `states` `[B, S, d]`, whose logits are never all there."""
        head, chosen, loss = self.lm_head, self._loss_of_rows(), None
        weight = plain_weight(head) if chosen is causal_lm_loss and type(head) is nn.Linear else None
        if weight is not None and head.bias is None and weight.device == states.device:
            loss = loss_of_weight(weight, states, targets, items, kwargs.get("ignore_index", -100))
        return loss_of_states(head, chosen, states, targets, items, **kwargs) if loss is None else loss

    def _loss_of_rows(self):
        """The loss function where it takes logits and targets that lie behind each other; else cross entropy."""
        chosen = self.loss_function
        return chosen if takes_shift_labels(chosen) else causal_lm_loss

    def _mtp_loss(
        self,
        depths,
        mtp_logits,
        labels,
        attention_mask,
        position_ids,
        shift_labels=None,
        num_items_in_batch=None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """One loss per depth, over the targets that exist: none of or on padding, none in another packed document.

        `depths` are the states `[B, T - k, d]` in front of the head. Logits that nobody asked for are made in pieces: the
        vocabulary is too wide to keep them.
        """
        ignored, packed = kwargs.pop("ignore_index", -100), None
        if shift_labels is not None:
            labels = nn.functional.pad(shift_labels, (1, 0), value=ignored)[:, :-1]
        labels = labels.masked_fill(labels == ignored, -100)
        if position_ids is not None and attention_mask is None:
            packed = find_packed_sequence_indices(position_ids.expand(labels.shape[0], -1))

        kwargs["vocab_size"] = self.config.vocab_size
        losses = []
        for depth, states in enumerate(depths, start=1):
            targets = mtp_targets(labels, depth, packed)
            if attention_mask is not None and attention_mask.ndim == 2:
                width = targets.shape[1]
                reached = nn.functional.pad(attention_mask[:, depth + 1 :], (0, 1))[:, :width]
                targets = targets.masked_fill((attention_mask[:, :width] == 0) | (reached == 0), -100)
            items = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            if mtp_logits is None:
                losses.append(self._loss_of_states(states, targets, items, **kwargs))
                continue
            given = dict(shift_labels=targets, num_items_in_batch=items)
            losses.append(self._loss_of_rows()(logits=mtp_logits[depth - 1], labels=None, **given, **kwargs))
        return tuple(losses)

    def shared_routing(
        self,
        like: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
    ) -> Routing | None:
        """What the routers of one pass in training share, for balance losses and capacities; `None` where nobody asks.

        `like` `[B, S, ...]`: the tokens or their embeddings.
        """
        config = self.config
        if not self.training:
            return None
        drops = config.n_routed_experts and config.moe_capacity_factor and past_key_values is None
        if any(config.balance_factors) or drops:  # with a cache it is a rollout in training mode, as TRL makes them
            return new_routing(config, like, attention_mask, position_ids)
        return None

    def with_balance_loss(
        self, loss: torch.Tensor | None, routing: Routing, labels: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`loss` with the balance losses of this pass in it, and these alone, if any are asked for; closes `routing`."""
        config, aux_loss = self.config, None
        if any(config.balance_factors):
            groups = (config.n_group or 1, config.topk_group or config.n_group or 1)
            targets = None if labels is None else targets_of(labels, **kwargs)
            parts = routing.losses(config.seq_aux, *groups, targets)
            aux_loss = (parts * parts.new_tensor(config.balance_factors)).sum()
        routing.close()
        if aux_loss is not None and loss is not None:
            if loss.requires_grad and not aux_loss.requires_grad:
                logger.warning_once(
                    "The balance losses carry no gradient here. Gradient checkpointing hides it unless "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            loss = loss + (aux_loss * share_of_step(labels, **kwargs)).to(loss.device)
        return loss, aux_loss
