"""The writer: nothing half-written under a final name, resumed with the same bytes, refused before the first byte."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modeling_deepseek.conversion import writer
from modeling_deepseek.conversion.demo import to_demo
from modeling_deepseek.conversion.folder import INDEX, CheckpointFolder
from modeling_deepseek.conversion.quantization import to_bf16, to_fp8
from modeling_deepseek.conversion.writer import LOCK, MANIFEST, Group, Output, convert, index_of, layout_of, split

GOLDENS = Path(__file__).parent / "goldens"
FP8, FP32 = GOLDENS / "b3_v3_fp8_576", GOLDENS / "a_v3_fp32"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MOMENTS = 50  # kills per command
CONVERSIONS = {
    "to-bf16": lambda destination: to_bf16(FP8, destination, max_shard_size="150KB"),
    "to-fp8": lambda destination: to_fp8(FP32, destination, max_shard_size="50KB"),
    "to-demo": lambda destination: to_demo(FP32, destination, mp=4, with_mtp=True),
    "to-bf16 on two threads": lambda destination: to_bf16(FP8, destination, max_shard_size="150KB", jobs=2),
}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_temporary(name):
    return name.endswith(".tmp")


def constant(name, *sizes, value=1.0):
    return Group((Output(name, "F32", sizes),), lambda: [torch.full(sizes, float(value))])


@pytest.fixture
def source(tmp_path):
    """A copy of a checkpoint with other files, whose name has no number in it."""
    shutil.copytree(FP8, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return CheckpointFolder(tmp_path / "source")


@pytest.fixture
def shards():
    return split([constant(name, 8, 4, value=index) for index, name in enumerate("abcd")], max_shard_size=256)


def run(source, destination, shards, last=None, options=None, jobs=1):
    """One shard after another, unless `jobs` says more: which file is there when another fails is known then."""
    last = {**index_of(shards), "config.json": b"{}\n"} if last is None else last
    convert(source, destination, shards, last, options or {"command": "test"}, jobs)


def test_small_checkpoints_are_one_file_and_large_ones_numbered_shards():
    groups = [constant(name, 100) for name in "abc"]
    assert list(split(groups)) == ["model.safetensors"]
    assert index_of(split(groups)) == {}
    shards = split(groups, 800)
    assert list(shards) == [FIRST, SECOND]
    index = json.loads(index_of(shards)[INDEX])
    assert index["metadata"] == {"total_size": 1200}
    assert index["weight_map"] == {"a": FIRST, "b": FIRST, "c": SECOND}


def test_wrong_shard_size_is_an_error():
    with pytest.raises(ValueError, match="five"):
        split([constant("a", 1)], "five")


def test_file_is_what_safetensors_reads(source, tmp_path):
    tensors = {
        "odd.fp8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "ｕ": torch.tensor([True, False, True]),
        "transposed": torch.randn(3, 4).to(torch.bfloat16).T,
    }
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    groups = [
        Group((Output(name, names[tensor.dtype], tuple(tensor.shape)),), lambda tensor=tensor: [tensor])
        for name, tensor in tensors.items()
    ]
    run(source, tmp_path / "out", split(groups))
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned():
    groups = [
        Group((Output("w", "F8_E4M3", (3, 3)), Output("s", "F32", (1, 1)), Output("b", "BF16", (1,))), lambda: [])
    ]
    header, begins = layout_of(groups)
    assert len(header) % 8 == begins["s"] % 4 == begins["b"] % 2 == 0


def test_other_files_go_along_and_index_and_config_are_last(source, tmp_path, shards, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    run(source, tmp_path / "out", shards)
    assert [name for name in moved if name != MANIFEST] == [
        *shards,
        "generation_config.json",
        "fp8_cast_bf16_sha256.json",
        "tokenizer.json",
        INDEX,
        "config.json",
    ]
    assert contents(tmp_path / "out").keys() == {*shards, *source.other_files(), INDEX, "config.json"}


def test_hub_snapshot_is_followed_for_reading_and_the_result_has_no_links(source, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in source.path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    before = contents(source.path)
    to_bf16(tmp_path / "snapshot", tmp_path / "linked")
    to_bf16(source.path, tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    assert contents(tmp_path / "linked") == contents(tmp_path / "plain")
    assert contents(source.path) == before


def test_linked_folders_go_along_as_folders_and_nothing_is_written_through_them(source, tmp_path, shards):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "figure.svg").write_text("<svg/>")
    (source.path / "figures").symlink_to(tmp_path / "assets")
    run(source, tmp_path / "out", shards)
    assert not (tmp_path / "out" / "figures").is_symlink()
    assert contents(tmp_path / "out")["figures/figure.svg"] == b"<svg/>"
    with pytest.raises(ValueError, match="is, contains or lies in the source .*assets"):
        run(source, tmp_path / "assets" / "out", shards)
    assert contents(tmp_path / "assets") == {"figure.svg": b"<svg/>"}


def test_threads_and_one_after_another_give_the_same_bytes(source, tmp_path, shards):
    run(source, tmp_path / "one", shards)
    run(source, tmp_path / "three", shards, jobs=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_memory_holds_one_group_at_a_time(source, tmp_path):
    alive = []

    def compute():
        assert all(tensor() is None for tensor in alive)
        tensor = torch.ones(4)
        alive.append(weakref.ref(tensor))
        return [tensor]

    run(source, tmp_path / "out", {"model.safetensors": [Group((Output(n, "F32", (4,)),), compute) for n in "abcdef"]})
    assert len(alive) == 6


@pytest.mark.parametrize("where", ["source", "source/inside", ".", "link"])
def test_source_is_never_written_into(source, tmp_path, shards, where):
    (tmp_path / "link").symlink_to("source")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is, contains or lies in the source"):
        run(source, tmp_path / where, shards)
    assert contents(tmp_path) == before


def test_foreign_folders_and_files_are_refused(source, tmp_path, shards):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".note.tmp").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, it holds \.note\.tmp"):
        run(source, tmp_path / "out", shards)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not a folder"):
        run(source, tmp_path / "file", shards)
    assert contents(tmp_path / "out") == {".note.tmp": b"mine"}


def test_manifest_that_was_never_finished_is_in_nobodys_way(source, tmp_path, shards):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{MANIFEST}.123.tmp").write_text("{")
    run(source, tmp_path / "out", shards)
    assert not any(is_temporary(name) for name in contents(tmp_path / "out"))


def test_finished_result_is_not_overwritten(source, tmp_path, shards):
    run(source, tmp_path / "out", shards)
    with pytest.raises(ValueError, match="is not empty"):
        run(source, tmp_path / "out", shards)


def test_without_room_nothing_is_written(source, tmp_path, shards, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(ValueError, match=r"out has 0\.0 MB free, 0\.0 MB are to be written: make room"):
        run(source, tmp_path / "out", shards)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_must_be_positive(source, tmp_path, shards, jobs):
    with pytest.raises(ValueError, match=f"jobs is {jobs}; expected 1 or more"):
        run(source, tmp_path / "out", shards, jobs=jobs)


def full_disk(monkeypatch, file):
    """The disk is full when `file`, a name or the number of a file in order, is to be brought to disk."""
    calls, fsync, replace = iter(range(1, 1000)), os.fsync, os.replace

    def counted(descriptor):
        if next(calls) == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def named(old, new):
        if Path(new).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(os, "replace", named)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("call", range(1, 10))
def test_full_disk_is_named_leaves_whole_files_and_is_resumed(source, tmp_path, shards, monkeypatch, call, jobs):
    run(source, tmp_path / "expected", shards)
    expected, before = contents(tmp_path / "expected"), contents(source.path)
    with monkeypatch.context() as patch:
        full_disk(patch, call)
        with pytest.raises(OSError, match="No space left on device"):
            run(source, tmp_path / "out", shards, jobs=jobs)
    left = contents(tmp_path / "out")
    assert all(data == expected[name] for name, data in left.items() if name not in (MANIFEST, LOCK))
    assert contents(source.path) == before
    run(source, tmp_path / "out", shards)
    assert contents(tmp_path / "out") == expected


def test_error_names_the_file_and_the_way_on(source, tmp_path, shards, monkeypatch):
    for file in (MANIFEST, SECOND, "tokenizer.json", "config.json"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match=rf"goes on from there: .*{tmp_path}/out/{file}"),
        ):
            full_disk(patch, file)
            run(source, tmp_path / "out", shards)


def test_finished_shards_are_not_computed_again(source, tmp_path, shards, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, SECOND)
        with pytest.raises(OSError):
            run(source, tmp_path / "out", shards)
    first, second = shards.values()
    computed = []
    again = [Group(group.outputs, lambda group=group: computed.append(group) or group.compute()) for group in first]
    last = [Group(group.outputs, lambda group=group: computed.append(group) or group.compute()) for group in second]
    run(source, tmp_path / "out", dict(zip(shards, (again, last), strict=True)))
    assert computed == second


@pytest.mark.parametrize("change", ["options", "source", "config", "plan"])
def test_only_the_same_call_resumes(source, tmp_path, shards, monkeypatch, change):
    with monkeypatch.context() as patch:
        full_disk(patch, SECOND)
        with pytest.raises(OSError):
            run(source, tmp_path / "out", shards)
    left = contents(tmp_path / "out")
    if change == "source":
        os.utime(source.path / "model.safetensors", (0, 0))
    changed = split([constant(name, 8, 4) for name in "abcx"], max_shard_size=256) if change == "plan" else shards
    last = {"config.json": b"[]\n"} if change == "config" else None
    with pytest.raises(ValueError, match="holds an unfinished conversion"):
        run(source, tmp_path / "out", changed, last, {"command": "test", "mp": 2} if change == "options" else None)
    assert contents(tmp_path / "out") == left


def test_broken_manifest_is_an_error(source, tmp_path, shards):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not a manifest of deepseek-convert"):
        run(source, tmp_path / "out", shards)


def test_shard_that_changed_after_it_was_finished_is_written_again(source, tmp_path, shards, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, SECOND)
        with pytest.raises(OSError):
            run(source, tmp_path / "out", shards)
    os.truncate(tmp_path / "out" / FIRST, 10)
    run(source, tmp_path / "out", shards)
    run(source, tmp_path / "expected", shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_error_in_one_thread_stops_the_others_and_leaves_no_temporary_file(source, tmp_path):
    def compute():
        raise ValueError("this weight is wrong")

    shards = {"a.safetensors": [Group((Output("a", "F32", (1,)),), compute)], "b.safetensors": [constant("b", 4)] * 3}
    with pytest.raises(ValueError, match="this weight is wrong"):
        run(source, tmp_path / "out", shards, jobs=2)
    assert not any(is_temporary(name) for name in contents(tmp_path / "out"))


def test_link_under_a_final_name_is_replaced_not_written_through(source, tmp_path, shards, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, FIRST)
        with pytest.raises(OSError):
            run(source, tmp_path / "out", shards)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / FIRST).symlink_to(tmp_path / "mine")
    run(source, tmp_path / "out", shards)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("command", CONVERSIONS)
def test_killed_at_any_moment_it_shows_whole_files_and_is_resumed_with_the_same_bytes(tmp_path, command):
    conversion = CONVERSIONS[command]
    started = time.monotonic()
    conversion(tmp_path / "expected")
    duration, expected = time.monotonic() - started, contents(tmp_path / "expected")
    for moment in range(MOMENTS):
        destination = tmp_path / str(moment)
        process = multiprocessing.get_context("fork").Process(target=conversion, args=(destination,))
        process.start()
        time.sleep(random.Random(moment).uniform(0, duration))
        process.kill()
        process.join()
        left = contents(destination) if destination.exists() else {}
        whole = {name: data for name, data in left.items() if name not in (MANIFEST, LOCK) and not is_temporary(name)}
        assert whole == {name: expected[name] for name in whole}
        if left != expected:  # it was not done yet
            conversion(destination)
        assert contents(destination) == expected


def test_two_runs_do_not_write_to_one_folder(source, tmp_path, shards):
    destination = tmp_path / "out"
    said = []

    def compute():
        with pytest.raises(ValueError, match="another run of deepseek-convert is writing to") as caught:
            run(source, destination, shards)
        said.append(caught.value)
        return [torch.zeros(8, 4)]

    first, *rest = shards
    shards = {
        first: [Group(shards[first][0].outputs, compute), *shards[first][1:]],
        **{name: shards[name] for name in rest},
    }
    run(source, destination, shards)
    assert len(said) == 1
    assert not [name for name in contents(destination) if name.startswith(".")]


def test_the_lock_of_a_run_that_was_killed_is_none(source, tmp_path, shards):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / writer.LOCK).touch()
    run(source, destination, shards)
    assert writer.LOCK not in contents(destination)


def test_progress_counts_bytes(source, tmp_path, shards, monkeypatch):
    seen = []

    class Bar(writer.tqdm):
        def update(self, n=1):
            seen.append((n, self.total, self.unit))

    monkeypatch.setattr(writer, "tqdm", Bar)
    run(source, tmp_path / "out", shards)
    assert seen == [(128, 512, "B")] * 4
