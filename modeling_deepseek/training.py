"""Callbacks for `Trainer`. They find what they work on by what it can do, so that they serve models loaded as remote code too."""

from itertools import pairwise

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from .ema import EMACallback, ema_weights
from .load_balance import ExpertLoadCallback, RouterBiasCallback, expert_load, plot_expert_load
from .schedules import (
    BatchRampTrainer,
    batch_size_ramp,
    multi_step_schedule,
    parameter_groups,
    v3_schedule,
)


class MTPLossWeightCallback(TrainerCallback):
    """Steps `config.mtp_loss_weight` while `Trainer` runs; a resumed run has the weight of its place.

    DeepSeek-V3 used 0.3 for the first 10 of its 14.8 trillion tokens and 0.1 for the rest (report, section 4.2):

        MTPLossWeightCallback({0: 0.3, 10_000_000_000_000: 0.1}, unit="tokens")

    Args:
        weights: weight by the number of steps or tokens from which it holds; the first is 0.
        unit: "steps" (of the optimiser) or "tokens", which Trainer counts under `include_num_input_tokens_seen`.

    Raises:
        ValueError: for weights that do not start at 0, are out of order or negative; for another unit; when training begins, for
            a model without MTP layers, for tokens that are not counted, and where Trainer keeps the labels from the model.
    """

    def __init__(self, weights: dict[int, float], unit: str = "steps"):
        if unit not in ("steps", "tokens"):
            raise ValueError(f"unit is 'steps' or 'tokens', got {unit!r}.")
        if next(iter(weights), None) != 0 or any(later <= earlier for earlier, later in pairwise(weights)):
            raise ValueError(f"weights begin at 0 and go up, as in {{0: 0.3, 1000: 0.1}}; got {weights!r}.")
        if not all(weight >= 0 for weight in weights.values()):
            raise ValueError(f"The weight of a loss is not negative, got {weights!r}.")
        self.weights, self.unit = weights, unit

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not getattr(model.config, "num_nextn_predict_layers", 0):
            raise ValueError(
                f"MTPLossWeightCallback: {type(model).__name__} has no MTP layers (config.num_nextn_predict_layers). Leave the "
                "callback out, or add layers with model.add_mtp_layers()."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"MTPLossWeightCallback: under label_smoothing_factor={args.label_smoothing_factor} Trainer computes the loss "
                "itself, without the MTP layers: set it to 0."
            )
        if self.unit == "tokens" and args.include_num_input_tokens_seen in (False, "no"):
            raise ValueError(
                "MTPLossWeightCallback(unit='tokens') reads the tokens that Trainer counts: set "
                "TrainingArguments(include_num_input_tokens_seen='all'), or give steps."
            )
        self.on_step_begin(args, state, control, model=model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        done = state.global_step if self.unit == "steps" else state.num_input_tokens_seen
        model.config.mtp_loss_weight = [weight for start, weight in self.weights.items() if start <= done][-1]


class LossPartsCallback(TrainerCallback):
    """Logs what `loss` is made of beside it: `lm_loss`, `mtp_loss` or one `mtp_loss_k` per depth, and `aux_loss`.

    They are means since the last log, over all ranks, on the scale of `loss`; a step without MTP loss counts as 0. `aux_loss`, the
    balance losses with their factors, is the plain mean over forward passes. Reporters of `report_to` hear of a log before the
    callbacks that are passed to `Trainer`; to have the parts in them too, put this one first:
    `trainer.callback_handler.callbacks.insert(0, LossPartsCallback())`.
    """

    def __init__(self):
        self.sums, self.aux, self.hook = None, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # of a run that an error ended
        self.sums = self.aux = None
        self.hook = model.register_forward_hook(self._add)

    def on_train_end(self, args, state, control, **kwargs):
        if self.hook is not None:
            self.hook.remove()

    def _add(self, model: torch.nn.Module, _inputs: tuple, output) -> None:
        if not model.training or getattr(output, "lm_loss", None) is None:
            return
        parts = torch.stack([output.loss, output.lm_loss, *(output.mtp_loss or ())]).detach().float()
        if self.sums is not None and len(self.sums) != len(parts):  # the weight of the MTP loss was 0
            parts = torch.nn.functional.pad(parts, (0, max(0, len(self.sums) - len(parts))))
            self.sums = torch.nn.functional.pad(self.sums, (0, max(0, len(parts) - len(self.sums))))
        self.sums = parts if self.sums is None else self.sums + parts
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None:
            aux = torch.stack([aux_loss.detach().float(), parts.new_ones(())])
            self.aux = aux if self.aux is None else self.aux + aux

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.sums is None or "loss" not in logs:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
            if self.aux is not None:
                dist.all_reduce(self.aux)
        total, lm_loss, *mtp_loss = self.sums.tolist()
        # Trainer has averaged `loss` over steps, micro-batches and ranks in its own way: the parts follow in proportion
        scale = logs["loss"] / total if total else 0.0
        names = ["mtp_loss"] if len(mtp_loss) == 1 else [f"mtp_loss_{depth}" for depth in range(1, len(mtp_loss) + 1)]
        parts = {"lm_loss": lm_loss * scale} | {name: x * scale for name, x in zip(names, mtp_loss, strict=True)}
        if self.aux is not None:
            aux, passes = self.aux.tolist()
            parts["aux_loss"] = aux / passes
        logs.update(parts)
        if state.log_history:
            state.log_history[-1].update(parts)
        self.sums = self.aux = None


class ModelLossMixin:
    """In front of TRL's `SFTTrainer`, makes the loss the model's own, with the MTP and balance losses that are part of it.

        class ChatTrainer(ModelLossMixin, SFTTrainer): ...

    TRL computes its loss from the decoder's states alone. Packing, padding-free batches and assistant masks work as there;
    its metrics (entropy, token accuracy) are not logged, and the logits of all tokens are made.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


__all__ = [
    "BatchRampTrainer",
    "EMACallback",
    "ExpertLoadCallback",
    "LossPartsCallback",
    "MTPLossWeightCallback",
    "ModelLossMixin",
    "RouterBiasCallback",
    "batch_size_ramp",
    "ema_weights",
    "expert_load",
    "multi_step_schedule",
    "parameter_groups",
    "plot_expert_load",
    "v3_schedule",
]
