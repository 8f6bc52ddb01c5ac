"""What the targets of a LoRA adapter mean: every module that they name, the routed experts' fused weights among them, no other.

PEFT rewrites targets by a table keyed on `model_type`, which turns `gate_proj`, `up_proj` and `down_proj` into the routed experts
alone and puts the router into "all-linear"; no list or regex gets around it. So the function that looks into that table is wrapped,
once, when PEFT first asks one of our models for its `peft_config`: a model with a `name_lora_targets` names its own, every other
model goes on to the function as it was.
"""

import copy
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .fp8 import FP8Experts, FP8Linear
from .moe import DeepseekExperts
from .router import DeepseekTopkRouter

logger = logging.get_logger(__name__)

_ATTENTION = r"self_attn\.\w+_proj(_with_mqa)?"
_PRESETS = {
    "attention": _ATTENTION,
    "mlp": r"mlp\.(shared_experts\.)?(gate|up|down)_proj",
    "experts": r"mlp\.experts\.(gate|up|down)_proj",
    "all": rf"({_ATTENTION}|mlp\.(shared_experts\.|experts\.)?(gate|up|down)_proj)",
}
_TABLE = "peft.utils.transformers_weight_conversion"
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_NOT_OF_THE_MODEL = re.compile(r"\.(lora_\w+|modules_to_save|original_module)(\.|$)")


def lora_targets(preset: str) -> dict[str, str]:
    """What to give a `LoraConfig`, as in `LoraConfig(r=16, **lora_targets("all"))`; the same for every family.

    Args:
        preset: "attention" (all its projections, which is also the default), "mlp" (dense MLPs and shared experts), "experts"
            (routed experts) or "all" three. The router, the head and the MTP layers' `eh_proj` are in none of them.

    Raises:
        ValueError: for another preset.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset is one of {', '.join(map(repr, _PRESETS))}; got {preset!r}.")
    return {"target_modules": rf"(.*\.)?{_PRESETS[preset]}"}


class NamesLoraTargets:
    """The class attribute `peft_config` of a model without adapters: absent, and a sign that PEFT is about to put some on it.

    Where there are adapters, PEFT's own attribute of the instance stands before this one.
    """

    def __get__(self, model, owner=None):
        if model is not None and "peft" in sys.modules:
            _wrap_the_table()
        raise AttributeError("peft_config")


def _wrap_the_table() -> None:
    if importlib.util.find_spec(_TABLE) is None:
        logger.warning_once(
            "LoRA targets mean to this PEFT what they name among linear layers only: install peft>=0.20."
        )
        return
    conversion = importlib.import_module(_TABLE)
    original = conversion.convert_peft_config_for_transformers
    if hasattr(original, "asks_the_model"):  # wrapped before, perhaps by another copy of this file
        return

    @functools.wraps(original)
    def convert(peft_config, model, *args, **kwargs):
        if peft_config.peft_type == "LORA" and hasattr(model, "name_lora_targets"):
            return model.name_lora_targets(peft_config)
        return original(peft_config, model, *args, **kwargs)

    convert.asks_the_model = True
    conversion.convert_peft_config_for_transformers = convert


def name_lora_targets(model: PreTrainedModel, config) -> None:
    """Says in PEFT's terms, in place, what the targets of a `LoraConfig` mean in `model`.

    A name (or the end of a path, or a regex) reaches the linear layers that PEFT finds by it; and the routed experts or the router
    where it fits their official keys without the number of the expert: `...mlp.experts.gate_proj`, `...mlp.gate`. "all-linear" is
    every linear layer and routed expert, without router and head.

    Raises:
        ValueError: for a target that fits no name, one of `gate_proj` and `up_proj` of routed experts without the other, and
            what PEFT cannot do on a weight that is no linear layer (dropout, DoRA, bias).
    """
    modules = _modules_of(model)
    if config.target_modules is None and not config.target_parameters:
        found = {path.rpartition(".")[2] for path in modules if re.fullmatch(rf"(.*\.)?{_ATTENTION}", path)}
        config.target_modules = found
    parameters = {f"{path}.{name}": path for path, each in modules.items() for name in each._parameters}
    aliases = _aliases(modules)
    if not config.inference_mode:  # an adapter of elsewhere may name more than is there
        _check_every_name(model, config, [*modules, *aliases], parameters)
    if _is_all_linear(config):
        _exclude_heads(config, modules)
    named = _named_aliases(config, aliases)
    _check_pairs(named)
    chosen = {aliases[alias] for alias in named}
    given = {path for path in parameters if _ends_with_any(path, config.target_parameters or ())}
    _check_parameters(config, {path: modules[parameters[path]] for path in chosen | given})
    _widen_pairs(config, named, aliases)
    if chosen:
        config.target_parameters = sorted({*(config.target_parameters or ()), *_shortest(chosen, parameters)})
    _leave_out_what_is_no_layer(config, modules)
    if any(isinstance(modules[parameters[path]], FP8Experts) for path in chosen | given):
        config._register_custom_module({FP8Experts: _lora_of_kept_experts()})
    if any(isinstance(module, FP8Linear) for module in modules.values()):
        config._register_custom_module({FP8Linear: _lora_of_kept_linear()})


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, adapters that are there already looked through."""
    found = {}
    for path, module in model.named_modules():
        if path and not _NOT_OF_THE_MODEL.search(path):
            found[path.replace(".base_layer", "")] = module  # what is wrapped comes behind its wrapper
    return found


