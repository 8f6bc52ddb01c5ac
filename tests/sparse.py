"""Checkpoint folders of any size that take no room: real headers, no data."""

import json
import re
from pathlib import Path

from modeling_deepseek.conversion.family import expected_shapes, family_config

SHARD_BYTES = 4_300_000_000  # as on the Hub: V3 comes in 163 files
ITEMSIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
QUANTIZED = re.compile(r"(?<!eh)_proj(_with_mqa)?\.weight$")


def sparse_checkpoint(folder: Path, fields: dict, fp8: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Write config.json, index and shards of the official layout for the config `fields`; returns name -> (dtype, shape).

    The files have their full length, but of the data nothing is written: the file system keeps it as holes, read as zeros.
    """
    if fp8:
        fields = {**fields, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {}
    for name, shape in expected_shapes(family_config(fields, folder)).items():
        tensors[name] = ("F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
        if fp8 and QUANTIZED.search(name):
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-side // 128) for side in shape))
    write_sparse(folder, tensors)
    return tensors


def write_sparse(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """The shards and their index for tensor name -> (dtype, shape)."""
    shards, weight_map, end = [{}], {}, 0
    for name, (dtype, shape) in tensors.items():
        if end > SHARD_BYTES:
            shards.append({})
            end = 0
        first, end = end, end + nbytes(dtype, shape)
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": (first, end)}
        weight_map[name] = f"model-{len(shards):05}.safetensors"
    for number, entries in enumerate(shards, start=1):
        header = json.dumps(entries).encode()
        with open(folder / f"model-{number:05}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = ITEMSIZE[dtype]
    for side in shape:
        count *= side
    return count
