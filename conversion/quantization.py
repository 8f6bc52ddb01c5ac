"""Block FP8 to bf16 and back, for whole checkpoints: `to_bf16` and `to_fp8`."""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_deepseek.conversion.folder import CheckpointFolder, check_scales, fp8_block_size, fp8_pairs
from modeling_deepseek.conversion.writer import MAX_SHARD_SIZE, Group, Output, convert, index_of, split, to_json
from modeling_deepseek.fp8 import DEFAULT_BLOCK, SCALE_SUFFIX, dequantize, official_fp8_config, quantize
from modeling_deepseek.fp8_checkpoint import FP8_DTYPES

SCALE_FMTS = (None, "ue8m0")
# every Linear of attention and MLPs; not the router `mlp.gate`, `eh_proj`, embeddings and heads
QUANTISED = re.compile(
    r"layers\.\d+\.(self_attn\.(q|k|v|o|q_a|q_b|kv_b)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight$"
)
FLOATS = {"F32", "F16", "BF16"}


def to_bf16(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    jobs: int = 2,
) -> None:
    """Make a bf16 checkpoint of the block-FP8 one in `source`: `W_fp8 * scale` in fp32, then cast; all else as it is.

    Raises:
        ValueError: for a source that is not whole, or has no FP8 weights or wrong scales, and as [`writer.convert`].
    """
    folder = CheckpointFolder(source)
    block_size = fp8_block_size(folder.config, folder.path)
    pairs = fp8_pairs(folder.tensors, block_size)
    if not pairs:
        raise ValueError(f"{folder.path} has no FP8 weights: nothing to make bf16 of")
    check_scales((scale, folder.tensors[scale]) for scale in pairs.values())
    scales, groups = set(pairs.values()), []
    for name, header in folder.tensors.items():
        if name in pairs:
            compute = partial(bf16_of, folder, name, pairs[name], block_size)
            groups.append(Group((Output(name, "BF16", header.shape),), compute))
        elif name not in scales:
            groups.append(copied(folder, name))
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    config |= dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"], "bfloat16")
    write(folder, destination, groups, config, {"command": "to-bf16"}, max_shard_size, jobs)


def to_fp8(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    scale_fmt: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    jobs: int = 2,
) -> None:
    """Make a block-FP8 checkpoint (E4M3, blocks of 128 x 128, fp32 scales) of the one in `source`, in the official layout.

    Quantised are the Linear weights of attention, MLPs, experts and shared experts, in MTP layers too; all else stays as it is.

    Args:
        scale_fmt: `"ue8m0"` rounds every scale up to a power of two, as in V3.1.

    Raises:
        ValueError: for a source that is not whole, is FP8 already, or has nothing to quantise, and as [`writer.convert`];
            for a weight that is not finite, when it is met.
    """
    if scale_fmt not in SCALE_FMTS:
        raise ValueError(f"scale_fmt is {scale_fmt!r}; expected 'ue8m0', or None for scales that are not rounded")
    folder = CheckpointFolder(source)
    fp8 = [name for name, header in folder.tensors.items() if header.dtype in FP8_DTYPES]
    if fp8 or "quantization_config" in folder.config:
        found = f"{fp8[0]} is FP8" if fp8 else "config.json has a quantization_config"
        raise ValueError(f"{folder.path} is quantised already, {found}: make it bf16 first (to-bf16)")
    groups = []
    for name, header in folder.tensors.items():
        if QUANTISED.search(name) and header.dtype in FLOATS and len(header.shape) == 2:
            grid = tuple(-(-size // block) for size, block in zip(header.shape, DEFAULT_BLOCK, strict=True))
            outputs = (Output(name, "F8_E4M3", header.shape), Output(name + SCALE_SUFFIX, "F32", grid))
            groups.append(Group(outputs, partial(fp8_of, folder, name, scale_fmt)))
        else:
            groups.append(copied(folder, name))
    if all(len(group.outputs) == 1 for group in groups):
        raise ValueError(
            f"{folder.path} has none of the weights that FP8 is for, such as model.layers.0.mlp.up_proj.weight"
        )
    config = {**folder.config, "quantization_config": official_fp8_config(scale_fmt)}
    write(folder, destination, groups, config, {"command": "to-fp8", "scale_fmt": scale_fmt}, max_shard_size, jobs)


def write(
    folder: CheckpointFolder,
    destination: str | os.PathLike[str],
    groups: list[Group],
    config: dict[str, Any],
    options: dict[str, Any],
    max_shard_size: int | str,
    jobs: int,
) -> None:
    """A checkpoint in the Hub layout: shards, index if there are several, config.json."""
    if not folder.config:
        raise ValueError(f"{Path(folder.path) / 'config.json'} is missing: download it again")
    shards = split(groups, max_shard_size)
    convert(folder, destination, shards, {**index_of(shards), "config.json": to_json(config)}, options, jobs)


def copied(folder: CheckpointFolder, name: str) -> Group:
    """A tensor as it is in the source."""
    header = folder.tensors[name]
    return Group((Output(name, header.dtype, header.shape),), lambda: [pieces_of(folder, name)])


def pieces_of(folder: CheckpointFolder, name: str) -> Iterator[torch.Tensor]:
    return (piece for _, piece in folder.read_pieces(name))


def bf16_of(
    folder: CheckpointFolder, name: str, scale: str, block_size: tuple[int, int]
) -> list[Iterator[torch.Tensor]]:
    def pieces() -> Iterator[torch.Tensor]:
        scales, result, rows = folder.read(scale), None, block_size[0]
        for part, weight in folder.read_pieces(name, rows):
            if result is None:
                result = torch.empty(weight.shape, dtype=torch.bfloat16)
            own = scales[part.start // rows : -(-part.stop // rows)]
            yield dequantize(weight, own, block_size, torch.bfloat16, result[: len(weight)])

    return [pieces()]


def fp8_of(folder: CheckpointFolder, name: str, scale_fmt: str | None) -> list[Iterator[torch.Tensor]]:
    scales = []

    def pieces() -> Iterator[torch.Tensor]:
        for part, weight in folder.read_pieces(name, DEFAULT_BLOCK[0]):
            try:
                quantized, scale = quantize(weight, scale_fmt=scale_fmt)
            except ValueError as error:
                place = f"rows {part.start} to {part.stop - 1} of {name}"
                raise ValueError(f"{folder.tensors[name].file}: {place}: {error}") from error
            scales.append(scale)
            yield quantized

    return [pieces(), (scale for scale in scales)]
