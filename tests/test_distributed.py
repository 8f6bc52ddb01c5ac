"""Trainer with two gloo processes, under DDP and FSDP2, or killed and resumed, gives what one process gives. Runs: ranks.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ranks
from modeling_deepseek.training import ema_weights
from tiny import tiny_model

pytestmark = pytest.mark.timeout(600)  # the first test waits for all runs with two processes
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs with two processes lie, which `torch.distributed.run` made."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, ranks.__file__, str(folder), *ranks.RUNS]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Name -> that run with one process, and its folder; those under DDP and FSDP2 have the same."""
    found = {}

    def run(name: str) -> dict:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            found[name] = ranks.run(name, folder, 1) | dict(folder=folder)
        return found[name]

    return run


@pytest.mark.parametrize("name", ranks.RUNS)
def test_two_processes_have_the_losses_of_one(name, folder, single):
    expected = single(name.removeprefix("fsdp "))
    assert len(expected["losses"]) == ranks.STEPS
    for rank in range(2):
        found = torch.load(folder / f"rank{rank}.pt")[name]
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        for weight, values in found["weights"].items():
            torch.testing.assert_close(values, expected["weights"][weight], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "fsdp v3", "lora"])
def test_the_router_bias_of_two_processes_is_that_of_one(name, folder, single):
    expected = torch.stack(single(name.removeprefix("fsdp "))["biases"])
    for rank in range(2):
        assert torch.equal(torch.stack(torch.load(folder / f"rank{rank}.pt")[name]["biases"]), expected)
    moves = expected.diff(dim=0).abs().amax((1, 2))
    # after the steps 1, 2, an evaluation, 3, 4, an evaluation: one move of 0.01 per step of many micro-batches, none by evaluation
    torch.testing.assert_close(moves, torch.tensor([0.01] * 3 if name == "lora" else [0.01, 0, 0.01, 0.01, 0]))


def test_an_fsdp_checkpoint_resumes_with_the_same_losses(folder, single):
    resumed = torch.load(folder / "rank0.pt")["fsdp v3 resumed"]
    expected = single("v3")
    assert resumed["losses"] == pytest.approx(expected["losses"][2:], abs=1e-5)
    assert torch.equal(resumed["biases"][-1], expected["biases"][-1])


@pytest.mark.parametrize("name", ["v3", "fsdp v3"])
def test_a_checkpoint_of_two_processes_is_a_model_with_official_keys(name, folder, single, tmp_path):
    trained = tiny_model("v3", num_nextn_predict_layers=1)
    trained.save_pretrained(tmp_path)
    checkpoint = folder / name / f"checkpoint-{ranks.STEPS}"
    official, saved = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: x.shape for key, x in official.items()}
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for weight, values in torch.load(folder / "rank1.pt")[name]["weights"].items():
        assert torch.equal(loaded.get_parameter(weight), values)
    bias = torch.stack([router.e_score_correction_bias for router in ranks.routers_of(loaded).values()])
    assert torch.equal(bias, single("v3")["biases"][-1])


def test_the_average_of_a_ddp_run_is_that_of_one_process(folder, single):
    expected, found = (ema_weights(run / "checkpoint-2") for run in (single("v3")["folder"], folder / "v3"))
    assert expected.keys() == found.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-5)


def test_a_run_that_was_killed_resumes_where_an_undisturbed_one_goes_on(single, tmp_path):
    command = [sys.executable, ranks.__file__, str(tmp_path), "killed"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL, done.stderr[-5000:]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    expected, resumed = single("v3"), ranks.run("v3", tmp_path, 1, resume=tmp_path / "checkpoint-2")
    assert resumed["losses"] == pytest.approx(expected["losses"][2:], abs=1e-5)
    assert torch.equal(torch.stack(resumed["biases"]), torch.stack(expected["biases"][3:]))
    averages = [ema_weights(folder / "checkpoint-4") for folder in (expected["folder"], tmp_path)]
    for name, average in averages[0].items():
        torch.testing.assert_close(averages[1][name], average, rtol=0, atol=1e-6)


def test_fsdp_wraps_what_the_model_has():
    """accelerate refuses a class that is named for wrapping and is nowhere in the model."""
    bare, predicting = tiny_model("v3"), tiny_model("v3", num_nextn_predict_layers=1)
    assert bare._no_split_modules == {"DeepseekDecoderLayer"}
    assert predicting._no_split_modules == {"DeepseekDecoderLayer", "DeepseekMTPLayer"}
    bare.add_mtp_layers(1)
    assert bare._no_split_modules == bare.model._no_split_modules == predicting._no_split_modules
