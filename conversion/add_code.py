"""The modeling code put into a model folder, so that it loads with `trust_remote_code=True`."""

import json
import os
from pathlib import Path
from typing import Any

from modeling_deepseek.hub import auto_map_for, code_files, replace_files

LLM_HINT = (
    " A DeepSeek-LLM folder loads with DeepseekForCausalLM.from_pretrained(folder); "
    "what that model saves with save_pretrained carries the code."
)


def add_code(folder: str | os.PathLike[str]) -> list[str]:
    """Put the shipped modeling files into `folder` and name their classes in its config.json.

    Works on official snapshots (in the Hub cache too: links into the blobs are replaced, the blobs stay as they are)
    and on saved models. A file of the same name as a shipped one is replaced. In config.json only `auto_map` changes,
    and of that only the entries of our classes.

    Returns:
        The names of the files written, config.json last; empty when the folder held all of it already.

    Raises:
        ValueError: no such folder, no readable config.json in it, or a `model_type` that is not ours.
            Nothing has been written then.
    """
    folder = Path(folder)
    config = read_config(folder)
    config["auto_map"] = {**auto_map_of(config, folder), **entries_of_ours(config, folder)}
    contents = {path.name: path.read_bytes() for path in code_files()}
    contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    changed = {name: data for name, data in contents.items() if not holds(folder / name, data)}
    replace_files(folder, changed)
    return list(changed)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `folder/config.json`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected the folder of a model, with its config.json")
    path = folder / "config.json"
    if not path.is_file():
        hint = "; this is a Hub cache entry: name one of its snapshots/*" if (folder / "snapshots").is_dir() else ""
        raise ValueError(f"{folder} has no config.json, so it is not the folder of a model{hint}")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object with a model_type")
    return config


def parse_json(data: bytes) -> Any:
    """What `json.loads` makes of `data`.

    Raises:
        ValueError: for what is no JSON, or nested deeper than Python goes.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def auto_map_of(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `auto_map` that the config has so far."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder / 'config.json'}: auto_map is {auto_map!r}; expected an object, or no such field")
    return auto_map


def entries_of_ours(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """The `auto_map` entries of our classes for the config's `model_type`."""
    try:
        return auto_map_for(str(config.get("model_type")))
    except ValueError as error:
        hint = LLM_HINT if config.get("model_type") == "llama" else ""
        raise ValueError(f"{folder / 'config.json'}: {error}{hint}") from error


def holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
