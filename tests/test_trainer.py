"""Trainer: it trains, evaluates, saves and resumes with the official keys on disk."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny import tiny_model

IDS = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(folder, steps: int = 8, resume: bool = False, **overrides):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **overrides,
    )
    losses = Losses()
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[losses])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return trainer, losses.values


def test_resuming_continues_the_same_loss_curve(tmp_path):
    _, whole = train(tmp_path)
    _, resumed = train(tmp_path, resume=True)
    assert whole[4:] != pytest.approx(whole[:4], abs=1e-2)
    assert resumed == pytest.approx(whole[4:], abs=1e-5)


def test_evaluation_reports_the_language_model_loss_alone(tmp_path):
    trainer, _ = train(tmp_path, steps=1)
    metrics = trainer.evaluate()
    model, ids = trainer.model, IDS[:4]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    prediction = trainer.predict(ROWS[:4])
    assert prediction.predictions.shape == (4, 16, model.config.vocab_size)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_state_dict_takes_a_checkpoint_with_official_keys(shards, tmp_path):
    trained, fresh = (tiny_model("v3", seed=seed, num_nextn_predict_layers=1) for seed in (0, 1))
    trained.save_pretrained(tmp_path)
    official = list(load_file(tmp_path / "model.safetensors").items())
    parts = [dict(official[shard::shards]) for shard in range(shards)]
    for part in parts:
        result = fresh.load_state_dict(part, strict=shards == 1)
        assert not result.unexpected_keys
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_load_state_dict_names_a_misshapen_expert():
    model, name = tiny_model("v3"), "model.layers.1.mlp.experts.0.down_proj.weight"
    for misshapen in (torch.zeros(3, 3), torch.ones(1, 1)):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            model.load_state_dict({name: misshapen}, strict=False)