def _aliases(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Official path of what is no module -> path of the parameter that holds it."""
    found = {}
    for path, module in modules.items():
        if isinstance(module, (DeepseekExperts, FP8Experts)):
            found |= {f"{path}.{name}": f"{path}.{fused}" for name, fused in _FUSED.items()}
        elif isinstance(module, DeepseekTopkRouter):
            found[path] = f"{path}.weight"
    return found


def _ends_with_any(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _is_all_linear(config) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _exclude_heads(config, modules: dict[str, nn.Module]) -> None:
    """Of the heads PEFT knows the language model's alone."""
    heads = sorted({"score", "qa_outputs"} & modules.keys())
    if heads and isinstance(config.exclude_modules, str):
        config.exclude_modules = rf"(?:{config.exclude_modules})|{'|'.join(heads)}"
    elif heads:
        config.exclude_modules = {*(config.exclude_modules or ()), *heads}


def _named_aliases(config, aliases: dict[str, str]) -> set[str]:
    peft = importlib.import_module("peft.tuners.tuners_utils")
    if config.target_modules is None:
        return set()
    if _is_all_linear(config):
        config = copy.copy(config)
        config.target_modules = {alias for alias, path in aliases.items() if not path.endswith(".weight")}
    found = {alias for alias in aliases if peft.check_target_module_exists(config, alias)}
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        return {alias for alias in found if not any(re.fullmatch(excluded, path) for path in _paths(alias, aliases))}
    return {alias for alias in found if not any(_ends_with_any(path, excluded) for path in _paths(alias, aliases))}


def _paths(alias: str, aliases: dict[str, str]) -> tuple[str, ...]:
    """By what a user may leave it out: its path, that of the parameter, and that of the module."""
    return alias, aliases[alias], aliases[alias].rpartition(".")[0]


def _check_every_name(model: nn.Module, config, paths: list[str], parameters: Iterable[str]) -> None:
    if isinstance(config.target_modules, str):
        pattern = config.target_modules
        unknown = [] if _is_all_linear(config) or any(re.fullmatch(pattern, path) for path in paths) else [pattern]
    else:
        unknown = [
            name for name in config.target_modules or () if not any(_ends_with_any(path, [name]) for path in paths)
        ]
    if unknown:
        there = sorted({name for path in paths if "_proj" in (name := path.rpartition(".")[2]) or name == "gate"})
        raise ValueError(
            f"target_modules: no module of this {type(model).__name__} is named {', '.join(map(repr, sorted(unknown)))}. It has "
            f"{', '.join(there)}. Leave it out, or take lora_targets('attention' | 'mlp' | 'experts' | 'all')."
        )
    unknown = [
        name for name in config.target_parameters or () if not any(_ends_with_any(path, [name]) for path in parameters)
    ]
    if unknown:
        raise ValueError(
            f"target_parameters: no parameter of this {type(model).__name__} is named {', '.join(map(repr, sorted(unknown)))}. "
            "Routed experts, where there are any, are 'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj', the router is "
            "'mlp.gate.weight'."
        )


def _check_pairs(named: set[str]) -> None:
    for alias in sorted(named):
        path, _, name = alias.rpartition(".")
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(name)
        if other and f"{path}.{other}" not in named:
            raise ValueError(
                f"The targets name {name} of the routed experts ({path}) and not {other}: the two are one weight, gate_up_proj. "
                f"Name both; or, for dense MLPs and shared experts only, 'mlp.{name}' and 'shared_experts.{name}'."
            )


def _check_parameters(config, owners: dict[str, nn.Module]) -> None:
    impossible = {"lora_dropout": 0.0, "use_dora": False, "lora_bias": False}
    for name, possible in impossible.items():
        if owners and getattr(config, name) != possible:
            raise ValueError(
                f"{name}={getattr(config, name)!r} works on linear layers, and the targets name {min(owners)}, which is none: "
                f"set it to {possible!r}, or leave routed experts and router out of the targets, as lora_targets('attention') "
                "and lora_targets('mlp') do."
            )
    if owners and config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} works on linear layers, and the targets name {min(owners)}, which is "
            "none: set it to True, or leave routed experts and router out of the targets."
        )


