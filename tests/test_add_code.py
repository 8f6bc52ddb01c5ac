"""`add_code` and its command line: code and auto_map into a model folder, all of it or nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from absent import without
from modeling_deepseek.conversion.add_code import add_code
from modeling_deepseek.conversion.cli import main
from modeling_deepseek.hub import code_files

CODE = {path.name for path in code_files()}
PREFIX = {"deepseek": "Deepseek", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}

LOAD = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""


@pytest.fixture
def snapshot(tmp_path):
    """A folder in the shape of an official one: old code, a config with fields that are nobody's."""
    config = {
        "model_type": "deepseek_v3",
        "auto_map": {"AutoModel": "modeling_old.DeepseekV3Model", "AutoTokenizer": ["tokenization_old.Fast", None]},
        "zebra": {"nested": [1, 2.5e-06, "｜"]},
        "architectures": ["DeepseekV3ForCausalLM"],
        "a": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "modeling_deepseek.py").write_text("raise RuntimeError('dead code')\n")
    return tmp_path


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_puts_the_import_closure_beside_the_weights(snapshot):
    written = add_code(snapshot)
    assert set(written) == CODE | {"config.json"}
    assert {path.name for path in snapshot.iterdir()} == CODE | {"config.json"}
    assert all((snapshot / path.name).read_bytes() == path.read_bytes() for path in code_files())


@pytest.mark.parametrize("model_type", PREFIX)
def test_auto_map_names_the_classes_of_the_model_type(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    add_code(tmp_path)
    prefix = PREFIX[model_type]
    assert read_config(tmp_path)["auto_map"] == {
        "AutoConfig": f"configuration_deepseek.{prefix}Config",
        "AutoModel": f"modeling_deepseek.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{prefix}ForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_deepseek.{prefix}ForSequenceClassification",
        "AutoModelForTokenClassification": f"modeling_deepseek.{prefix}ForTokenClassification",
        "AutoModelForQuestionAnswering": f"modeling_deepseek.{prefix}ForQuestionAnswering",
    }


def test_config_keeps_its_other_fields_and_their_order(snapshot):
    before = read_config(snapshot)
    add_code(snapshot)
    after = read_config(snapshot)
    assert list(after) == list(before)
    assert {**after, "auto_map": None} == {**before, "auto_map": None}
    assert after["auto_map"]["AutoTokenizer"] == ["tokenization_old.Fast", None]
    assert after["auto_map"]["AutoModel"] == "modeling_deepseek.DeepseekV3Model"


def test_second_call_writes_nothing(snapshot):
    add_code(snapshot)
    inodes = {path.name: path.stat().st_ino for path in snapshot.iterdir()}
    assert add_code(snapshot) == []
    assert {path.name: path.stat().st_ino for path in snapshot.iterdir()} == inodes


def test_links_into_the_hub_cache_are_replaced_and_blobs_stay(snapshot, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    before = read(blobs)
    add_code(snapshot)
    assert read(blobs) == before
    assert not any(path.is_symlink() for path in snapshot.iterdir())


def test_config_is_moved_into_place_last(snapshot, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    assert add_code(snapshot) == moved
    assert moved[-1] == "config.json"


@pytest.mark.parametrize("failing_write", [0, len(CODE)], ids=["first file", "config"])
def test_full_disk_leaves_the_folder_as_it_was(snapshot, monkeypatch, failing_write):
    before = read(snapshot)
    calls = iter(range(len(CODE) + 1))

    def fsync(descriptor):
        if next(calls) == failing_write:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        add_code(snapshot)
    assert read(snapshot) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "not valid JSON"),
        ("[]", "holds a list; expected an object"),
        ("{}", "model_type 'None'.*deepseek_v3"),
        ('{"model_type": "qwen2"}', "'qwen2'.*deepseek_v2.*deepseek_v3"),
        ('{"model_type": ["deepseek_v3"]}', "deepseek_v3"),
        ('{"model_type": "deepseek_v3", "auto_map": "x"}', "auto_map is 'x'; expected an object"),
        ('{"model_type": "llama"}', r"DeepseekForCausalLM\.from_pretrained\(folder\)"),
    ],
)
def test_bad_folder_is_an_error_and_nothing_is_written(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = read(tmp_path)
    with pytest.raises(ValueError, match=message):
        add_code(tmp_path)
    assert read(tmp_path) == before


def test_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        add_code(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_cache_entry_instead_of_its_snapshot_is_named(tmp_path):
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(ValueError, match=r"name one of its snapshots"):
        add_code(tmp_path)


def test_native_checkpoint_loads_as_remote_code_with_equal_logits(tmp_path):
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=256,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    add_code(tmp_path / "model")
    script = tmp_path / "load.py"
    script.write_text(without("modeling_deepseek") + LOAD)
    subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path / "model"), str(tmp_path / "logits.pt")],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    expected = model(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)


def test_command_names_what_it_wrote(snapshot, capsys):
    assert main(["add-code", str(snapshot)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CODE | {"config.json"})
    assert main(["add-code", str(snapshot)]) == 0
    assert "already" in capsys.readouterr().out


def test_command_reports_a_bad_folder_in_one_line(tmp_path, capsys):
    assert main(["add-code", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"deepseek-convert: error: {tmp_path} has no config.json")
    assert err.count("\n") == 1


def test_command_reports_an_os_error_in_one_line(snapshot, capsys, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda source, target: os.stat(snapshot / "gone"))
    assert main(["add-code", str(snapshot)]) == 2
    assert capsys.readouterr().err.startswith("deepseek-convert: error: [Errno 2]")


@pytest.mark.parametrize("argv", [[], ["add-cod", "x"], ["add-code"]], ids=["no command", "unknown", "no folder"])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: deepseek-convert" in capsys.readouterr().err
