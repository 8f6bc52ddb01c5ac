"""A checkpoint folder as it lies on disk: headers first, tensors when they are asked for, and all that is no weight."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from modeling_deepseek.conversion.add_code import parse_json, read_config
from modeling_deepseek.fp8 import DEFAULT_BLOCK, SCALE_SUFFIX
from modeling_deepseek.fp8_checkpoint import FP8_DTYPES, SCALE_DTYPES, block_size_of, check_scale_values

PIECE_BYTES = 2**24  # of a tensor that is read in pieces
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}  # names of safetensors
MAX_HEADER = 100_000_000  # bytes; safetensors refuses longer ones too
# Weights in any format, pickles among them, and what describes their files: never carried over, never read.
NOT_CARRIED = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".gguf",
)
AGAIN = "download or copy it again"


class Header(NamedTuple):
    """Where a tensor lies: `nbytes` bytes from `offset` of `file`. `dtype` is the name that safetensors has for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class CheckpointFolder:
    """The safetensors checkpoint in a folder: of its weights only the headers are read, links are followed.

    Attributes:
        path: the folder.
        config: the object in config.json; empty when there is none.
        shards: file name -> tensor name -> `Header`, files in order of their names, tensors as they lie in the file.
        tensors: tensor name -> `Header`, over all shards. Empty with `index=False`, whose files may repeat names.

    Args:
        index: `False` takes all `*.safetensors` files of the folder: the demo layout, which has no index.

    Raises:
        ValueError: naming file and tensor, for a folder without such a checkpoint, an incomplete or corrupt file, an unknown
            dtype, a tensor in two shards, and an index that does not agree with the files.
    """

    def __init__(self, path: str | os.PathLike[str], index: bool = True):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder; expected the folder of a checkpoint")
        self.config: dict[str, Any] = read_config(self.path) if (self.path / "config.json").is_file() else {}
        weight_map = None
        if index and (self.path / INDEX).is_file():
            weight_map = read_index(self.path)
            files = sorted(set(weight_map.values()))
        elif index:
            files = [WEIGHTS] if os.path.lexists(self.path / WEIGHTS) else []
        else:
            files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self.path} has no {f'{WEIGHTS} or {INDEX}' if index else '*.safetensors'}{self._pickle_hint()}"
            )
        self.shards = {file: read_headers(self.path / file) for file in files}
        self.tensors: dict[str, Header] = {}
        if index:
            self._merge()
        if weight_map is not None:
            self._check_index(weight_map)

    def _pickle_hint(self) -> str:
        pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in self.path.glob(f"*.{suffix}"))
        return f"; {pickles[0]} is a pickle, which is never read: save it as safetensors first" if pickles else ""

    def _merge(self) -> None:
        for tensors in self.shards.values():
            for name, header in tensors.items():
                if name in self.tensors:
                    raise ValueError(
                        f"{name} is in two files, {self.tensors[name].file} and {header.file}: remove one of them, "
                        "or download the checkpoint again"
                    )
                self.tensors[name] = header

    def _check_index(self, weight_map: dict[str, str]) -> None:
        path = self.path / INDEX
        if (self.path / WEIGHTS).is_file() and WEIGHTS not in self.shards:
            raise ValueError(
                f"{self.path} holds two checkpoints, {WEIGHTS} and the files of {INDEX}: remove one of them"
            )
        for name, file in weight_map.items():
            if name not in self.shards[file]:
                elsewhere = f"; it is in {self.tensors[name].file.name}" if name in self.tensors else ""
                raise ValueError(f"{path} puts {name} into {file}, which does not hold it{elsewhere}: {AGAIN}")
        for name, header in self.tensors.items():
            if name not in weight_map:
                raise ValueError(f"{header.file} holds {name}, which {path} does not list: {AGAIN}")

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor `name`, or only `rows` of its first dimension, in memory of its own."""
        return read_tensor(self.tensors[name], rows)

    def read_pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """As [`read_pieces`], by name."""
        return read_pieces(self.tensors[name], multiple)

    def other_files(self) -> dict[str, Path]:
        """Relative name -> file of all that goes with the weights: tokenizer, generation config, licence, code.

        Without config.json (which a conversion rewrites), weights and pickles, and files and folders that begin with a dot.
        Links to folders are followed, but for those that lead back to a folder they lie in.
        """
        others = {}
        for file in visible_files(self.path):
            name = file.relative_to(self.path)
            if name.name.endswith(NOT_CARRIED) or str(name) == "config.json":
                continue
            if not file.is_file():
                raise ValueError(f"{file} is a broken link or no regular file: {AGAIN}, or remove it")
            others[name.as_posix()] = file
        return others


def visible_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All that is no folder in `folder`, which lies in those `above`, and in its folders; nothing that begins with a dot."""
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from visible_files(path, (*above, real))
        else:
            yield path


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the index of `folder`; every file is there."""
    path = folder / INDEX
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not an index with a weight_map ({type(error).__name__}: {error}): {AGAIN}"
        ) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: weight_map is not an object of tensor names and file names: {AGAIN}")
    for name, file in weight_map.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{path} puts {name} into {file}, which is not in {folder}: {AGAIN}")
    present = {file: (folder / file).is_file() for file in set(weight_map.values())}
    for name, file in weight_map.items():
        if not present[file]:
            raise ValueError(f"{folder / file} is missing; {path} puts {name} into it: {AGAIN}")
    return weight_map


def read_headers(file: Path) -> dict[str, Header]:
    """Tensor name -> `Header` of one safetensors file, as the tensors lie in it; every byte belongs to exactly one of them.

    Raises:
        ValueError: for a file that is no complete safetensors file, naming it and the first tensor that is wrong.
    """
    if not file.is_file():
        raise ValueError(f"{file} is a broken link or no regular file: {AGAIN}")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{file} ({size} bytes) has a truncated or corrupt header, {length} bytes by its first 8 bytes: {AGAIN}"
            )
        try:
            entries = parse_json(stream.read(length))
            entries.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} has a corrupt header, not a JSON object ({error}): {AGAIN}") from error
    headers = [(name, header_of(file, name, entry, 8 + length)) for name, entry in entries.items()]
    headers.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = 8 + length
    for name, header in headers:
        if header.offset != end:
            raise ValueError(
                f"{file}: {name} begins at byte {header.offset}, expected {end}; the header is corrupt: {AGAIN}"
            )
        end += header.nbytes
        if end > size:
            raise ValueError(f"{file} is truncated: {name} ends at byte {end}, the file at {size}: {AGAIN}")
    if end != size:
        raise ValueError(f"{file}: the tensors end at byte {end}, the file at {size}; the header is corrupt: {AGAIN}")
    return dict(headers)


def header_of(file: Path, name: str, entry: Any, start: int) -> Header:
    """The `Header` that a JSON `entry` describes; its offsets count from byte `start` of the file."""
    try:
        dtype, (first, last) = entry["dtype"], entry["data_offsets"]
        shape = tuple(entry["shape"])
        whole = isinstance(dtype, str) and all(
            isinstance(number, int) and number >= 0 for number in (first, last, *shape)
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: the header's entry of {name} is {str(entry)[:200]}; it is corrupt: {AGAIN}")
    if dtype not in DTYPES:
        raise ValueError(f"{file}: {name} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != nbytes:
        raise ValueError(f"{file}: {name} takes {last - first} bytes, expected {nbytes} for {dtype} {shape}: {AGAIN}")
    return Header(file, dtype, shape, nbytes, start + first)


def read_tensor(header: Header, rows: slice = slice(None)) -> torch.Tensor:
    """The tensor behind `header`, or only `rows` (step 1) of its first dimension: read, not mapped, so memory is what it takes."""
    shape, offset, nbytes = header.shape, header.offset, header.nbytes
    if shape and rows != slice(None):
        first, last, _ = rows.indices(shape[0])
        row = nbytes // max(shape[0], 1)
        shape, offset, nbytes = (last - first, *shape[1:]), offset + first * row, (last - first) * row
    data = torch.empty(nbytes, dtype=torch.uint8)
    with open(header.file, "rb", buffering=0) as stream:
        fill(data, stream, header, offset)
    return data.view(DTYPES[header.dtype]).view(shape)


def read_pieces(header: Header, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """The tensor behind `header`, some `multiple` of rows at a time, and which they are. The next overwrites it.

    Fresh memory costs a machine more than to read: this is a few megabytes, once.
    """
    if not header.nbytes or not header.shape:
        yield slice(0, header.shape[0] if header.shape else 1), read_tensor(header)
        return
    total = header.shape[0]
    row = header.nbytes // total
    count = min(total, max(1, PIECE_BYTES // row // multiple) * multiple)
    data = torch.empty(count * row, dtype=torch.uint8)
    with open(header.file, "rb", buffering=0) as stream:
        for first in range(0, total, count):
            last = min(first + count, total)
            piece = data[: (last - first) * row]
            fill(piece, stream, header, header.offset + first * row)
            yield slice(first, last), piece.view(DTYPES[header.dtype]).view(last - first, *header.shape[1:])


def fill(data: torch.Tensor, stream: BinaryIO, header: Header, offset: int) -> None:
    """Reads the bytes `data` from byte `offset` of the file on."""
    stream.seek(offset)
    view, filled = memoryview(data.numpy()), 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise ValueError(f"{header.file} ended while it was read, at byte {offset + filled}: {AGAIN}")
        filled += count


def fp8_block_size(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Rows and columns of a block by the `quantization_config`; the official 128 x 128 where nothing is said.

    Raises:
        ValueError: for another `quant_method` than block FP8, or a `weight_block_size` that is none.
    """
    quantization = config.get("quantization_config") or {"quant_method": "fp8"}
    where = f"{folder / 'config.json'}: quantization_config"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise ValueError(f"{where} is {quantization!r}; expected quant_method 'fp8', the only one that is known here")
    return block_size_of(quantization, where)


