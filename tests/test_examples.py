"""The fine-tuning examples as a user runs them, on a few functions and for a few steps."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("finetune_trainer", "finetune_lora", "sft_chat", "grpo", "distill")


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Runs an example on some short functions, which it is evaluated on too: prints -> (before, after), and the folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    data = importlib.import_module("stdlib_data")
    few = [
        data.Function(
            f"def add_{n}(number):", f"Add {n} to a number.", f"def add_{n}(number):\n    return number + {n}"
        )
        for n in range(32)
    ]

    def run(name: str, *flags: str) -> tuple[float, float, Path]:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "functions", lambda: (few, few))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(tmp_path / "out"), *flags])
        module.main()
        before, after = re.search(r"(\d+\.\d{3}) .*-> (\d+\.\d{3})", capsys.readouterr().out.splitlines()[-1]).groups()
        return float(before), float(after), tmp_path / "out"

    return run


@pytest.mark.parametrize("name", [*NAMES, "stdlib_data"])
def test_has_fewer_than_80_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("finetune_trainer", []),
        ("finetune_lora", ["--merge"]),
        ("sft_chat", []),
        ("sft_chat", ["--packing"]),
        ("sft_chat", ["--padding-free"]),
    ],
    ids=["trainer", "lora", "chat", "chat packed", "chat without padding"],
)
def test_the_loss_falls_and_the_result_loads(example, name, flags):
    before, after, folder = example(name, "--steps", "6", *flags)
    assert after < 0.8 * before
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_nextn_predict_layers == 1


def test_the_student_comes_nearer_to_the_teacher(example):
    before, after, folder = example("distill", "--steps", "4")
    assert after < 0.9 * before
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 5


def test_grpo_runs(example):
    _, _, folder = example("grpo", "--steps", "1")
    trained, before = (
        AutoModelForCausalLM.from_pretrained(each, dtype="float32") for each in (folder, EXAMPLES / "tiny-v3")
    )
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


def test_a_compiler_is_the_judge(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    grpo = importlib.import_module("grpo")
    rests = [
        'x):\n    """Double."""\n    return 2 * x\n\nand so on',
        "x):\n    return 2 * x",
        "x):\n    return 2 *",
        "x)",
    ]
    assert grpo.compiles(["def f("] * 4, rests) == [1, 1, 0, 0]
    assert grpo.documented(["def f("] * 4, rests) == [1, 0, 0, 0]


def test_the_library_has_functions_to_learn_from(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train, kept = importlib.import_module("stdlib_data").functions()
    assert len(train) > 10 * len(kept) > 100
    for function in kept:
        compile(function.source, function.head, "exec")
