"""Learning rate, batch size and weight decay over a run: against the numbers of the reports, and inside `Trainer`."""

import math

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_deepseek.schedules import (
    BatchRampTrainer,
    RampBatchSampler,
    batch_size_ramp,
    multi_step_schedule,
    parameter_groups,
    v3_schedule,
)
from tiny import tiny_model

IDS = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = torch.arange(3, 27)  # names the row
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def adamw(lr=1.0):
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, steps):
    """The learning rate of every step, and the one after the last."""
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_steps_of_deepseek_llm():
    found = rates(multi_step_schedule(adamw(4.2e-4), steps=100, warmup_steps=4), 100)
    assert found[:6] == pytest.approx([0, 1.05e-4, 2.1e-4, 3.15e-4, 4.2e-4, 4.2e-4])
    assert found[5:80] == pytest.approx([4.2e-4] * 75)
    assert found[80:90] == pytest.approx([4.2e-4 * 0.316] * 10)
    assert found[90:] == pytest.approx([4.2e-5] * 11, rel=2e-3)  # "10 % of the maximum value"


def test_the_marks_of_deepseek_v2_are_others():
    found = rates(multi_step_schedule(adamw(), steps=10, warmup_steps=0, marks=(0.6, 0.9)), 10)
    assert found == pytest.approx([1] * 6 + [0.316] * 3 + [0.316**2] * 2)


def test_the_marks_are_of_sequences_where_steps_differ_in_size():
    sizes = [1] * 10 + [5] * 18  # half of the steps are over after 30 of 100 sequences
    schedule = multi_step_schedule(adamw(), sizes, warmup_steps=0, marks=(0.1, 0.8))
    assert rates(schedule, 28) == pytest.approx([1] * 10 + [0.316] * 14 + [0.316**2] * 5)


def test_the_learning_rate_of_deepseek_v3():
    found = rates(v3_schedule(adamw(2.2e-4), steps=14_800, warmup_steps=20), 14_800)  # a step is a billion tokens
    assert found[:20] == pytest.approx([2.2e-4 * step / 20 for step in range(20)])
    assert found[20:10_001] == pytest.approx([2.2e-4] * 9_981)
    assert found[12_150] == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half-way down the cosine
    assert found[11_075] == pytest.approx(2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2)
    assert all(later < earlier for earlier, later in zip(found[10_001:14_299], found[10_002:14_300], strict=True))
    assert found[14_301:14_633] == pytest.approx([2.2e-5] * 332)
    assert found[14_634:] == pytest.approx([7.3e-6] * 167)


