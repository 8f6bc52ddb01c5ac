"""Between a checkpoint in the official layout and a model: what must be there, what may be absent, what is written twice."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

# On disk an MTP layer repeats the embedding and the head, which it shares with the main model in memory.
SHARED_MTP_WEIGHTS = {"embed_tokens.weight": "embed_tokens", "shared_head.head.weight": "lm_head"}

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")


def layer_index(key: str) -> int:
    """The number behind `layers.` in a tensor name, -1 where there is none."""
    found = _LAYER.search(key)
    return int(found.group(1)) if found else -1


def safetensors_shapes(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the files, from their headers alone.

    Raises:
        ValueError: for a truncated or otherwise unreadable file, and for a tensor that is in two of them, by name.
    """
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error}): download or copy it again."
            ) from error
        repeated = sorted(shapes.keys() & found.keys())
        if repeated:
            raise ValueError(f"{path} holds {repeated[0]}, which another file holds too: remove it from one of them.")
        shapes |= found
    return shapes


def check_index(files: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` for a tensor that the index beside `files` lists and none of them holds, by name."""
    index = Path(files[0]).parent / SAFE_WEIGHTS_INDEX_NAME
    if len(files) < 2 or not index.is_file():
        return
    for name, file in json.loads(index.read_text())["weight_map"].items():
        if name not in shapes:
            raise ValueError(f"{index} puts {name} into {file}, which does not hold it: download or copy both again.")


def check_experts(config, num_layers: int, shapes: dict[str, tuple[int, ...]], ignore_sizes: bool = False) -> None:
    """Every MoE layer that a checkpoint holds must hold all its experts, each of the right shape, before they are fused.

    With `ignore_sizes` the shapes are left to transformers, which initialises what does not fit.

    Raises:
        ValueError: naming the tensors that are missing, in excess or misshapen.
    """
    wide, deep = config.hidden_size, config.moe_intermediate_size
    expected_shape = {"gate": (deep, wide), "up": (deep, wide), "down": (wide, deep)}
    found = {}
    for key, shape in shapes.items():
        match = _EXPERT.search(key)
        if match and int(match.group(1)) < num_layers:
            layer, expert, kind = int(match.group(1)), int(match.group(2)), match.group(3)
            found.setdefault((layer, key[: match.start()]), {})[expert, kind] = (key, shape)
    problems = []
    for (layer, prefix), tensors in sorted(found.items()):
        for expert in range(config.n_routed_experts or 0):
            for kind in expected_shape:
                if (expert, kind) not in tensors:
                    problems.append(f"{prefix}layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight is missing")
        for (expert, kind), (key, shape) in tensors.items():
            if expert >= (config.n_routed_experts or 0):
                problems.append(f"{key} exceeds n_routed_experts {config.n_routed_experts}")
            elif shape != expected_shape[kind] and not ignore_sizes:
                problems.append(f"{key} is {shape}, by the config {expected_shape[kind]}")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(
            f"The experts cannot be fused: {'; '.join(problems[:8])}{more}. Fix the checkpoint or its config.json."
        )


def misfits(mismatched_keys: Iterable[tuple]) -> str:
    """One line for tensors whose shape is not the config's."""
    return "; ".join(
        f"{name}: {tuple(found)} in the checkpoint, {tuple(expected)} by the config"
        for name, found, expected in sorted(mismatched_keys)
    )


def drop_absent_mtp_layers(model: nn.Module, decoder: nn.Module, loading_info) -> None:
    """Turns off MTP layers that the config claims and the checkpoint lacks, with one warning: never random weights.

    Keys of MTP layers that the checkpoint holds and the config turned off are not reported as unexpected.

    Raises:
        ValueError: naming what is missing of an MTP layer that the checkpoint holds in part, or behind a missing one.
    """
    main, claimed = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    absent = sorted(key for key in loading_info.missing_keys if layer_index(key) >= main)
    if absent:
        expected = [key for key in model.state_dict() if layer_index(key) >= main]
        present = {layer_index(key) for key in set(expected) - set(absent)}
        kept = min(map(layer_index, absent)) - main
        if any(layer >= main + kept for layer in present):
            needed = [key for key in absent if layer_index(key) <= max(present)]
            more = f" (and {len(needed) - 8} more)" if len(needed) > 8 else ""
            raise ValueError(
                f"The checkpoint holds MTP layers in part; missing: {', '.join(needed[:8])}{more}. Complete it, or load it without "
                f"them: num_nextn_predict_layers={kept}."
            )
        logger.warning(
            f"config.num_nextn_predict_layers is {claimed}, but the checkpoint has none of the tensors of "
            f"{claimed - kept} MTP layer(s) ({absent[0]}, ...): loaded with {kept}. add_mtp_layers makes new ones."
        )
        if not kept:
            for each in (model, decoder):
                each._no_split_modules.discard(type(decoder.layers[main]).__name__)
        del decoder.layers[main + kept :]
        model.config.num_nextn_predict_layers = kept
        loading_info.missing_keys = {key for key in loading_info.missing_keys if layer_index(key) < main + kept}
    dropped = {layer_index(key) for key in loading_info.unexpected_keys if key.endswith(".eh_proj.weight")}
    loading_info.unexpected_keys = {
        key for key in loading_info.unexpected_keys if layer_index(key) < main or layer_index(key) not in dropped
    }


def with_shared_mtp_weights(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` plus the copies of embedding and head that every MTP layer has on disk."""
    config, prefix = model.config, "" if model.base_model is model else f"{model.base_model_prefix}."
    sources = {"embed_tokens": f"{prefix}embed_tokens.weight", "lm_head": "lm_head.weight"}
    if config.tie_word_embeddings:
        sources["lm_head"] = sources["embed_tokens"]
    state_dict = dict(state_dict)
    main = config.num_hidden_layers
    for layer in range(main, main + config.num_nextn_predict_layers):
        for name, source in SHARED_MTP_WEIGHTS.items():
            weight = state_dict.get(sources[source])
            if weight is not None and weight.device.type == "meta":
                weight = load_offloaded_parameter(model, sources[source])
            if weight is not None:
                state_dict[f"{prefix}layers.{layer}.{name}"] = weight.clone()
    return state_dict
