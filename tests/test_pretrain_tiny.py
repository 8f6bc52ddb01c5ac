"""The pretraining script's parts: split, tokenizer, packing, bits per byte; and a run of two steps."""

import math
import shutil
import sysconfig
from pathlib import Path, PurePosixPath

import pytest
import torch

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.load_balance import RouterBiasCallback, routers_of

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "pretrain_tiny.py"
MICRO = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, vocab_size=300)


@pytest.fixture
def library(tmp_path):
    """A library of four modules (`json` is held out by its hash), with what must be left out."""
    files = {
        "abc.py": "import abc\n",
        "json/__init__.py": "'''é'''\n",
        "test/test_json/test_dump.py": "import json\n",
        "test/test_abc.py": "import abc as tested\n",
        "empty.py": "",
        "site-packages/other.py": "import other\n",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "lib" / "latin.py").write_bytes("# -*- coding: latin-1 -*- é".encode("latin-1"))
    return tmp_path / "lib"


def micro_config(pretrain, **overrides):
    return DeepseekV3Config(bos_token_id=0, eos_token_id=1, **pretrain.MODEL | MICRO | overrides)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("json/decoder.py", "json"),
        ("test/test_json/test_dump.py", "json"),
        ("test/test_json.py", "json"),
        ("_pydecimal.py", "pydecimal"),
        ("test/__init__.py", "init__"),
    ],
)
def test_a_test_belongs_to_the_module_that_it_tests(pretrain, path, module):
    assert pretrain.module_name(PurePosixPath(path)) == module


def test_split_depends_on_the_name_alone(pretrain):
    names = ["abc", "argparse", "asyncio", "collections", "json", "logging", "os", "struct", "typing", "zipfile"]
    assert [name for name in names if pretrain.is_held_out(name)] == ["collections", "json", "logging", "struct"]


def test_library_is_split_by_module_and_odd_files_are_left_out(pretrain, library):
    train, held_out = pretrain.read_library(library)
    assert sorted(train) == ["abc.py", "test/test_abc.py"]
    assert sorted(held_out) == ["json/__init__.py", "test/test_json/test_dump.py"]


def test_own_library_is_split_into_disjoint_modules(pretrain):
    train, held_out = pretrain.read_library(Path(sysconfig.get_paths()["stdlib"]))
    names = [{pretrain.module_name(PurePosixPath(path)) for path in files} for files in (train, held_out)]
    assert not names[0] & names[1]
    sizes = [sum(map(len, files.values())) for files in (train, held_out)]
    assert 0.02 < sizes[1] / sum(sizes) < 0.06


def test_library_without_sources_is_named(pretrain, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds 0 modules to train on and 0 held out"):
        pretrain.read_library(tmp_path)


def test_tokenizer_gives_every_byte_back(pretrain):
    text = "def f(x):\n    return {'é': x[0:12345]}  # \tü\r\n\n\nclass A:\n        pass\n"
    tokenizer = pretrain.train_tokenizer([text] * 3, 300)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == text
    assert pretrain.encode(tokenizer, [text, text]).tolist() == [*ids, tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 24])
def test_packing_keeps_every_token_once(pretrain, tokens):
    rows = pretrain.pack(torch.arange(tokens), 8)
    assert {len(row["input_ids"]) for row in rows} == {8}
    inputs, labels = (torch.cat([row[name] for row in rows]) for name in ("input_ids", "labels"))
    assert labels[labels != -100].tolist() == list(range(tokens))
    assert torch.equal(inputs[labels != -100], labels[labels != -100])


@pytest.mark.parametrize("tokens", [2, 8, 9, 12, 13, 29])
def test_bits_per_byte_of_a_model_that_knows_nothing(pretrain, tokens):
    """Every token but the first costs log2(vocabulary), once, however the windows fall."""
    model = DeepseekV3ForCausalLM(micro_config(pretrain, vocab_size=64)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    bits = pretrain.bits_per_byte(model, torch.arange(tokens), num_bytes=10, window=8)
    assert bits == pytest.approx((tokens - 1) * 6 / 10, rel=1e-5)


def test_bits_per_byte_of_one_window_is_the_models_loss(pretrain):
    model = DeepseekV3ForCausalLM(micro_config(pretrain)).eval()
    ids = torch.randint(300, (16,))
    loss = model(ids[None], labels=ids[None]).loss.item()
    assert pretrain.bits_per_byte(model, ids, num_bytes=40, window=16) == pytest.approx(
        loss * 15 / math.log(2) / 40, rel=1e-4
    )


@pytest.fixture
def small_run(pretrain, tmp_path, monkeypatch):
    """Trains a micro model in a folder, from the checkpoint there if there is one."""
    monkeypatch.setattr(pretrain, "BATCH", 1)
    monkeypatch.setattr(pretrain, "CONTEXT", 32)
    monkeypatch.setattr(pretrain, "SAVE_STEPS", 2)
    rows = pretrain.pack(torch.randint(300, (320,)), 32)
    config = micro_config(pretrain)
    return lambda steps: pretrain.train(
        config, rows, tmp_path / "training", steps, "cpu", [RouterBiasCallback(pretrain.BIAS_STEP)]
    )


def same_weights(model, other):
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_interrupted_training_ends_where_the_whole_one_does(small_run, tmp_path):
    whole = small_run(4)
    shutil.rmtree(tmp_path / "training" / "checkpoint-4")
    assert same_weights(small_run(4), whole)


def test_training_moves_the_router_biases(small_run):
    routers = routers_of(small_run(2))
    assert len(routers) == 2  # of the one MoE layer and of the MTP layer
    assert all(router.e_score_correction_bias.any() for router in routers.values())


def test_saved_model_is_bfloat16_with_routers_in_float32(pretrain, tmp_path):
    tokenizer = pretrain.train_tokenizer(["import os\n"], 258)
    model = DeepseekV3ForCausalLM(micro_config(pretrain))
    pretrain.save(model, tokenizer, tmp_path / "scratch", tmp_path / "final")
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert (tmp_path / "final" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--minutes", "0"], "--minutes 0"), (["--output", "."], "--output . exists and is not a model folder")],
)
def test_bad_arguments_are_refused_before_anything_is_read(pretrain, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
