"""Callbacks inside `Trainer`: the weight of the MTP loss over time, and the parts of the loss in its logs."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from absent import without
from modeling_deepseek.training import LossPartsCallback, MTPLossWeightCallback
from tiny import tiny_model

IDS = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Seen(TrainerCallback):
    """What a reporter of `report_to` would be told, and the weight at every step."""

    def __init__(self):
        self.logs, self.weights = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.config.mtp_loss_weight)


def trained(folder, *callbacks, model=None, resume=False, steps=6, eval_dataset=None, **overrides):
    arguments = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        save_steps=2,
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    seen = Seen()
    trainer = Trainer(
        model=model or tiny_model("v3", num_nextn_predict_layers=1),
        args=TrainingArguments(**arguments | overrides),
        train_dataset=ROWS,
        eval_dataset=eval_dataset,
        callbacks=[*callbacks, seen],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer, seen


def test_the_weight_steps_by_optimiser_steps(tmp_path):
    _, seen = trained(tmp_path, MTPLossWeightCallback({0: 0.3, 4: 0.1}), gradient_accumulation_steps=2)
    assert seen.weights == [0.3, 0.3, 0.3, 0.3, 0.1, 0.1]


def test_the_weight_steps_by_tokens(tmp_path):
    schedule = MTPLossWeightCallback({0: 0.3, 96: 0.2, 145: 0.1}, unit="tokens")
    _, seen = trained(tmp_path, schedule, include_num_input_tokens_seen="all")
    assert seen.weights == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]  # 48 tokens a step


def test_a_resumed_run_has_the_weight_of_its_place(tmp_path):
    trained(tmp_path, MTPLossWeightCallback({0: 0.3, 1: 0.2, 4: 0.1}))
    _, seen = trained(tmp_path, MTPLossWeightCallback({0: 0.3, 1: 0.2, 4: 0.1}), resume=True)
    assert seen.weights == [0.2, 0.2, 0.1, 0.1]


def test_the_weight_of_an_adapted_model_is_that_of_its_base(tmp_path):
    base = tiny_model("v3", num_nextn_predict_layers=1)
    model = get_peft_model(base, LoraConfig(target_modules=["eh_proj"]))
    trained(tmp_path, MTPLossWeightCallback({0: 0.3, 1: 0.05}), model=model, steps=2, save_steps=10)
    assert base.config.mtp_loss_weight == 0.05


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("depths", [1, 2])
def test_the_parts_of_the_loss_are_logged_beside_it(tmp_path, depths, accumulation):
    model = tiny_model("v3", num_nextn_predict_layers=depths)
    options = dict(model=model, gradient_accumulation_steps=accumulation)
    trainer, seen = trained(tmp_path, LossPartsCallback(), **options)
    logs = [log for log in seen.logs if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        mtp = [log["mtp_loss"]] if depths == 1 else [log["mtp_loss_1"], log["mtp_loss_2"]]
        assert log["loss"] == pytest.approx(log["lm_loss"] + 0.3 / depths * sum(mtp), rel=1e-4)
        assert all(4 < part < 30 for part in (log["lm_loss"], *mtp))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lm_loss"] for entry in history] == [log["lm_loss"] for log in logs]


def test_logged_parts_are_those_of_the_batch(tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    with torch.no_grad():
        output = model.train()(input_ids=IDS, labels=IDS, use_cache=False)
    options = dict(steps=1, logging_steps=1, per_device_train_batch_size=24)
    _, seen = trained(tmp_path, LossPartsCallback(), model=model, **options)
    assert seen.logs[0]["lm_loss"] == pytest.approx(output.lm_loss.item(), abs=1e-4)
    items, reached = 24 * 15, 24 * 14  # Trainer divides by the labels that the main model predicts
    assert seen.logs[0]["mtp_loss"] == pytest.approx(output.mtp_loss[0].item() * reached / items, abs=1e-4)


def test_balance_losses_are_logged_as_they_are(tmp_path):
    model = tiny_model("v2", aux_loss_alpha=0.1)
    with torch.no_grad():
        output = model.train()(input_ids=IDS, labels=IDS, use_cache=False)
    for accumulation in (1, 4):  # sequence-wise losses: their mean is that of the parts
        options = dict(per_device_train_batch_size=24 // accumulation, gradient_accumulation_steps=accumulation)
        folder = tmp_path / str(accumulation)
        _, seen = trained(folder, LossPartsCallback(), model=deepcopy(model), steps=1, logging_steps=1, **options)
        assert seen.logs[0]["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-5)
        assert seen.logs[0]["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_evaluation_between_the_steps_adds_nothing_to_the_parts(tmp_path):
    found = []
    for strategy in ("no", "steps"):
        options = dict(model=tiny_model("v3", num_nextn_predict_layers=1), eval_strategy=strategy, eval_steps=1)
        trainer, seen = trained(tmp_path / strategy, LossPartsCallback(), eval_dataset=ROWS[:4], **options)
        found.append([log["lm_loss"] for log in seen.logs if "lm_loss" in log])
        assert not trainer.model._forward_hooks
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert len(set(found[0])) == 3  # each log has its own steps


def test_placed_first_the_parts_reach_reporters(tmp_path):
    seen = Seen()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    model = tiny_model("v3", num_nextn_predict_layers=1)
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=[seen])
    trainer.callback_handler.callbacks.insert(0, LossPartsCallback())
    trainer.train()
    assert {"lm_loss", "mtp_loss"} < seen.logs[0].keys()


def test_a_run_that_an_error_ended_leaves_nothing_in_the_next(tmp_path):
    model, parts = tiny_model("v3", num_nextn_predict_layers=1), LossPartsCallback()

    class Halt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, parts, Halt(), model=model)
    runs = {"again": parts, "fresh": LossPartsCallback()}
    found = [trained(tmp_path / name, each, model=deepcopy(model))[1].logs[0] for name, each in runs.items()]
    assert found[0]["lm_loss"] == found[1]["lm_loss"]
    trained(tmp_path, parts, model=model)
    assert not model._forward_hooks


def test_while_the_weight_is_zero_there_is_no_mtp_part(tmp_path):
    schedule = MTPLossWeightCallback({0: 0.3, 2: 0.0})
    _, seen = trained(tmp_path, schedule, LossPartsCallback(), steps=4)
    assert [sorted(log.keys() & {"lm_loss", "mtp_loss"}) for log in seen.logs[:2]] == [
        ["lm_loss", "mtp_loss"],
        ["lm_loss"],
    ]


def test_a_loss_that_trainer_computes_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1.*set it to 0"):
        trained(tmp_path, MTPLossWeightCallback({0: 0.3}), label_smoothing_factor=0.1)


WRONG = {
    "empty": (dict(weights={}), "begin at 0"),
    "late": (dict(weights={10: 0.3}), "begin at 0"),
    "backwards": (dict(weights={0: 0.3, 5: 0.2, 3: 0.1}), "go up"),
    "negative": (dict(weights={0: -0.1}), "not negative"),
    "unit": (dict(weights={0: 0.3}, unit="epochs"), "'steps' or 'tokens', got 'epochs'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_schedule_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MTPLossWeightCallback(**arguments)


def test_a_model_without_mtp_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no MTP layers.*add_mtp_layers"):
        trained(tmp_path, MTPLossWeightCallback({0: 0.3}), model=tiny_model("v3"))


def test_tokens_that_nobody_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="include_num_input_tokens_seen='all'"):
        trained(tmp_path, MTPLossWeightCallback({0: 0.3}, unit="tokens"))


# Loads the folder argv[1] with the code that lies in it, trains and drafts with it, and prints what came of it.
REMOTE = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(3, 15)[None]
options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=2)
plain = model.generate(ids, **options)
drafted = model.generate(ids, **options, use_mtp=True, num_assistant_tokens=3, return_dict_in_generate=True)
assert torch.equal(plain, drafted.sequences)
assert drafted.mtp_stats.drafted.item() > 20
torch.save(model(ids, output_mtp_logits=True).mtp_logits, sys.argv[2])
output = model.train()(ids, labels=ids)
torch.testing.assert_close(output.loss, output.lm_loss + 0.15 * sum(output.mtp_loss))
output.loss.backward()
model.add_mtp_layers(1)
assert model.config.num_nextn_predict_layers == 3
assert type(model).__module__.startswith("transformers_modules.")
assert "modeling_deepseek" not in sys.modules
"""


def test_twenty_steps_later_a_fresh_process_without_the_package_has_the_same_mtp_logits(tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=2)
    trained(tmp_path / "run", model=model, steps=20, save_steps=100)
    model.save_pretrained(tmp_path / "saved")
    script = without("modeling_deepseek") + REMOTE
    arguments = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval()(torch.arange(3, 15)[None], output_mtp_logits=True).mtp_logits
    for ours, theirs in zip(torch.load(tmp_path / "logits.pt"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
