"""A latent cache on disk: one safetensors file of its tensors as they lie in memory, and what they belong to."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT, VERSION = "deepseek_latent_cache", "1"
# What a file says about its tensors. An empty model_type belongs to a cache that was built without a config.
FIELDS = ("model_type", "layers", "kv_lora_rank", "qk_rope_head_dim", "dtype", "bits", "batch", "tokens")


def write_cache(path: str | os.PathLike, tensors: dict[str, torch.Tensor], fields: dict) -> None:
    """Writes `tensors` and `fields` (all of [`FIELDS`]); nothing half-written is ever called `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"format": FORMAT, "version": VERSION} | {name: str(fields[name]) for name in FIELDS}
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_cache(path: str | os.PathLike, device: str | torch.device) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the fields, with numbers as `int` and the dtype as `torch.dtype`.

    Raises:
        FileNotFoundError: without the file.
        ValueError: for a file that is damaged, is none of a cache, or has another format version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no cache at {path}: write it with LatentCache.save.")
    broken = f"{path} is damaged or incomplete ({{}}): write it again."
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(broken.format(error)) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no cache that LatentCache.save has written: pass the path of one.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {metadata.get('version')} of the format, and this code reads {VERSION}: write it again with the "
            "modeling_deepseek that reads it."
        )
    try:
        fields = {name: metadata[name] for name in FIELDS}
        fields |= {
            name: int(fields[name]) for name in ("layers", "kv_lora_rank", "qk_rope_head_dim", "batch", "tokens")
        }
        fields["dtype"] = getattr(torch, fields["dtype"].removeprefix("torch."))
        fields["bits"] = None if fields["bits"] == "None" else int(fields["bits"])
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(broken.format(error)) from error
    return tensors, fields


def check_prefix(path: str | os.PathLike, held: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """Raises `ValueError` unless all rows of `input_ids` `[B, S]` begin with those of `held`, `[B or 1, T]`, and go on."""
    if held is None:
        raise ValueError(
            f"{path} does not say which tokens it holds, so that they cannot be compared: save it with input_ids, or load it "
            "without."
        )
    tokens, held = held.shape[1], held.to(input_ids.device)
    if input_ids.shape[1] <= tokens:
        raise ValueError(
            f"{path} holds {tokens} tokens, and input_ids has {input_ids.shape[1]}: pass a prompt that goes on behind them, or "
            "crop the cache."
        )
    if len(held) not in (1, len(input_ids)):
        raise ValueError(
            f"{path} holds {len(held)} rows, and input_ids has {len(input_ids)}: load it without input_ids."
        )
    wrong = (input_ids[:, :tokens] != held).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"input_ids begins with other tokens than {path}: the first that differs is row {row}, token {place}. Use the prompt "
            "whose beginning was saved, or fill a new cache."
        )
