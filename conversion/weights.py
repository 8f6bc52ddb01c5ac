"""The weights of a checkpoint, in the Hub layout or the inference demo's, under their Hub names and without FP8."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modeling_deepseek.checkpoint import layer_index
from modeling_deepseek.conversion.folder import (
    CheckpointFolder,
    Header,
    check_scales,
    fp8_block_size,
    fp8_pairs,
    read_tensor,
)
from modeling_deepseek.fp8 import SCALE_SUFFIX, dequantize

RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
# module of the demo -> its Hub name, and the dimension that is sharded over the ranks (None: every rank has all of it)
DEMO_MODULES = {
    "embed": ("embed_tokens", 0),
    "head": ("lm_head", 0),
    "norm": ("norm", None),
    "attn_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "wq": ("q_proj", 0),
    "wq_a": ("q_a_proj", None),
    "q_norm": ("q_a_layernorm", None),
    "wq_b": ("q_b_proj", 0),
    "wkv_a": ("kv_a_proj_with_mqa", None),
    "kv_norm": ("kv_a_layernorm", None),
    "wkv_b": ("kv_b_proj", 0),
    "wo": ("o_proj", 1),
    "gate": ("gate", None),
    "w1": ("gate_proj", 0),
    "w2": ("down_proj", 1),
    "w3": ("up_proj", 0),
}
DEMO_PARTS = {"attn": "self_attn", "ffn": "mlp"}


def hub_name(name: str) -> tuple[str, int | None]:
    """Hub name of a tensor of the demo layout, and its sharded dimension."""
    *path, module, kind = name.split(".")
    found, dim = DEMO_MODULES.get(module, (module, None))
    if path[-1:] == ["shared_head"]:
        found = module  # of an MTP layer, where the head keeps its name
    if EXPERT.search(name):
        dim = None  # routed experts lie whole on one rank
    if kind == "scale":
        kind = f"weight{SCALE_SUFFIX}"
    elif (module, kind) == ("gate", "bias"):
        kind = "e_score_correction_bias"
    hub = ".".join([*(DEMO_PARTS.get(part, part) for part in path), found, kind])
    return hub if hub.startswith("lm_head.") else f"model.{hub}", dim


class Weights:
    """The weights of the checkpoint in a folder, read one at a time.

    Args:
        config: fields of a config.json, for the sizes of FP8 blocks in the demo layout, which has no such file; the official
            128 x 128 where they say nothing.

    Attributes:
        path: the folder.
        is_demo: whether it has the layout of the inference demo, `model{rank}-mp{ranks}.safetensors`.
        shapes: Hub name -> shape of the whole tensor. Scales are not among them: they belong to their weights.
        headers: Hub name -> `Header` of the whole tensor as stored, scales too; in the demo layout `file` and `offset` are those
            of its first rank.
        quantized: the names that are FP8 on disk.

    Raises:
        ValueError: as [`folder.CheckpointFolder`] and [`folder.fp8_pairs`]; for scales that are not positive; in the demo layout
            for ranks that are missing, an expert on another rank than its own, and parts that do not fit together.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.is_demo = has_demo_layout(self.path)
        folder = CheckpointFolder(self.path, index=not self.is_demo)
        if self.is_demo:
            self._parts, self._dims = demo_parts(folder)
        else:
            self._parts = {name: [header] for name, header in folder.tensors.items()}
            self._dims = dict.fromkeys(self._parts)
        self.headers = {name: whole_header(name, parts, self._dims[name]) for name, parts in self._parts.items()}
        self._block_size = fp8_block_size(folder.config or config or {}, self.path)
        self._scales = fp8_pairs(self.headers, self._block_size)
        check_scales((scale, part) for scale in self._scales.values() for part in self._parts[scale])
        scales = set(self._scales.values())
        self.shapes = {name: header.shape for name, header in self.headers.items() if name not in scales}
        self.quantized = set(self._scales)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor `name`: FP8 is dequantised in fp32 and cast to `dtype`, anything else has the dtype that is stored."""
        weight = self.read_stored(name)
        if name not in self._scales:
            return weight
        scale, result, rows = (
            self.read_stored(self._scales[name]),
            torch.empty(weight.shape, dtype=dtype),
            self._block_size[0],
        )
        for block, first in enumerate(
            range(0, weight.shape[0], rows)
        ):  # by rows of blocks: little memory, which the CPU caches
            band = slice(first, first + rows)
            result[band] = dequantize(weight[band], scale[block : block + 1], self._block_size)
        return result

    def read_stored(self, name: str) -> torch.Tensor:
        """The tensor `name`, or scales, as stored, the ranks' parts put together.

        Raises:
            ValueError: when ranks differ in what all of them have.
        """
        parts, dim = self._parts[name], self._dims[name]
        first = read_tensor(parts[0])
        if dim is not None:
            return torch.cat([first, *map(read_tensor, parts[1:])], dim) if len(parts) > 1 else first
        for other in parts[1:]:
            if not torch.equal(first.flatten().view(torch.uint8), read_tensor(other).flatten().view(torch.uint8)):
                raise ValueError(
                    f"{name} differs between {parts[0].file} and {other.file}; expected the same on every rank"
                )
        return first


def has_demo_layout(folder: Path) -> bool:
    return any(RANK_FILE.fullmatch(file.name) for file in folder.glob("model*-mp*.safetensors"))


def demo_parts(folder: CheckpointFolder) -> tuple[dict[str, list[Header]], dict[str, int | None]]:
    """Hub name -> headers by rank, and -> sharded dimension, of a folder in the demo layout."""
    found = {file: RANK_FILE.fullmatch(file) for file in folder.shards}
    ranks = sorted({int(match[2]) for match in found.values() if match})
    expected = [f"model{rank}-mp{ranks[0]}.safetensors" for rank in range(ranks[0])]
    if sorted(folder.shards) != sorted(expected):
        raise ValueError(
            f"{folder.path} holds {', '.join(sorted(folder.shards)[:8])}; expected the demo layout of one number of ranks, "
            f"{', '.join(expected[:8])}"
        )
    parts: dict[str, list[Header]] = {}
    dims: dict[str, int | None] = {}
    for file in expected:
        for name, header in folder.shards[file].items():
            hub, dims[hub] = hub_name(name)
            parts.setdefault(hub, []).append(header)
    check_ranks(parts, expected)
    return parts, dims


def check_ranks(parts: Mapping[str, list[Header]], files: list[str]) -> None:
    """Routed expert `e` of `E` lies on rank `e // (E / ranks)` alone, everything else on every rank."""
    experts: dict[int, int] = {}  # layer -> E
    for name in parts:
        if expert := EXPERT.search(name):
            layer = layer_index(name)
            experts[layer] = max(experts.get(layer, 0), int(expert[1]) + 1)
    for name, headers in parts.items():
        expert, expected = EXPERT.search(name), files
        if expert:
            expected = [files[int(expert[1]) * len(files) // experts[layer_index(name)]]]
        found = [header.file.name for header in headers]
        if found != expected:
            raise ValueError(
                f"{headers[0].file.parent}: {name} is in {', '.join(found)}; expected {', '.join(expected)}"
            )


def whole_header(name: str, parts: list[Header], dim: int | None) -> Header:
    """The header of the tensor that the ranks' parts make up."""
    first = parts[0]
    for part in parts[1:]:
        same = [(a, b) for axis, (a, b) in enumerate(zip(first.shape, part.shape, strict=False)) if axis != dim]
        if part.dtype != first.dtype or len(part.shape) != len(first.shape) or any(a != b for a, b in same):
            raise ValueError(
                f"{name} is {first.dtype} {first.shape} in {first.file} and {part.dtype} {part.shape} in {part.file}: "
                "the ranks' parts do not fit together"
            )
    if dim is None or len(parts) == 1:
        return first
    shape = tuple(
        sum(part.shape[axis] for part in parts) if axis == dim else size for axis, size in enumerate(first.shape)
    )
    return first._replace(shape=shape, nbytes=sum(part.nbytes for part in parts))
