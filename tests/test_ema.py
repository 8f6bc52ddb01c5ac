"""The moving average of the weights: its values, its way through checkpoints, and the models that come of it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_deepseek.ema import EMACallback, ema_weights
from tiny import tiny_model

IDS = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


class BiasSteps(TrainerCallback):
    """Moves the router bias after every step, as a balancing callback would: one in a new tensor, one in place."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, module in model.named_modules():
            if name.endswith("layers.1.mlp.gate"):
                module.e_score_correction_bias = module.e_score_correction_bias + 0.1
            elif name.endswith("layers.2.mlp.gate"):
                module.e_score_correction_bias.sub_(0.1)


class Trajectory(TrainerCallback):
    """The whole state at the beginning and after every step."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({name: x.detach().float().cpu().clone() for name, x in model.state_dict().items()})

    on_step_end = on_train_begin


def trained(folder, ema, model=None, resume=None, steps=6, use_cpu=True, **overrides):
    """A run with the average, and the states that it went through."""
    fields = dict(output_dir=str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, report_to="none")
    seen = Trajectory()
    trainer = Trainer(
        model=model or tiny_model("v3", num_nextn_predict_layers=1),
        args=TrainingArguments(**fields | dict(use_cpu=use_cpu, disable_tqdm=True) | overrides),
        train_dataset=ROWS,
        callbacks=[BiasSteps(), ema, seen],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.states


def averaged(states, decay):
    """The definition, one step after the other, in fp64."""
    average = {name: x.double() for name, x in states[0].items()}
    for state in states[1:]:
        average = {name: decay * average[name] + (1 - decay) * x.double() for name, x in state.items()}
    return average


def test_the_average_is_that_of_the_definition_after_every_step(tmp_path):
    ema = EMACallback(decay=0.7)
    trainer, states = trained(tmp_path, ema)
    assert len(states) == 7
    assert ema.averages.keys() == trainer.model.state_dict().keys()
    for step in (2, 4, 6):
        saved = ema_weights(tmp_path / f"checkpoint-{step}")
        expected = averaged(states[: step + 1], 0.7)
        for name, value in saved.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert (ema.averages[weight] - states[-1][weight]).abs().max() > 1e-3  # and not the last weights
    lag = sum(0.7**back for back in range(1, 7))  # steps by which the average is behind
    torch.testing.assert_close(ema.averages[BIAS], states[-1][BIAS] - 0.1 * lag)


def test_of_bf16_weights_the_average_is_fp32(tmp_path):
    ema = EMACallback(decay=0.9)
    _, states = trained(tmp_path / "run", ema, model=tiny_model("v3").bfloat16(), steps=3)
    expected = averaged(states, 0.9)
    for name, value in ema.averages.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)
    ema.save_model(tmp_path / "average")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "average").state_dict()
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert saved[weight].dtype == torch.bfloat16 and torch.equal(saved[weight], expected[weight].bfloat16())
    assert saved[BIAS].dtype == torch.float32


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_has_the_average_of_an_undisturbed_one(tmp_path, moved):
    whole, resumed = EMACallback(decay=0.7), EMACallback(decay=0.7)
    trained(tmp_path / "run", whole)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
        resumed.resume = checkpoint
    trained(tmp_path / "run", resumed, resume=str(checkpoint))
    for name, value in whole.averages.items():
        torch.testing.assert_close(resumed.averages[name], value, rtol=0, atol=1e-7)


def test_a_checkpoint_without_its_average_is_refused_and_the_ways_out_work(tmp_path):
    trained(tmp_path, EMACallback(decay=0.7), steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "ema.safetensors").unlink()
    message = r"checkpoint-2/ema.safetensors does not exist.*resume=checkpoint_folder.*resume=False"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, EMACallback(decay=0.7), resume=str(checkpoint), steps=4)
    with pytest.raises(ValueError, match="checkpoint-2/ema.safetensors does not exist: no EMACallback"):
        ema_weights(checkpoint)
    anew = EMACallback(decay=0.7, resume=False)
    _, states = trained(tmp_path, anew, resume=str(checkpoint), steps=4)
    expected = averaged(states, 0.7)  # from the resumed weights on
    assert len(states) == 3
    for name, value in anew.averages.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", ["shape", "missing", "unknown"])
def test_the_average_of_another_model_is_refused(tmp_path, damage):
    trained(tmp_path, EMACallback(), steps=2)
    file = tmp_path / "checkpoint-2" / "ema.safetensors"
    tensors = load_file(file)
    if damage == "unknown":
        tensors["other"] = torch.zeros(1)
    else:
        tensors.pop(BIAS) if damage == "missing" else tensors.update({BIAS: torch.zeros(3)})
    save_file(tensors, file)
    found = {
        "shape": r"bias has shape \(3,\) there and \(8,\)",
        "missing": "shape None there",
        "unknown": "and None here",
    }
    with pytest.raises(ValueError, match=f"another model.*{found[damage]}"):
        trained(tmp_path, EMACallback(), resume=str(file.parent), steps=4)


def test_a_second_run_in_the_same_process_starts_a_new_average(tmp_path):
    ema = EMACallback(decay=0.7)
    trainer, _ = trained(tmp_path, ema, steps=2)
    _, states = trained(tmp_path, ema, model=trainer.model, steps=2)
    expected = averaged(states, 0.7)
    for name, value in ema.averages.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remote", [False, True], ids=["ours", "remote code"])
def test_the_saved_average_is_a_model(tmp_path, remote):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    if remote:
        model.save_pretrained(tmp_path / "code")
        remote_class = get_class_from_dynamic_module("modeling_deepseek.DeepseekV3ForCausalLM", tmp_path / "code")
        model = remote_class.from_pretrained(tmp_path / "code")
    ema = EMACallback(decay=0.7)
    _, states = trained(tmp_path / "run", ema, model=model, steps=2)
    ema.save_model(tmp_path / "average")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert torch.equal(model.state_dict()[BIAS], states[-1][BIAS])  # the model that trains is left as it is
    assert loaded.state_dict().keys() == ema.averages.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ema.averages[name]), name

    late = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert not torch.equal(late(IDS[:2]).logits, loaded(IDS[:2]).logits)
    result = late.load_state_dict(ema_weights(tmp_path / "run" / "checkpoint-2"), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(late(IDS[:2]).logits, loaded(IDS[:2]).logits)


def test_a_tied_weight_is_averaged_once_and_saved_tied(tmp_path):
    ema = EMACallback(decay=0.7)
    trained(tmp_path / "run", ema, model=tiny_model("llm", tie_word_embeddings=True), steps=2)
    assert "lm_head.weight" not in ema.averages
    ema.save_model(tmp_path / "average")
    assert "lm_head.weight" not in load_file(tmp_path / "average" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert torch.equal(loaded.lm_head.weight, ema.averages["model.embed_tokens.weight"])


def test_of_an_adapted_model_the_adapter_is_averaged(tmp_path):
    base = tiny_model("v3")
    ema = EMACallback(decay=0.7)
    model = get_peft_model(base, LoraConfig(target_modules=["o_proj"]))
    _, states = trained(tmp_path / "run", ema, model=model, steps=4)
    parameters = {name for name in ema.averages if "e_score" not in name}
    assert len(parameters) == 6 and all("lora_" in name for name in parameters)
    resumed = EMACallback(decay=0.7)
    again = get_peft_model(tiny_model("v3"), LoraConfig(target_modules=["o_proj"]))
    trained(tmp_path / "run", resumed, model=again, resume=str(tmp_path / "run" / "checkpoint-2"), steps=4)
    expected = averaged(states, 0.7)
    for name in parameters:
        torch.testing.assert_close(ema.averages[name], expected[name].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(resumed.averages[name], ema.averages[name], rtol=0, atol=1e-7)
    ema.save_model(tmp_path / "average")
    loaded = PeftModel.from_pretrained(tiny_model("v3"), tmp_path / "average")
    for name in parameters:
        assert torch.equal(loaded.state_dict()[name], ema.averages[name])


WRAPPERS = {
    "accelerate": torch.nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_model_inside_its_wrappers(tmp_path, wrap):
    model, ema = tiny_model("v3"), EMACallback()
    wrapped = wrap(model)
    assert wrapped.state_dict().keys() != model.state_dict().keys()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state, control = Trainer(model=model, args=arguments).state, None
    names = list(wrapped.state_dict())
    ema.on_train_begin(arguments, state, control, model=wrapped)
    ema.on_step_end(arguments, state, control, model=wrapped)
    assert ema.averages.keys() == model.state_dict().keys()
    assert list(wrapped.state_dict()) == names  # the wrapper is left in place
    ema.save_model(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_only_the_main_process_keeps_an_average(tmp_path):
    model, ema = tiny_model("llm"), EMACallback()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = Trainer(model=model, args=arguments).state
    state.is_world_process_zero = False
    ema.on_train_begin(arguments, state, None, model=model)
    ema.on_step_end(arguments, state, None)
    ema.on_save(arguments, state, None)
    assert ema.averages is None and not list(tmp_path.rglob("ema.safetensors"))
    with pytest.raises(ValueError, match="no average to save.*is_world_process_zero"):
        ema.save_model(tmp_path)


def test_sharded_parameters_are_refused(tmp_path):
    model = tiny_model("llm")
    model.lm_head.weight.ds_id = 0  # the mark of ZeRO-3
    with pytest.raises(ValueError, match="DeepseekForCausalLM are sharded over ranks.*ZeRO-3"):
        trained(tmp_path, EMACallback(), model=model)


@pytest.mark.parametrize("decay", [1, 1.5, -0.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=f"from 0 to below 1.*got {decay}"):
        EMACallback(decay=decay)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_average_beside_the_steps_is_that_of_the_definition(tmp_path):
    ema = EMACallback(decay=0.7)
    _, states = trained(tmp_path, ema, steps=20, use_cpu=False)
    assert all(pinned.is_pinned() for pinned in ema.pinned.values()) and ema.pinned.keys() == ema.averages.keys()
    expected = averaged(states, 0.7)
    for name, value in ema.averages.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)
