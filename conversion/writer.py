"""The result of a conversion on its way to disk: streamed, renamed when it is complete, resumed after a kill."""

import hashlib
import json
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.utils import tqdm

from modeling_deepseek.conversion.add_code import parse_json
from modeling_deepseek.conversion.folder import DTYPES, INDEX, CheckpointFolder

MANIFEST, LOCK = ".deepseek-convert.json", ".deepseek-convert.lock"
MAX_SHARD_SIZE = "5GB"


class Output(NamedTuple):
    """A tensor of the result; `dtype` is the name that safetensors has for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Group(NamedTuple):
    """Tensors that are computed together and lie in one file; `compute()` reads the source and returns them in order.

    Each is a tensor, or an iterable of its rows in pieces: a piece is written before the next is asked for.
    """

    outputs: tuple[Output, ...]
    compute: Callable[[], Sequence[torch.Tensor | Iterable[torch.Tensor]]]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


Shards = dict[str, list[Group]]  # file name -> what lies in it


def split(groups: Sequence[Group], max_shard_size: int | str = MAX_SHARD_SIZE) -> Shards:
    """The groups, in order, over `model.safetensors` or `model-00001-of-000NN.safetensors` of at most `max_shard_size` bytes.

    A group that is larger has a file of its own.

    Raises:
        ValueError: for a size that is none.
    """
    try:
        if not float(str(max_shard_size).upper().rstrip("KMGTB ")) > 0:
            raise ValueError("a file holds some bytes")
        parts = split_state_dict_into_shards_factory(
            {str(index): group for index, group in enumerate(groups)},
            get_storage_size=lambda group: group.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError) as error:
        raise ValueError(f"max_shard_size is {max_shard_size!r}: expected such as 500MB ({error})") from error
    return {file: [groups[int(index)] for index in indices] for file, indices in parts.filename_to_tensors.items()}


def index_of(shards: Shards) -> dict[str, bytes]:
    """The index file by its name; nothing for a single file, which needs none."""
    if len(shards) == 1:
        return {}
    weight_map = {output.name: file for file, groups in shards.items() for group in groups for output in group.outputs}
    total = sum(group.nbytes for groups in shards.values() for group in groups)
    return {INDEX: to_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})}


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def convert(
    source: CheckpointFolder,
    destination: str | os.PathLike[str],
    shards: Shards,
    last: dict[str, bytes],
    options: dict[str, Any],
    jobs: int = 2,
    without: Iterable[str] = (),
) -> None:
    """Write `shards`, then the other files of `source`, then `last` (file name -> bytes: index and config) to `destination`.

    A file has a temporary name until it is complete and on disk. A manifest says until the end whose files these are: after
    a kill or a full disk the same call goes on with what is missing, and the result has the same bytes. A tensor that turns out
    to be wrong takes the whole result with it: no other call can finish it.

    Args:
        options: the command and all that decides about the bytes, JSON-compatible; to resume they must be the same.
        jobs: files written at a time; memory is that of the largest group, times `jobs`.
        without: names of other files that do not go along.

    Raises:
        ValueError: before anything is written, for a destination that is the source, lies in it or around it, holds anything
            but an unfinished run of the same call, is being written to, or has no room; and what a `compute` raises.
        OSError: when the disk is full or may not be written to; finished files stay.
    """
    destination = Path(destination)
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected 1 or more")
    check_apart(source.path, destination)
    others = {name: file for name, file in source.other_files().items() if name not in {*shards, *last, *without}}
    for folder in {file.parent.resolve() for file in others.values()}:  # a link in the source may lead anywhere
        check_apart(folder, destination)
    manifest = {"options": options, "fingerprint": fingerprint(source, others, shards, last, options)}
    check_ours(destination, manifest)
    check_room(destination, unfinished(destination, shards), others)

    new = not destination.exists()
    destination.mkdir(parents=True, exist_ok=True)
    with only_run(destination):
        check_ours(destination, manifest)  # another run may have ended meanwhile
        for stale in temporaries(destination):
            stale.unlink()
        write_file(destination / MANIFEST, to_json(manifest))
        try:
            write_shards(destination, shards, unfinished(destination, shards), jobs)
        except ValueError:  # of the source, which has to change before a run can end
            for name in (*shards, LOCK, MANIFEST):
                (destination / name).unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # somebody put a file into it
                    destination.rmdir()
            raise
        for name, file in others.items():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            with staged(destination / name) as copy, open(file, "rb") as original:
                shutil.copyfileobj(original, copy)
        for name, data in last.items():
            write_file(destination / name, data)
        sync_folder(destination)


@contextmanager
def only_run(destination: Path) -> Iterator[None]:
    """Nobody else writes to `destination` meanwhile; the system lets go of the lock of a run that was killed.

    Raises:
        ValueError: when another run does.
    """
    lock = FileLock(destination / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run of deepseek-convert is writing to {destination}: let it finish") from error
    try:
        yield
        (destination / LOCK).unlink(missing_ok=True)
        (destination / MANIFEST).unlink()  # the last: a run that is killed before goes on
    finally:
        lock.release()


def check_apart(source: Path, destination: Path) -> None:
    """The source is never written into, and never becomes part of its own result."""
    ours, theirs = source.resolve(), destination.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ValueError(f"{destination} is, contains or lies in the source {source}; name a folder apart from it")


def fingerprint(source: CheckpointFolder, others: dict[str, Path], shards: Shards, last: dict, options: dict) -> str:
    """Changes when a file of the source, the options or the plan does."""
    stats = {name: file.stat() for name, file in {**{n: source.path / n for n in source.shards}, **others}.items()}
    what = {
        "options": options,
        "source": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())},
        "shards": {name: [group.outputs for group in groups] for name, groups in shards.items()},
        "last": {name: hashlib.sha256(data).hexdigest() for name, data in last.items()},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def temporaries(folder: Path) -> list[Path]:
    """Files that a killed run left behind half-written."""
    return [file for file in folder.rglob(".*.tmp") if file.is_file() or file.is_symlink()]


def check_ours(destination: Path, manifest: dict[str, Any]) -> None:
    """The destination is new, empty, or the unfinished result of the same call."""
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise ValueError(f"{destination} is not a folder; name an empty or a new one")
    path = destination / MANIFEST
    if not path.is_file():
        ours = [file for file in destination.iterdir() if file.match(f".{MANIFEST}.*.tmp") or file.name == LOCK]
        foreign = sorted({*destination.iterdir()} - {*ours})
        if foreign:
            raise ValueError(f"{destination} is not empty, it holds {foreign[0].name}; name an empty or a new folder")
        return
    try:
        found = parse_json(path.read_bytes())
        options, same = found["options"], found["fingerprint"] == manifest["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of deepseek-convert ({error}); remove {destination}") from error
    if not same:
        changed = f"with {options}" if options != manifest["options"] else "of a source that was another then"
        raise ValueError(
            f"{destination} holds an unfinished conversion {changed}; finish that one, or remove the folder"
        )


def unfinished(destination: Path, shards: Shards) -> Shards:
    """Those that are not there yet."""
    return {name: groups for name, groups in shards.items() if not is_finished(destination / name, groups)}


def is_finished(path: Path, groups: Sequence[Group]) -> bool:
    """Whether a shard is there: under its own name it is complete, and its size is known."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size_of(groups)


