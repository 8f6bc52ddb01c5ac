"""DeepSeek-LLM between `model_type: llama` and ours, "deepseek": the same tensors under the same names, another config."""

import dataclasses
import os
from typing import Any

from transformers import LlamaConfig

from modeling_deepseek import DeepseekConfig
from modeling_deepseek.conversion.family import check_shapes, family_config
from modeling_deepseek.conversion.folder import CheckpointFolder
from modeling_deepseek.conversion.quantization import copied
from modeling_deepseek.conversion.writer import MAX_SHARD_SIZE, convert, index_of, split, to_json
from modeling_deepseek.hub import auto_map_for, code_files

ARCHITECTURES = {"llama": "LlamaForCausalLM", "deepseek": "DeepseekForCausalLM"}
CONFIGS = {"llama": LlamaConfig, "deepseek": DeepseekConfig}
AUTO_MAP = auto_map_for("deepseek")
OWN_ROPE = ("mscale", "mscale_all_dim")  # what the two classes read differently


def from_llama(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    jobs: int = 2,
) -> None:
    """Make a checkpoint of `DeepseekForCausalLM`, with the code for `trust_remote_code=True`, of one of `LlamaForCausalLM`.

    Raises:
        ValueError: for what is no plain Llama: another architecture, quantised, tensors that Llama does not have, YaRN with
            an `mscale`; and as [`writer.convert`].
    """
    code = {file.name: file.read_bytes() for file in code_files()}
    change_config(source, destination, "llama", "deepseek", code, max_shard_size, jobs)


def to_llama(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    jobs: int = 2,
) -> None:
    """Make a checkpoint of `LlamaForCausalLM` of a dense one of `DeepseekForCausalLM`; the code does not go along.

    Raises:
        ValueError: for a model with experts or MTP layers, quantised, with tensors that Llama does not have, YaRN with an
            `mscale`, and as [`writer.convert`].
    """
    change_config(source, destination, "deepseek", "llama", {}, max_shard_size, jobs)


def change_config(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    old: str,
    new: str,
    code: dict[str, bytes],
    max_shard_size: int | str,
    jobs: int,
) -> None:
    """Copy every tensor; config.json changes from `model_type` `old` to `new`."""
    folder = CheckpointFolder(source)
    check_plain(folder, old)
    fields = config_of(folder.config, old, new)
    check_architecture(folder, fields if new == "deepseek" else folder.config)
    shards = split([copied(folder, name) for name in folder.tensors], max_shard_size)
    last = {**code, **index_of(shards), "config.json": to_json(fields)}
    options = {"command": f"{'from' if old == 'llama' else 'to'}-llama"}
    convert(folder, destination, shards, last, options, jobs, without={file.name for file in code_files()})


def check_plain(folder: CheckpointFolder, model_type: str) -> None:
    """The config is one of a causal model of `model_type`, not quantised."""
    expected = {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], "quantization_config": None}
    for name, value in expected.items():
        found = folder.config.get(name, value if name == "architectures" else None)
        if found != value:
            raise ValueError(f"{folder.path / 'config.json'}: {name} is {found!r}, expected {value!r}")


def check_architecture(folder: CheckpointFolder, fields: dict[str, Any]) -> None:
    """`fields`, in our spelling, describe what both classes compute alike, and the folder holds all of its tensors."""
    path, config = folder.path / "config.json", family_config(fields, folder.path / "config.json")
    rope = config.rope_parameters or {}
    foreign = {name: rope.get(name) for name in OWN_ROPE}
    foreign |= {name: getattr(config, name) or None for name in ("n_routed_experts", "num_nextn_predict_layers")}
    for name, value in foreign.items():
        if value is not None:
            raise ValueError(f"{path}: {name} is {value}, which a plain Llama does not have")
    check_shapes({name: header.shape for name, header in folder.tensors.items()}, config, folder.path, path)


def config_of(fields: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """`fields` of config.json for the class `new`: what they leave to a default of `old` that `new` does not share is written out,
    what only `old` knows is left out."""
    before, after = (
        {field.name: field.default for field in dataclasses.fields(CONFIGS[model_type])} for model_type in (old, new)
    )
    differing = {name: value for name, value in before.items() if name in after and value != after[name]}
    kept = {name: value for name, value in fields.items() if name in after or name not in before}
    auto_map = {auto: name for auto, name in (fields.get("auto_map") or {}).items() if AUTO_MAP.get(auto) != name}
    auto_map |= AUTO_MAP if new == "deepseek" else {}
    kept = {**differing, **kept, "architectures": [ARCHITECTURES[new]], "model_type": new, "auto_map": auto_map}
    return {name: value for name, value in kept.items() if name != "auto_map" or value}