def fp8_pairs(tensors: dict[str, Header], block_size: tuple[int, int] = DEFAULT_BLOCK) -> dict[str, str]:
    """FP8 weight -> its scales `<name>_scale_inv`, wherever these are stored. Headers only.

    Raises:
        ValueError: naming both tensors, for a weight without scales, scales without a weight, and scales that are not one
            number per block.
    """
    weights = {name: header for name, header in tensors.items() if header.dtype in FP8_DTYPES}
    for name, header in tensors.items():
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in weights:
            weight = name.removesuffix(SCALE_SUFFIX)
            found = f"is {tensors[weight].dtype}" if weight in tensors else "is missing"
            raise ValueError(f"{header.file}: {name} scales {weight}, an FP8 weight, but that {found}: {AGAIN}")
    for name, header in weights.items():
        scale = tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            raise ValueError(f"{header.file}: {name} is FP8, but its scales {name + SCALE_SUFFIX} are missing: {AGAIN}")
        grid = tuple(-(-size // block) for size, block in zip(header.shape, block_size, strict=False))
        if len(header.shape) != 2 or scale.shape != grid or scale.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{scale.file}: {name + SCALE_SUFFIX} is {scale.dtype} {scale.shape}, expected {' or '.join(sorted(SCALE_DTYPES))} "
                f"{grid}, one scale per block {block_size} of {name} {header.shape}: check weight_block_size in config.json"
            )
    return {name: name + SCALE_SUFFIX for name in weights}


def check_scales(scales: Iterable[tuple[str, Header]]) -> None:
    """Reads every scale and raises `ValueError` for the first that is not finite or not positive, with file and tensor."""
    for name, header in scales:
        check_scale_values(f"{header.file}: {name}", read_tensor(header))