WRONG_SCHEDULES = {
    "marks": (dict(steps=10, marks=(0.9, 0.8)), r"shares of the run that go up.*got \(0.9, 0.8\)"),
    "steps for marks": (dict(steps=10, marks=(800, 900)), "shares of the run"),
    "all warm-up": (dict(steps=500), "warm-up of 2000 steps in a run of 500.*warmup_steps from 0 to 499"),
    "empty": (dict(steps=[], warmup_steps=0), "in a run of 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_SCHEDULES.values(), ids=WRONG_SCHEDULES)
def test_a_schedule_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        multi_step_schedule(adamw(), **arguments)


# first, last, sequences of the ramp, sequences of the run: the reports' tokens at 4096 a sequence
RAMPS = {
    "v2": (2304, 9216, 225e9 / 4096, 8.1e12 / 4096),
    "v3": (3072, 15360, 469e9 / 4096, 14.8e12 / 4096),
}


@pytest.mark.parametrize(("first", "last", "ramp", "total"), RAMPS.values(), ids=RAMPS)
def test_the_ramps_of_the_reports(first, last, ramp, total):
    sizes = batch_size_ramp(first, last, ramp=ramp / total, sequences=int(total), multiple_of=256)
    assert sizes[0] == first and sizes[-1] == last and sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)
    assert 0 <= sum(sizes) - int(total) < last
    grown = sizes.index(last)
    assert sum(sizes[:grown]) == pytest.approx(ramp, rel=1e-3)
    # d(done)/d(step) = size, and size is linear in done: the number of steps is a logarithm
    exact = batch_size_ramp(first, last, ramp=ramp / total, sequences=int(total)).index(last)
    assert exact == pytest.approx(ramp / (last - first) * math.log(last / first), rel=1e-3)


def test_without_a_ramp_every_step_is_the_last():
    assert batch_size_ramp(4, 12, ramp=0, sequences=30) == [12, 12, 12]
    assert batch_size_ramp(12, 12, ramp=1, sequences=30) == [12, 12, 12]


WRONG_RAMPS = {
    "shrinks": (dict(first=8, last=4, ramp=0.5, sequences=100), "do not shrink; got 8 and 4"),
    "multiple": (dict(first=4, last=10, ramp=0.5, sequences=100, multiple_of=4), "multiples of 4.*got 4 and 10"),
    "tokens for a share": (dict(first=4, last=8, ramp=469e9, sequences=100), "share.*got 469000000000.0"),
    "empty": (dict(first=4, last=8, ramp=0.5, sequences=0), "of 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_RAMPS.values(), ids=WRONG_RAMPS)
def test_a_ramp_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_size_ramp(**arguments)


def names_by_decay(model):
    """{weight decay: names} of the groups, each parameter found once."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)}
    groups = parameter_groups(model, weight_decay=0.1)
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("family", ["llm", "moe16b", "v2", "v3"])
def test_norms_and_biases_do_not_decay_and_all_else_does(family):
    model = tiny_model(family, attention_bias=True)
    groups = names_by_decay(model)
    expected = {name for name, _ in model.named_parameters() if "norm" in name or name.endswith("bias")}
    assert any("norm" in name for name in expected) and any(name.endswith(".bias") for name in expected)
    assert groups == {0.1: {name for name, _ in model.named_parameters()} - expected, 0.0: expected}


def test_the_router_bias_is_in_no_group():
    model = tiny_model("v3")
    router = model.model.layers[1].mlp.gate
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in dict(model.named_buffers())
    bias = router.e_score_correction_bias
    del router.e_score_correction_bias
    router.e_score_correction_bias = torch.nn.Parameter(bias)  # the official code
    groups = parameter_groups(model, weight_decay=0.1)
    found = {id(parameter) for group in groups for parameter in group["params"]}
    assert id(router.e_score_correction_bias) not in found and id(router.weight) in found
    assert len(found) == len(list(model.parameters())) - 1


def test_tied_parameters_are_in_one_group_once():
    model = tiny_model("llm", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    decayed = parameter_groups(model, weight_decay=0.1)[0]["params"]
    assert sum(parameter is model.lm_head.weight for parameter in decayed) == 1


def test_of_an_adapted_model_the_adapter_alone_is_grouped():
    model = get_peft_model(tiny_model("v3"), LoraConfig(target_modules=["o_proj"], use_dora=True))
    groups = names_by_decay(model)
    assert all("lora_A" in name or "lora_B" in name for name in groups[0.1]) and len(groups[0.1]) == 6
    assert all("lora_magnitude" in name for name in groups[0.0]) and len(groups[0.0]) == 3


def test_a_model_loaded_as_remote_code_has_the_same_groups(tmp_path):
    ours = tiny_model("v3", num_nextn_predict_layers=1)
    ours.save_pretrained(tmp_path)
    remote = get_class_from_dynamic_module("modeling_deepseek.DeepseekV3ForCausalLM", tmp_path).from_pretrained(
        tmp_path
    )
    assert type(remote).__module__.startswith("transformers_modules.")
    assert names_by_decay(remote) == names_by_decay(ours)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="DeepseekForCausalLM has no parameter with requires_grad"):
        parameter_groups(tiny_model("llm").requires_grad_(False), weight_decay=0.1)


class Seen(TrainerCallback):
    """The learning rate and the rows of every step. `names` collects the first token of each row."""

    def __init__(self):
        self.rates, self.rows, self.names = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.rows.append([name for names in self.names for name in names])
        self.names.clear()


def watched(model, seen):
    """`model`, telling `seen` of every micro-batch that it is given."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.names.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    return model


def arguments(folder, **overrides):
    fields = dict(output_dir=str(folder), max_steps=10, save_steps=4, per_device_train_batch_size=2, report_to="none")
    return TrainingArguments(**fields | dict(use_cpu=True, disable_tqdm=True) | overrides)


class Overriding(Trainer):
    """The way under FSDP: Trainer makes the optimiser."""

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer or torch.optim.AdamW(parameter_groups(model or self.model, 0.1), lr=1e-3)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.lr_scheduler or v3_schedule(optimizer or self.optimizer, num_training_steps, 2)
        return self.lr_scheduler


@pytest.mark.parametrize("way", ["passed", "overridden"])
def test_trainer_follows_the_schedule_and_a_resumed_run_goes_on_with_it(tmp_path, way):
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        seen, model = Seen(), tiny_model("v3")
        common = dict(model=model, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[seen])
        if way == "passed":
            optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
            trainer = Trainer(**common, optimizers=(optimizer, v3_schedule(optimizer, 10, warmup_steps=2)))
        else:
            trainer = Overriding(**common)
        trainer.train(resume_from_checkpoint=resume)
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
        found.append((seen.rates, model.state_dict()))
    (whole, weights), (resumed, weights_again) = found
    assert whole == pytest.approx(rates(v3_schedule(adamw(1e-3), 10, warmup_steps=2), 10)[:10])
    assert len(set(whole)) >= 5
    assert resumed == whole[4:]
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


SIZES = [4, 4, 8, 8, 12, 12, 12]


def ramped(folder, seen, sizes=SIZES, resume=None, dataset=ROWS, **overrides):
    fields = dict(max_steps=len(sizes), save_steps=3, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    trainer = BatchRampTrainer(
        batch_sizes=sizes,
        model=watched(tiny_model("v3"), seen),
        args=arguments(folder, **fields | overrides),
        train_dataset=dataset,
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_optimiser_step_has_its_number_of_sequences(tmp_path):
    seen = Seen()
    trainer = ramped(tmp_path, seen)
    assert [len(rows) for rows in seen.rows] == SIZES
    assert trainer.state.global_step == len(SIZES)
    rows = [row for rows in seen.rows for row in rows]
    passes = [rows[:24], rows[24:48], rows[48:]]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(3, 27))  # each row once in each pass over the data
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
    assert len(set(passes[2])) == 12


def test_a_resumed_ramp_goes_on_with_the_next_rows(tmp_path):
    whole, resumed = Seen(), Seen()
    weights = ramped(tmp_path, whole).model.state_dict()
    again = ramped(tmp_path, resumed, resume=str(tmp_path / "checkpoint-3")).model.state_dict()
    assert resumed.rows == whole.rows[3:]
    assert resumed.rates == whole.rates[3:]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_workers_draw_the_same_rows(tmp_path):
    alone, worked = Seen(), Seen()
    ramped(tmp_path, alone, sizes=[2, 4])
    ramped(tmp_path, worked, sizes=[2, 4], dataloader_num_workers=1)
    assert worked.rows == alone.rows


def test_a_step_is_the_gradient_of_the_mean_over_all_its_sequences(tmp_path):
    """The micro-batches of a large step weigh as those of a small one: one step of SGD, against autograd."""
    seen, model = Seen(), tiny_model("v3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fields = dict(max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = dict(args=arguments(tmp_path, **fields), optimizers=(optimizer, schedule), callbacks=[seen])
    before = model.lm_head.weight.detach().clone()
    BatchRampTrainer(batch_sizes=[12], model=watched(model, seen), train_dataset=ROWS, **options).train()
    rows = torch.stack([IDS[name - 3] for name in seen.rows[0]])
    fresh = tiny_model("v3").train()
    fresh(rows, labels=rows).loss.backward()
    torch.testing.assert_close(before - model.lm_head.weight, 0.5 * fresh.lm_head.weight.grad, rtol=1e-3, atol=1e-5)


def test_two_ranks_share_every_step_in_halves():
    sampler = RampBatchSampler(SequentialSampler(range(24)), SIZES, parts=4)
    ranks = [list(BatchSamplerShard(sampler, num_processes=2, process_index=rank)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [14, 14]  # two micro-batches a step
    steps = [[sum(rank[2 * step : 2 * step + 2], []) for rank in ranks] for step in range(len(SIZES))]
    assert [len(first) for first, _ in steps] == [len(second) for _, second in steps] == [size // 2 for size in SIZES]
    seen = [row for first, second in steps for row in sorted(first + second)]
    assert seen == [row % 24 for row in range(sum(SIZES))]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


WRONG_RUNS = {
    "multiple": (dict(sizes=[4, 5]), r"step of 5 sequences does not divide into 2.*multiple_of=2"),
    "large": (dict(sizes=[4, 14]), "step of 14 sequences in 2 micro-batches is over per_device_train_batch_size=6"),
    "no end": (dict(max_steps=-1), r"7 steps, and max_steps is -1: set TrainingArguments\(max_steps=7\)"),
    "beyond": (dict(max_steps=8), "max_steps is 8"),
    "stream": (dict(dataset=Stream()), "Stream has none: give a map-style dataset"),
    "empty": (dict(dataset=[]), "list has none"),
    "skip": (dict(ignore_data_skip=True), "starts anew under ignore_data_skip=True"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_a_run_that_cannot_follow_the_ramp_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ramped(tmp_path, Seen(), **options)