def _widen_pairs(config, named: set[str], aliases: dict[str, str]) -> None:
    """gate_proj and up_proj of rank r are a gate_up_proj of rank 2r and twice the alpha: PEFT's form, which others read too."""
    pattern_key = importlib.import_module("peft.utils.other").get_pattern_key
    pairs = {alias: aliases[alias] for alias in sorted(named) if alias.endswith(".gate_proj")}
    if not pairs or any(pattern_key(config.rank_pattern, fused) in config.rank_pattern for fused in pairs.values()):
        return  # nothing to say, or said already: by the user, or before the adapter was saved
    wider = 2**0.5 if config.use_rslora else 2  # which divides by the root of the rank
    for patterns, value, factor in (
        (config.rank_pattern, config.r, 2),
        (config.alpha_pattern, config.lora_alpha, wider),
    ):
        own = {}
        for alias, fused in pairs.items():
            both = (alias, alias.removesuffix("gate_proj") + "up_proj")
            said = {patterns[key] for each in both if (key := pattern_key(patterns, each)) in patterns}
            if len(said) > 1:
                raise ValueError(
                    f"rank_pattern or alpha_pattern says {sorted(said)} for gate_proj and up_proj of {fused}, which are one "
                    "weight: give both the same."
                )
            if said:
                own[re.escape(fused)] = factor * said.pop()
        patterns.update(own)
        patterns[r".*\.gate_up_proj"] = factor * value


def _shortest(chosen: set[str], parameters: Iterable[str]) -> set[str]:
    """Ends of paths that fit `chosen` and no other parameter, or where there are none, the paths."""
    ends = {path: ".".join(path.split(".")[-3:]) for path in chosen}
    ambiguous = {
        end
        for end in ends.values()
        if not chosen.issuperset(path for path in parameters if _ends_with_any(path, [end]))
    }
    return {path if end in ambiguous else end for path, end in ends.items()}


def _leave_out_what_is_no_layer(config, modules: dict[str, nn.Module]) -> None:
    """Takes from `target_modules` what reached parameters only, which PEFT would look for among the layers and complain."""
    if config.target_modules is None or _is_all_linear(config):
        return
    routers = {path for path, module in modules.items() if isinstance(module, DeepseekTopkRouter)}
    layers = [path for path in modules if path not in routers]
    pattern = config.target_modules
    if not isinstance(pattern, str):
        kept = {name for name in pattern if any(_ends_with_any(path, [name]) for path in layers)}
        config.target_modules = kept if config.target_parameters else pattern
    elif config.target_parameters and not any(re.fullmatch(pattern, path) for path in layers):
        config.target_modules = set()
    elif any(re.fullmatch(pattern, path) for path in routers):
        config.target_modules = rf"(?!.*\bmlp\.gate$)(?:{pattern})"


@functools.cache
def _lora_of_kept_experts() -> type[nn.Module]:
    """PEFT's adapter of one fused weight, made fit for experts that are kept in FP8: nothing is added to the weight itself.

    PEFT would put `W + BA` in the place of the weight, in FP8; here the experts are handed A and B and add `B(Ax)` to the product.
    """
    base = importlib.import_module("peft.tuners.lora.layer").ParamWrapper

    class ParamWrapper(base):  # PEFT knows its wrappers by this name
        @contextmanager
        def _activate_lora(self, active_adapters: list[str]):
            experts = self.get_base_layer()
            if not isinstance(experts, FP8Experts):  # dequantised since
                with super()._activate_lora(active_adapters):
                    yield
                return
            found = [self._factors(name) for name in active_adapters or () if name in self.lora_A]
            experts.low_rank[self.parameter_name] = found
            try:
                yield
            finally:
                del experts.low_rank[self.parameter_name]

        def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
            a = self.lora_A[adapter_name].weight.unflatten(0, (self.num_experts, -1))
            b = self.lora_B[adapter_name].weight.unflatten(1, (-1, self.num_experts)).movedim(-1, 0)
            return a, b, self.scaling[adapter_name]

        def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
            """To the device only: in the dtype of the weight, FP8, nothing would be learned."""
            weight = self.get_param()
            if weight.dtype != torch.float8_e4m3fn:
                return super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            for factors in (self.lora_A, self.lora_B):
                if factors[adapter_name].weight.device.type != "meta":
                    factors[adapter_name].to(weight.device)

        def merge(self, *args, **kwargs) -> None:
            if isinstance(self.get_base_layer(), FP8Experts):
                raise ValueError("The experts are kept in FP8, " + _NO_MERGE)
            super().merge(*args, **kwargs)

    return ParamWrapper


_NO_MERGE = (
    "into which an adapter does not merge: call dequantize_fp8() of the model first, or load it with "
    "fp8_weights='dequantize'."
)


@functools.cache
def _lora_of_kept_linear() -> type[nn.Module]:
    """PEFT's adapter of a linear layer, which says so when it cannot be merged into a weight that is kept in FP8."""
    base = importlib.import_module("peft.tuners.lora.layer").Linear

    class Linear(base):  # PEFT knows its wrappers by this name
        def __init__(self, *args, parameter_name: str | None = None, **kwargs):
            super().__init__(*args, **kwargs)

        def merge(self, *args, **kwargs) -> None:
            if isinstance(self.get_base_layer(), FP8Linear):
                raise ValueError("The weights are kept in FP8, " + _NO_MERGE)
            super().merge(*args, **kwargs)

    return Linear
