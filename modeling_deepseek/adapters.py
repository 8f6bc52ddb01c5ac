"""LoRA adapters on disk as DeepSeek checkpoints name their weights: one pair of factors per projection of every expert."""

import copy
import logging
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

logger = logging.getLogger(__name__)


@torch.no_grad()
def save_per_expert(model, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes an adapter of a `PeftModel` in the form that vLLM reads for DeepSeek models; this package reads it too.

    PEFT keeps the factors of all experts of a layer in one tensor, gate and up in one product; here they are
    `...mlp.experts.<e>.gate_proj.lora_A.weight` and so on, three projections for each expert. All factors have the largest rank
    that occurs (2r where routed experts are adapted: start vLLM with that `--max-lora-rank`), the smaller ones filled up with
    zeros, and scales are multiplied into B. The products are the same. MTP layers are left out with a warning.

    Raises:
        ValueError: for what the form cannot hold: DoRA, biases, `modules_to_save`, adapted embeddings; for an unknown adapter.
    """
    base, config = model.get_base_model(), model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(
            f"The model has no adapter {adapter_name!r}: it has {', '.join(map(repr, model.peft_config))}."
        )
    held = {
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
    }
    for name, possible in held.items():
        if getattr(config, name) not in (possible, []):
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no place in an adapter for vLLM: train with {name}={possible!r}, or merge "
                "the adapter with merge_and_unload() and save the model."
            )
    factors = {}
    for path, module in base.named_modules():
        if adapter_name in getattr(module, "lora_embedding_A", ()):
            raise ValueError(
                f"{path} is an embedding, which save_per_expert does not write: merge it with merge_and_unload()."
            )
        if adapter_name in getattr(module, "lora_A", ()):
            factors |= _factors(path.replace(".base_layer", ""), module, adapter_name)
    factors = _without_mtp(factors, base.config.num_hidden_layers)
    _complete_experts(factors)
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors = {}
    for path, (a, b) in factors.items():
        key = f"base_model.model.{path}"
        missing = rank - a.shape[0]
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    _written_config(config, rank, factors).save_pretrained(str(folder))


def _factors(path: str, module, adapter_name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Official module path -> A `[rank, in]` and B `[out, rank]`, scale included, of what `module` adapts."""
    a = module.lora_A[adapter_name].weight.cpu()
    b = module.lora_B[adapter_name].weight.cpu() * module.scaling[adapter_name]
    parameter, experts = getattr(module, "parameter_name", None), getattr(module, "num_experts", 1)
    if parameter not in ("gate_up_proj", "down_proj"):
        return {path: (a, b)}
    a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).movedim(-1, 0)
    names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    return {
        f"{path}.{expert}.{name}": (a[expert], part)
        for expert in range(experts)
        for name, part in zip(names, b[expert].chunk(len(names)), strict=True)
    }


def _without_mtp(factors: dict, num_hidden_layers: int) -> dict:
    def is_mtp(path: str) -> bool:
        layer = re.search(r"\blayers\.(\d+)\.", path)
        return layer is not None and int(layer[1]) >= num_hidden_layers

    left_out = [path for path in factors if is_mtp(path)]
    if left_out:
        logger.warning("%d adapters of MTP layers are not written, as %s.", len(left_out), left_out[0])
    return {path: pair for path, pair in factors.items() if path not in set(left_out)}


def _complete_experts(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """vLLM wants all three projections of an expert or none: those without an adapter get one that adds nothing."""
    experts = {path.rpartition(".")[0] for path in factors if re.search(r"\.experts\.\d+\.", path)}
    for expert in experts:
        gate, down = factors.get(f"{expert}.gate_proj"), factors.get(f"{expert}.down_proj")
        if down is None:
            (inside, outside), width = gate, gate[1].shape[0]
            factors[f"{expert}.down_proj"] = inside.new_zeros(1, width), outside.new_zeros(inside.shape[1], 1)
        if gate is None:
            width, hidden = down[0].shape[1], down[1].shape[0]
            for name in ("gate_proj", "up_proj"):
                factors[f"{expert}.{name}"] = down[0].new_zeros(1, hidden), down[1].new_zeros(width, 1)


def _written_config(config, rank: int, factors: dict):
    config = copy.deepcopy(config)
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.target_modules = {".".join(re.sub(r"\.\d+(?=\.\w+$)", "", path).split(".")[-2:]) for path in factors}
    config.target_parameters = config.layers_to_transform = config.exclude_modules = None
    config.inference_mode = True
    return config
