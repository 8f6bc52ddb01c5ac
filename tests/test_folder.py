"""`CheckpointFolder`: what a folder holds by its headers, and an error that names file and tensor where it does not add up."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_deepseek.conversion.folder import (
    INDEX,
    CheckpointFolder,
    check_scales,
    fp8_block_size,
    fp8_pairs,
    read_headers,
)

FP8 = Path(__file__).parent / "goldens" / "b3_v3_fp8_576"
W, S = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"


def write_sharded(folder, shards, weight_map=None):
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    listed = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed if weight_map is None else weight_map}))


def write_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def sharded(tmp_path):
    write_sharded(
        tmp_path, {"a.safetensors": {"x": torch.arange(6.0).view(3, 2)}, "b.safetensors": {"y": torch.ones(4)}}
    )
    return tmp_path


def test_reads_the_same_bits_as_safetensors():
    folder, expected = CheckpointFolder(FP8), load_file(FP8 / "model.safetensors")
    assert folder.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = folder.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape) == (ours.dtype, folder.tensors[name].shape)
        assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8)), name


def test_shards_are_merged_and_config_is_optional(sharded):
    folder = CheckpointFolder(sharded)
    assert {name: header.file.name for name, header in folder.tensors.items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }
    assert folder.config == {}


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), slice(None), slice(2, 2)])
def test_reads_only_some_rows(sharded, rows):
    assert torch.equal(CheckpointFolder(sharded).read("x", rows), torch.arange(6.0).view(3, 2)[rows])


def test_scalars_and_empty_tensors_are_read(tmp_path):
    tensors = {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = CheckpointFolder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())


def test_links_of_a_hub_snapshot_are_followed(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(FP8 / name)
    assert CheckpointFolder(tmp_path).tensors.keys() == CheckpointFolder(FP8).tensors.keys()


def test_without_index_files_may_repeat_names():
    folder = CheckpointFolder(FP8.parent / "h_inference_demo" / "mp2", index=False)
    first, second = folder.shards.values()
    assert "norm.weight" in first.keys() & second.keys()
    assert folder.tensors == {}


def test_other_files_are_all_but_weights_pickles_and_config(sharded):
    for name in (
        "tokenizer.json",
        "LICENSE",
        "figures/a.png",
        "config.json",
        "x.bin",
        "y.pt",
        ".gitattributes",
        ".cache/z",
    ):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("{}")
    assert list(CheckpointFolder(sharded).other_files()) == ["LICENSE", "figures/a.png", "tokenizer.json"]


def test_links_to_folders_are_followed_but_not_in_circles(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in (sharded / "assets" / "deep", elsewhere / "inner"):
        folder.mkdir(parents=True)
    (sharded / "assets" / "deep" / "a.txt").write_text("a")
    (elsewhere / "inner" / "b.txt").write_text("b")
    for link, target in {
        "linked": elsewhere,
        "assets/deep/top": sharded,
        "assets/self": ".",
        "twice": "assets",
    }.items():
        (sharded / link).symlink_to(target)
    (elsewhere / "inner" / "back").symlink_to(elsewhere)
    others = CheckpointFolder(sharded).other_files()
    assert list(others) == ["assets/deep/a.txt", "linked/inner/b.txt", "twice/deep/a.txt"]
    assert others["linked/inner/b.txt"].read_text() == "b"


def test_broken_link_among_the_other_files_is_named(sharded):
    (sharded / "tokenizer.json").symlink_to("gone")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a broken link"):
        CheckpointFolder(sharded).other_files()


def test_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors or model\.safetensors\.index\.json"):
        CheckpointFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        CheckpointFolder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        CheckpointFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", [1, 5, 16])
def test_truncated_shard_is_named_with_its_tensor(sharded, lost):
    os.truncate(sharded / "b.safetensors", (sharded / "b.safetensors").stat().st_size - lost)
    with pytest.raises(ValueError, match=r"b\.safetensors is truncated: y ends"):
        CheckpointFolder(sharded)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "truncated or corrupt header, 0 bytes"),
        (b"not json", b"", "corrupt header, not a JSON object"),
        (b"[]", b"", "corrupt header, not a JSON object"),
        ({"x": {"dtype": "F32"}}, b"", "entry of x is .*corrupt"),
        (
            {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
            b"1",
            "x has dtype 'F4', expected one of .*BF16",
        ),
        (
            {"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}},
            b"1",
            r"x takes 1 bytes, expected 2 for U8 \(2,\)",
        ),
        ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12", "x begins at byte"),
        ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12", "tensors end at byte"),
    ],
)
def test_corrupt_header_is_named(tmp_path, header, data, message):
    write_header(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 1 << 60) + b"{}"], ids=["empty", "short", "huge"])
def test_file_that_is_no_safetensors_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors .* has a truncated or corrupt header"):
        read_headers(tmp_path / "model.safetensors")


def test_tensor_in_two_shards_is_named_with_both(tmp_path):
    write_sharded(
        tmp_path, {"a.safetensors": {"x": torch.ones(1)}, "b.safetensors": {"x": torch.ones(1), "y": torch.ones(1)}}
    )
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"x is in two files, .*a\.safetensors and .*b\.safetensors"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "y": "a.safetensors"}, r"puts y into a\.safetensors, which does not hold it"),
        ({"x": "b.safetensors", "y": "a.safetensors"}, r"puts x into b\.safetensors, .*it is in a\.safetensors"),
        ({"x": "a.safetensors", "y": "c.safetensors"}, r"c\.safetensors is missing; .* puts y into it"),
        (
            {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"},
            r"puts z into b\.safetensors, which does not",
        ),
        ([], "weight_map is not an object"),
        ({"x": "../a.safetensors", "y": "b.safetensors"}, r"puts x into \.\./a\.safetensors, which is not in "),
    ],
)
def test_index_that_disagrees_with_the_files_is_an_error(sharded, weight_map, message):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        CheckpointFolder(sharded)


def test_tensor_that_the_index_does_not_list_is_named(tmp_path):
    shards = {"a.safetensors": {"x": torch.ones(1), "y": torch.ones(1)}}
    write_sharded(tmp_path, shards, weight_map={"x": "a.safetensors"})
    with pytest.raises(ValueError, match=r"a\.safetensors holds y, which .* does not list"):
        CheckpointFolder(tmp_path)


def test_two_checkpoints_in_one_folder_are_an_error(sharded):
    save_file({"x": torch.ones(1)}, sharded / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds two checkpoints, model\.safetensors and the files of"):
        CheckpointFolder(sharded)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq'.*expected quant_method 'fp8'"),
        ({}, None),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
    ],
)
def test_unknown_quantization_is_an_error(quantization, message):
    if message is None:
        assert fp8_block_size({"quantization_config": quantization}, FP8) == (128, 128)
        return
    with pytest.raises(ValueError, match=message):
        fp8_block_size({"quantization_config": quantization}, FP8)


def quantised(folder, weight=(200, 130), scales=None, **others):
    tensors = {W: torch.ones(weight).to(torch.float8_e4m3fn), S: scales, **others}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return CheckpointFolder(folder)


def test_scales_are_paired_with_a_weight_in_another_shard(tmp_path):
    write_sharded(
        tmp_path,
        {"a.safetensors": {S: torch.ones(2, 2)}, "b.safetensors": {W: torch.ones(200, 130).to(torch.float8_e5m2)}},
    )
    assert fp8_pairs(CheckpointFolder(tmp_path).tensors) == {W: S}


def test_weight_without_scales_and_scales_without_weight_name_both(tmp_path):
    with pytest.raises(ValueError, match=rf"model\.safetensors: {W} is FP8, but its scales {S} are missing"):
        fp8_pairs(quantised(tmp_path).tensors)
    save_file({S: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {S} scales {W}, .* is missing"):
        fp8_pairs(CheckpointFolder(tmp_path).tensors)
    save_file({S: torch.ones(2, 2), W: torch.ones(200, 130)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{S} scales {W}, .* is F32"):
        fp8_pairs(CheckpointFolder(tmp_path).tensors)


@pytest.mark.parametrize("scales", [torch.ones(1, 2), torch.ones(2, 2, 1), torch.ones(2, 2, dtype=torch.int32)])
def test_wrong_scale_grid_names_both(tmp_path, scales):
    with pytest.raises(ValueError, match=rf"{S} is .* expected .* \(2, 2\), .* of {W} \(200, 130\)"):
        fp8_pairs(quantised(tmp_path, scales=scales).tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scale_that_scales_nothing_is_named(tmp_path, value):
    scales = torch.ones(2, 2)
    scales[1, 0] = value
    folder = quantised(tmp_path, scales=scales)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {S} holds {value} \(element 2\)"):
        check_scales(folder.tensors.items() & {(S, folder.tensors[S])})
