"""Loss-free balancing inside `Trainer`: the load of the experts counted in training, and the routers' bias moved against it."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .balance import seen_tokens, sequence_ids

logger = logging.get_logger(__name__)


def routers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name -> router of every MoE layer, found by what it has: classes loaded as remote code are others than ours.

    Of a router that PEFT copied (`modules_to_save`), the copy.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if "e_score_correction_bias" in module._buffers and hasattr(module, "top_k") and hasattr(module, "num_experts")
    }
    copies = {name.rpartition(".modules_to_save.")[0] for name in found if ".modules_to_save." in name}
    return {name: module for name, module in found.items() if name.removesuffix(".original_module") not in copies}


def drops(router: torch.nn.Module) -> bool:
    """Whether it drops visits to experts in training."""
    return bool(getattr(router, "capacity_factor", None))


class ExpertLoad:
    """Counts how often each router of `model` chose each expert, in forward passes that train.

    Padding is left out, and what an MTP layer reads beyond the end of a sequence. What gradient checkpointing computes again in
    the backward pass is outside of the model's forward and not counted twice. Since the last `reset`, `counts`: name of the
    router -> `[E]`, and `dropped`: name -> how many of these visits `moe_capacity_factor` dropped, whose gate is 0. `detach`
    ends it.
    """

    def __init__(self, model: torch.nn.Module):
        self.routers, self.counting, self.ids = routers_of(model), False, None
        self.counts: dict[str, torch.Tensor] = {}
        self.dropped: dict[str, torch.Tensor] = {}
        self.reset()
        self.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for name, router in self.routers.items():
            self.hooks.append(router.register_forward_hook(self._counter(name)))

    def reset(self) -> None:
        for name, router in self.routers.items():
            self.counts[name] = torch.zeros(router.num_experts, device=router.weight.device)
            self.dropped[name] = torch.zeros((), device=router.weight.device)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | kwargs
        self.counting = model.training and torch.is_grad_enabled()  # rollouts of TRL are in training mode, too
        like = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        self.ids = sequence_ids(like, given.get("attention_mask"), given.get("position_ids"))

    def _end(self, *_call) -> None:
        self.counting = False

    def _counter(self, name: str):
        @torch.no_grad()  # what autograd kept here, a checkpoint would miss when it computes the layer again
        def count(router: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            if not self.counting:
                return
            depth = getattr(router, "depth", 0)  # routers of other classes are in main layers
            seen = seen_tokens(self.ids, inputs[0].shape[1], depth).to(output[2].device)
            gates, chosen = output[1][seen], output[2][seen]
            self.counts[name] += torch.bincount(chosen.flatten(), minlength=router.num_experts)
            if drops(router):
                self.dropped[name] += (gates == 0).sum()

        return count


def max_violation(counts: torch.Tensor) -> float:
    """MaxVio of `counts` `[E]`: (largest - mean) / mean, 0 at balance (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing")."""
    mean = counts.float().mean()
    return ((counts.max() - mean) / mean.clamp(min=1e-20)).item()


def load_entropy(counts: torch.Tensor) -> float:
    """Entropy of the shares of `counts` `[E]`, over that of equal ones: 1 at balance."""
    shares = counts.float() / counts.sum().clamp(min=1)
    return (torch.special.entr(shares).sum() / torch.tensor(float(len(counts))).log()).item()


class ExpertLoadCallback(TrainerCallback):
    """Counts the load of the experts while `Trainer` runs, for every model with routed experts; changes nothing.

    Beside `loss` are logged, as means over the layers, `maxvio_batch` of the last step, `maxvio` and `load_entropy` of all steps
    since the last log, and, with `moe_capacity_factor`, `dropped_share` of the visits to experts. The load is that of all
    micro-batches and ranks. [`expert_load`] has the sum over the run.

    Raises:
        ValueError: when training begins, for a model without routed experts.
    """

    def __init__(self):
        self.load: ExpertLoad | None = None
        self.last: dict[str, torch.Tensor] = {}
        self.run: dict[str, torch.Tensor] = {}
        self.total: dict[str, torch.Tensor] = {}
        self.dropped: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        routers = self.routers_of(model)
        if self.load is not None:  # of a run that an error ended
            self.load.detach()
        self.load = ExpertLoad(model)
        self.load.routers = routers
        self.total, self.dropped, self.run = {}, {}, {}

    def routers_of(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The routers whose load is counted."""
        routers = routers_of(model)
        if not routers:
            raise ValueError(
                f"{type(self).__name__}: {type(model).__name__} has no routed experts (config.n_routed_experts). Leave the "
                "callback out."
            )
        return routers

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for name, router in self.load.routers.items():
            counts, dropped = self.load.counts[name], self.load.dropped[name]
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(dropped)
            self.step_end(router, counts)
            self.total[name] = self.total.get(name, 0) + counts
            self.run[name] = router.expert_load = self.run.get(name, 0) + counts
            self.dropped[name] = self.dropped.get(name, 0) + dropped
        self.last = dict(self.load.counts)
        self.load.reset()

    def step_end(self, router: torch.nn.Module, counts: torch.Tensor) -> None:
        """What is done with a router at the end of a step, in which it chose the experts as often as `counts` `[E]` says."""

    def on_train_end(self, args, state, control, **kwargs):
        self.load.detach()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self.total:
            return
        found = {
            "maxvio_batch": _mean(max_violation, self.last),
            "maxvio": _mean(max_violation, self.total),
            "load_entropy": _mean(load_entropy, self.total),
        }
        if any(map(drops, self.load.routers.values())):
            visits, dropped = (sum(each.sum().item() for each in of.values()) for of in (self.total, self.dropped))
            found["dropped_share"] = dropped / visits if visits else float("nan")
        found |= self.more_to_log()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        self.total, self.dropped = {}, {}

    def more_to_log(self) -> dict[str, float]:
        return {}


class RouterBiasCallback(ExpertLoadCallback, ExportableState):
    """Moves `e_score_correction_bias` of every router against its load, once per optimiser step (DeepSeek-V3 report, 2.1.2).

    The bias has no gradient and no weight decay, is saved with the model, and also in the state of Trainer, since an adapter's
    checkpoint does not hold it: who loads that adapter has the bias of the base model, unless `modules_to_save=["gate"]` puts the
    routers into it, or the adapter is merged and the model saved. Logs what [`ExpertLoadCallback`] does, and `router_bias_range`,
    the largest minus the smallest bias of any layer.

    Args:
        update_speed: what is added to the bias of an expert under the mean load, and taken from one above (V3: 0.001).
        proportional: add `update_speed` times the relative violation (mean - load) / mean instead of its sign.

    Raises:
        ValueError: for a speed that is negative; when training begins, for a model whose routers have no bias, and for adapters
            that are resumed without the bias they were trained beside.
    """

    def __init__(self, update_speed: float = 1e-3, proportional: bool = False):
        if update_speed < 0:
            raise ValueError(f"update_speed is not negative, got {update_speed!r}.")
        super().__init__()
        self.update_speed, self.proportional = update_speed, proportional

    def state(self) -> dict:
        routers = {} if self.load is None else self.load.routers
        return {
            "args": {"update_speed": self.update_speed, "proportional": self.proportional},
            "attributes": {"biases": {name: each.e_score_correction_bias.tolist() for name, each in routers.items()}},
        }

    def routers_of(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        routers = {name: each for name, each in routers_of(model).items() if each.e_score_correction_bias is not None}
        if not routers:
            raise ValueError(
                f"RouterBiasCallback: no router of {type(model).__name__} has a bias (topk_method 'noaux_tc'). Balance with "
                "config.aux_loss_alpha, and count with ExpertLoadCallback."
            )
        return routers

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        if hasattr(model, "peft_config") and not all(".modules_to_save." in name for name in self.load.routers):
            logger.warning_once(
                "RouterBiasCallback moves the bias of the base model, which the adapter does not hold: who loads the adapter has "
                "another model. Give modules_to_save=['gate'], or merge the adapter and save the model."
            )
        if state.global_step:
            self._resume(state, model)

    def _resume(self, state, model: torch.nn.Module) -> None:
        routers, stored = self.load.routers, state.stateful_callbacks.get(type(self).__name__, {})
        stored = stored[0] if isinstance(stored, list) else stored
        biases = stored.get("attributes", {}).get("biases", {})
        if not biases and hasattr(model, "peft_config"):
            raise ValueError(
                "RouterBiasCallback: this checkpoint of an adapter has no router bias in its trainer_state.json, and the adapter "
                "was trained beside one: resume from a checkpoint that a run with this callback saved, or without the callback."
            )
        for name, values in biases.items():
            if name not in routers:
                raise ValueError(
                    f"RouterBiasCallback: the state of Trainer has a bias of {name}, which this model has not: resume with the "
                    "model that was trained."
                )
            bias = routers[name].e_score_correction_bias
            bias.copy_(torch.tensor(values, dtype=bias.dtype))

    def step_end(self, router: torch.nn.Module, counts: torch.Tensor) -> None:
        error = counts.mean() - counts
        step = error / counts.mean().clamp(min=1) if self.proportional else error.sign()
        router.e_score_correction_bias += self.update_speed * step

    def more_to_log(self) -> dict[str, float]:
        biases = [router.e_score_correction_bias for router in self.load.routers.values()]
        return {"router_bias_range": max((bias.max() - bias.min()).item() for bias in biases)}


def _mean(measure, counts: dict[str, torch.Tensor]) -> float:
    return sum(map(measure, counts.values())) / len(counts)


def expert_load(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name of each router -> how often it chose each expert `[E]` in the last run with one of these callbacks, over its
    steps and ranks.

    Raises:
        ValueError: when nothing was counted.
    """
    found = {name: router.expert_load for name, router in routers_of(model).items() if hasattr(router, "expert_load")}
    if not found:
        raise ValueError("No load was counted: train with ExpertLoadCallback() or RouterBiasCallback().")
    return found


def plot_expert_load(load: dict[str, torch.Tensor], path) -> None:
    """Writes a picture to `path`: layers by experts, in colour the load over its mean.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_expert_load draws with matplotlib: pip install matplotlib.") from error
    relative = torch.stack([counts.float().cpu() / counts.float().mean().cpu() for counts in load.values()])
    figure = Figure(figsize=(10, 1 + 0.3 * len(relative)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set(
        xlabel="expert", ylabel="layer", yticks=range(len(load)), yticklabels=[name.split(".")[-3] for name in load]
    )
    figure.colorbar(image, label="load / mean")
    figure.savefig(path)
