"""TRL's trainers on our classes: supervised, preferences, rewards, GRPO; with the MTP layers, packed rows and masks of chats."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from modeling_deepseek import DeepseekV3ForCausalLM
from modeling_deepseek.load_balance import ExpertLoad
from modeling_deepseek.training import ModelLossMixin, RouterBiasCallback, expert_load
from tiny import tiny_model

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "examples" / "tiny-v3")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}# {{ m.content }}\n"
    "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEXTS = [
    "import os\n",
    "def f(x):\n    return x\n",
    "for i in range(3):\n    print(i)\n",
    "x = 1\n",
    "class A:\n    pass\n",
]
TALKS = [[dict(role="user", content="write"), dict(role="assistant", content=text)] for text in TEXTS]


class ModelLossTrainer(ModelLossMixin, SFTTrainer):
    pass


def model_for(tokenizer, head: str = "ForCausalLM", seed: int = 0, **overrides):
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return tiny_model("v3", head, seed=seed, vocab_size=len(tokenizer), **special, **overrides)


def options(folder, steps: int = 1, **overrides) -> dict:
    fields = dict(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return fields | overrides


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def sft(folder, trainer_class=ModelLossTrainer, model=None, steps: int = 1, column=None, **overrides):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.name_or_path)
    tokenizer.chat_template = TEMPLATE
    return trainer_class(
        model=model or model_for(tokenizer, num_nextn_predict_layers=1),
        args=SFTConfig(**options(folder, steps, **overrides)),
        train_dataset=Dataset.from_dict(column or {"text": TEXTS}),
        processing_class=tokenizer,
    )


def loss_and_gradients(trainer):
    """Of all rows, token by token, however they are batched."""
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    loss = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    loss.backward()
    found = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
    return loss.item(), found


def test_sft_learns_with_its_mtp_layers(tmp_path):
    trainer = sft(tmp_path, steps=12)
    before = trainer.model.model.layers[-1].eh_proj.weight.clone()
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(trainer.model.model.layers[-1].eh_proj.weight, before)


@pytest.mark.parametrize(("trainer_class", "weight", "warned"), [
    (SFTTrainer, 0.3, True), (SFTTrainer, 0.0, False), (ModelLossTrainer, 0.3, False)
])  # fmt: skip
def test_what_trl_leaves_out_of_the_loss_is_said(trainer_class, weight, warned, tmp_path, monkeypatch):
    trainer = sft(tmp_path, trainer_class)
    said = []
    monkeypatch.setattr("modeling_deepseek.modeling_deepseek.logger.warning_once", said.append)
    trainer.model.config.mtp_loss_weight = weight
    _, gradients = loss_and_gradients(trainer)
    assert any("ModelLossMixin" in each for each in said) == warned
    assert any("layers.3." in name for name in gradients) == (trainer_class is ModelLossTrainer)


@pytest.mark.parametrize("trainer_class", [SFTTrainer, ModelLossTrainer])
@pytest.mark.parametrize("packed", [dict(padding_free=True, max_length=None), dict(packing=True, max_length=24)])
def test_rows_without_padding_give_the_loss_of_separate_ones(trainer_class, packed, tmp_path):
    expected, gradients = loss_and_gradients(sft(tmp_path, trainer_class))
    loss, found = loss_and_gradients(sft(tmp_path, trainer_class, **packed))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("packed", [dict(), dict(packing=True, padding_free=True, max_length=48)])
def test_only_what_the_assistant_says_is_learned(packed, tmp_path):
    trainer = sft(tmp_path, column={"messages": TALKS}, assistant_only_loss=True, **packed)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = TOKENIZER.decode(batch["labels"][batch["labels"] != -100])
    assert sorted(learned.split("<eos>")) == sorted(["", *TEXTS])


def test_dpo_prefers_what_was_chosen(tmp_path):
    pairs = {"prompt": ["def f(x):"] * 4, "chosen": [" return x", " pass", " x = 1", " del x"], "rejected": TEXTS[:4]}
    trainer = DPOTrainer(
        model=model_for(TOKENIZER, num_nextn_predict_layers=1),
        ref_model=model_for(TOKENIZER, num_nextn_predict_layers=1),
        args=DPOConfig(**options(tmp_path, steps=6, per_device_train_batch_size=4)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same
    assert losses[-1] < 0.5 * losses[0]
    assert margins[-1] > margins[0] + 1


def test_a_reward_model_learns_to_tell_answers_apart(tmp_path):
    pairs = {"chosen": TEXTS[:4], "rejected": [text[::-1] for text in TEXTS[:4]]}
    trainer = RewardTrainer(
        model=model_for(TOKENIZER, "ForSequenceClassification", num_labels=1),
        args=RewardConfig(**options(tmp_path, steps=12, per_device_train_batch_size=4)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
    )
    trainer.train()
    assert logged(trainer, "accuracy")[-1] == 1
    assert logged(trainer, "loss")[-1] < 0.3 * logged(trainer, "loss")[0]


def test_grpo_takes_a_step_from_the_reference_and_counts_no_rollouts(tmp_path):
    """The reference model, which TRL loads from the folder as transformers' own class, agrees with the policy."""
    model_for(TOKENIZER).save_pretrained(tmp_path / "model")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model")
    before = model.lm_head.weight.clone()

    def even(completion_ids, **columns):
        return [sum(token % 2 == 0 for token in row) / len(row) for row in completion_ids]

    config = options(tmp_path, per_device_train_batch_size=8, num_generations=4, max_completion_length=8, beta=0.04)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_dict({"prompt": ["import", "def f(x"]}),
        processing_class=TOKENIZER,
        reward_funcs=[even],
        callbacks=[RouterBiasCallback(0.0)],
    )
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "grad_norm")[0] > 0
    assert not torch.equal(model.lm_head.weight, before)
    tokens = int(logged(trainer, "num_tokens")[0])
    assert {int(load.sum()) for load in expert_load(model).values()} == {tokens * model.config.num_experts_per_tok}


def test_no_load_is_counted_without_gradient():
    model = tiny_model("v3").train()
    load = ExpertLoad(model)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    assert not any(counts.any() for counts in load.counts.values())
