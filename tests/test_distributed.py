"""Trainer with two gloo processes, under DDP and FSDP2, gives what one process gives; the runs are those of ranks.py."""

import os
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs with two processes lie, which `torch.distributed.run` made."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, ranks.__file__, str(folder), *ranks.RUNS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Name -> that run with one process; those under DDP and FSDP2 have the same."""
    found = {}

    def run(name: str) -> dict:
        if name not in found:
            found[name] = ranks.run(name, tmp_path_factory.mktemp("single") / name, 1)
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


@pytest.mark.parametrize("name", [name for name in ranks.RUNS if "v2" not in name])
def test_the_router_bias_of_two_processes_is_that_of_one(name, folder, single):
    expected = torch.stack(single(name.removeprefix("fsdp "))["biases"])
    for rank in range(2):
        assert torch.equal(torch.stack(torch.load(folder / f"rank{rank}.pt")[name]["biases"]), expected)
    # after the steps 1, 2, an evaluation, 3, 4, an evaluation: one move of 0.01 per step, none by an evaluation
    moves = expected.diff(dim=0).abs()
    torch.testing.assert_close(moves.amax((1, 2)), torch.tensor([0.01, 0, 0.01, 0.01, 0]))


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


def test_the_average_of_a_ddp_run_is_that_of_one_process(folder, single, tmp_path):
    ranks.run("v3", tmp_path, 1, steps=2)
    expected, found = ema_weights(tmp_path / "checkpoint-2"), ema_weights(folder / "v3" / "checkpoint-2")
    assert expected.keys() == found.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-5)


def test_fsdp_wraps_what_the_model_has():
    """accelerate refuses a class that is named for wrapping and is nowhere in the model."""
    bare, predicting = tiny_model("v3"), tiny_model("v3", num_nextn_predict_layers=1)
    assert bare._no_split_modules == {"DeepseekDecoderLayer"}
    assert predicting._no_split_modules == {"DeepseekDecoderLayer", "DeepseekMTPLayer"}
    bare.add_mtp_layers(1)
    assert bare._no_split_modules == bare.model._no_split_modules == predicting._no_split_modules