def size_of(groups: Sequence[Group]) -> int:
    """Bytes of a shard."""
    return len(layout_of(groups)[0]) + sum(group.nbytes for group in groups)


def check_room(destination: Path, shards: Shards, others: dict[str, Path]) -> None:
    """The disk must hold what is still to be written."""
    needed = sum(size_of(groups) for groups in shards.values())
    needed += sum(file.stat().st_size for file in others.values())
    existing = next(folder for folder in (destination, *destination.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    free += sum(file.lstat().st_size for file in temporaries(destination)) if destination.is_dir() else 0
    if needed > free:
        raise ValueError(
            f"{destination} has {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB are to be written: make room, or name a "
            "folder on another disk"
        )


def layout_of(groups: Sequence[Group]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file and the byte at which each of its tensors begins.

    Larger dtypes come first, as safetensors orders them, so that every tensor is aligned.
    """
    outputs = sorted((output for group in groups for output in group.outputs), key=lambda o: -DTYPES[o.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        span = [end, end + output.nbytes]
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    return data, {output.name: len(data) + header[output.name]["data_offsets"][0] for output in outputs}


class Written:
    """Lets the system write out what a file was given, and forget it: it would fill memory with pages that nobody reads.

    Where memory is handed out slowly (virtual machines) this decides about the speed of a conversion.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.ranges = file, deque()

    def add(self, start: int, length: int) -> None:
        """Bytes that were written now; they are on their way at once, and forgotten when they have arrived."""
        if not hasattr(os, "posix_fadvise"):  # only Linux has it
            return
        self.file.flush()
        self.ranges.append((start, length))
        self._forget(start, length)
        if len(self.ranges) > 4:
            self._forget(*self.ranges.popleft())

    def _forget(self, start: int, length: int) -> None:
        os.posix_fadvise(self.file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def write_shards(destination: Path, shards: Shards, open_shards: Shards, jobs: int) -> None:
    """Write `open_shards` on `jobs` threads; the first error stops all."""
    stop = threading.Event()
    total, left = (sum(group.nbytes for groups in part.values() for group in groups) for part in (shards, open_shards))
    bar = tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=str(destination))
    with bar, ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(write_shard, destination / name, groups, bar, stop) for name, groups in open_shards.items()
        ]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def write_shard(path: Path, groups: Sequence[Group], bar: tqdm, stop: threading.Event) -> None:
    """One safetensors file, group after group; given up when `stop` is set."""
    header, begins = layout_of(groups)
    with staged(path) as file:
        file.write(header)
        written = Written(file)
        for group in groups:
            if stop.is_set():
                raise InterruptedError(f"{path} was given up")
            write_group(file, group, begins, written)
            bar.update(group.nbytes)


def write_group(file: BinaryIO, group: Group, begins: dict[str, int], written: Written) -> None:
    """Apart, so that its tensors are let go before the next group is computed."""
    for output, value in zip(group.outputs, group.compute(), strict=True):
        start = end = begins[output.name]
        file.seek(start)
        for piece in [value] if isinstance(value, torch.Tensor) else value:
            assert piece.dtype == DTYPES[output.dtype] and piece.shape[1:] == output.shape[1:], (output, piece.shape)
            file.write(memoryview(piece.contiguous().flatten().view(torch.uint8).numpy()))
            written.add(end, piece.nbytes)
            end += piece.nbytes
        assert end - start == output.nbytes, (output, end - start)


def write_file(path: Path, data: bytes) -> None:
    with staged(path) as file:
        file.write(data)


@contextmanager
def staged(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which gets its name `path` when it is complete and on disk; removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        message = f"{error.strerror or error}; what is finished stays, the same command goes on from there"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Names are on disk, too; only POSIX opens a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
