"""`deepseek-convert`: its conversions do what the functions do, and bad input is one line and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_deepseek.conversion.cli import main

GOLDENS = Path(__file__).parent / "goldens"
V3, FP8, DEMO, LLM = (GOLDENS / case for case in ("a_v3_fp32", "b3_v3_fp8_576", "h_inference_demo", "g_llm_gqa"))
W = "model.layers.0.mlp.up_proj.weight"
CONVERSIONS = {
    "to-bf16": ([FP8], []),
    "to-fp8": ([V3], ["--scale-fmt", "ue8m0"]),
    "to-demo": ([V3], ["--mp", "2", "--with-mtp"]),
    "from-demo": ([DEMO / "mp2"], ["--config", V3 / "config.json"]),
    "from-llama": ([LLM], []),
}


def run(*argv):
    return main([str(word) for word in argv])


def damaged(folder, kind):
    """A copy of golden b3 with one fault."""
    shutil.copytree(FP8, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif kind == "corrupt header":
        file.write_bytes(b"\xff" * 100)
    elif kind == "quant_method":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "mystery"
        (folder / "config.json").write_text(json.dumps(config))
    else:
        scales = tensors[f"{W}_scale_inv"]
        changes = {"nan": scales * torch.nan, "negative": -scales, "zero": scales * 0, "grid": scales.repeat(2, 1)}
        save_file(tensors | {f"{W}_scale_inv": changes[kind]}, file)
    return folder


@pytest.mark.parametrize("command", CONVERSIONS)
def test_conversion_writes_a_checkpoint_and_exits_with_0(tmp_path, command):
    source, options = CONVERSIONS[command]
    assert run(command, *source, tmp_path / "out", *options) == 0
    assert list((tmp_path / "out").glob("model*.safetensors"))
    assert not list((tmp_path / "out").glob(".*"))


def test_to_llama_undoes_from_llama(tmp_path):
    assert run("from-llama", LLM, tmp_path / "ours") == run("to-llama", tmp_path / "ours", tmp_path / "llama") == 0
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"


def test_options_reach_the_functions(tmp_path):
    assert run("to-bf16", FP8, tmp_path / "out", "--max-shard-size", "200KB", "--jobs", 2) == 0
    assert (tmp_path / "out" / "model-00001-of-00013.safetensors").is_file()
    assert run("to-demo", V3, tmp_path / "demo", "--mp", 1) == 0
    assert "layers.3.enorm.weight" not in load_file(tmp_path / "demo" / "model0-mp1.safetensors")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "is truncated"),
        ("corrupt header", "corrupt header"),
        ("quant_method", "mystery"),
        ("nan", f"{W}_scale_inv holds nan"),
        ("negative", f"{W}_scale_inv holds -"),
        ("zero", f"{W}_scale_inv holds 0.0"),
        ("grid", f"{W}_scale_inv is F32 (2, 1), expected"),
    ],
)
@pytest.mark.parametrize("command", ["to-bf16", "to-demo"])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, capsys, command, kind, named):
    source = damaged(tmp_path / "source", kind)
    assert run(command, source, tmp_path / "out", *(["--mp", 1] if command == "to-demo" else [])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"deepseek-convert: error: {source}") and named in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["five", "5XB", "infGB", "nanGB", "0GB", "-1GB"])
def test_wrong_shard_size_is_exit_code_2(tmp_path, capsys, size):
    assert run("to-bf16", FP8, tmp_path / "out", f"--max-shard-size={size}") == 2
    assert f"max_shard_size is '{size}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_config_of_from_demo_is_exit_code_2(tmp_path, capsys):
    assert run("from-demo", DEMO / "mp1", tmp_path / "out", "--config", tmp_path / "config.json") == 2
    assert f"{tmp_path / 'config.json'}" in capsys.readouterr().err


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("config.json", DEEP, "nested too deeply"),
        ("model.safetensors.index.json", f'{{"weight_map": {DEEP}}}', "nested too deeply"),
        ("config.json", '{"model_type": "deepseek_v3", "torch_dtype": "foo"}', "torch_dtype is 'foo'"),
        ("config.json", '{"model_type": "deepseek_v3", "dtype": [1]}', "dtype is [1]"),
        (
            "config.json",
            '{"model_type": "deepseek_v3", "rope_theta": "x", "num_hidden_layers": 1}',
            "no model can be built",
        ),
    ],
)
def test_odd_json_is_exit_code_2(tmp_path, capsys, file, text, named):
    shutil.copytree(V3, tmp_path / "source")
    (tmp_path / "source" / file).write_text(text)
    assert run("to-demo", tmp_path / "source", tmp_path / "out", "--mp", 1) == 2
    err = capsys.readouterr().err
    assert err.startswith("deepseek-convert: error: ") and file in err and named in err
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_program(tmp_path):
    program = [sys.executable, "-m", "modeling_deepseek.conversion.cli"]
    result = subprocess.run([*program, "to-bf16", FP8, tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "B/s" in result.stderr
