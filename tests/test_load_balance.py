"""Loss-free balancing: the load that is counted, and the bias that moves against it, inside real runs of `Trainer`."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerState

from modeling_deepseek.load_balance import (
    ExpertLoad,
    ExpertLoadCallback,
    RouterBiasCallback,
    expert_load,
    load_entropy,
    max_violation,
    plot_expert_load,
    routers_of,
)
from test_training import IDS, ROWS, trained
from tiny import tiny_model

LAYERS = ("model.layers.1.mlp.gate", "model.layers.2.mlp.gate")


def bias_of(model) -> torch.Tensor:
    return torch.stack([router.e_score_correction_bias for router in routers_of(model).values()])


def chosen_counts(model, rows, mask=None) -> torch.Tensor:
    """Load `[layers, E]` of `rows` by what the routers return."""
    found = []
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, out: found.append(out[2]))
        for router in routers_of(model).values()
    ]
    with torch.no_grad():
        model(rows, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    seen = slice(None) if mask is None else mask.flatten().bool()
    return torch.stack([torch.bincount(chosen[seen].flatten(), minlength=8).float() for chosen in found])


@pytest.mark.parametrize("proportional", [False, True])
def test_one_step_moves_the_bias_against_the_load(tmp_path, proportional):
    model = tiny_model("v3")
    before, counts = bias_of(model).clone(), chosen_counts(model, IDS)
    error = counts.mean(1, keepdim=True) - counts
    expected = before + 0.01 * (error / counts.mean(1, keepdim=True) if proportional else error.sign())
    callback = RouterBiasCallback(0.01, proportional)
    _, seen = trained(
        tmp_path, callback, model=model, steps=1, per_device_train_batch_size=24, logging_steps=1, max_grad_norm=0
    )
    torch.testing.assert_close(bias_of(model), expected)
    load = expert_load(model)
    assert tuple(load) == LAYERS
    torch.testing.assert_close(torch.stack(list(load.values())), counts)
    log = seen.logs[0]
    assert log["maxvio"] == log["maxvio_batch"] == pytest.approx(sum(map(max_violation, counts)) / 2)
    assert log["load_entropy"] == pytest.approx(sum(map(load_entropy, counts)) / 2)
    assert log["router_bias_range"] == pytest.approx((expected.amax(1) - expected.amin(1)).max().item())
    assert not any(parameter is bias for parameter in model.parameters() for bias in bias_of(model))


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=4, per_device_train_batch_size=6),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(eval_strategy="steps", eval_steps=1),
    ],
    ids=["accumulation", "checkpointing", "reentrant checkpointing", "evaluation"],
)
def test_the_bias_moves_once_per_step_whatever_runs_beside(tmp_path, options):
    found = []
    for name, given in (("plain", {}), ("beside", options)):
        model = tiny_model("v3")
        settings = dict(per_device_train_batch_size=24, learning_rate=0.0, steps=2) | given
        trained(tmp_path / name, RouterBiasCallback(0.01), model=model, eval_dataset=ROWS[:4], **settings)
        found.append((bias_of(model), torch.stack(list(expert_load(model).values()))))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_is_no_load():
    model, mask = tiny_model("v3").train(), torch.ones(24, 16, dtype=torch.long)
    mask[:, :5] = 0
    load = ExpertLoad(model)
    model(IDS, attention_mask=mask, use_cache=False)
    counted = torch.stack(list(load.counts.values()))
    model.eval()(IDS)
    load.detach()
    model.train()(IDS, use_cache=False)
    torch.testing.assert_close(torch.stack(list(load.counts.values())), counted)
    assert (counted.sum(1) == 24 * 11 * 3).all()
    torch.testing.assert_close(counted, chosen_counts(model, IDS, mask))


def test_mtp_layers_are_balanced_too(tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    before = bias_of(model).clone()
    trained(tmp_path, RouterBiasCallback(0.01), model=model, steps=1)
    assert len(before) == 3
    assert ((bias_of(model) - before).abs().amax(1) > 0).all()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_goes_on_with_its_bias(tmp_path, adapted):
    def model():
        base = tiny_model("v3")
        return get_peft_model(base, LoraConfig(target_modules=["o_proj"])) if adapted else base

    whole, resumed = model(), model()
    torch.manual_seed(0)
    trained(tmp_path, RouterBiasCallback(0.01), model=whole, steps=4)
    trained(tmp_path, RouterBiasCallback(0.01), model=resumed, steps=4, resume=True)
    torch.testing.assert_close(bias_of(resumed), bias_of(whole), rtol=0, atol=1e-6)


def test_routers_inside_the_adapter_are_moved_once_and_saved_with_it(tmp_path):
    def model(**options):
        return get_peft_model(tiny_model("v3"), LoraConfig(target_modules=["o_proj"], **options))

    inside, before = model(modules_to_save=["gate"]), bias_of(tiny_model("v3"))
    trained(tmp_path, RouterBiasCallback(0.01), model=inside, steps=1, logging_steps=1)
    moved = (bias_of(inside) - before).abs()
    assert torch.allclose(moved[moved > 0], torch.tensor(0.01), atol=1e-6) and moved.amax() > 0
    assert len(expert_load(inside)) == 2 and all(load.sum() for load in expert_load(inside).values())
    inside.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("v3"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, inside.eval()(IDS).logits)
    assert torch.equal(bias_of(loaded), bias_of(inside))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_deepseek.load_balance.logger.warning_once", said.append)
        trained(tmp_path / "a", RouterBiasCallback(0.01), model=inside, steps=1)
        assert not said
        trained(tmp_path / "b", RouterBiasCallback(0.01), model=model(), steps=1)
    assert "modules_to_save=['gate']" in said[0]


def test_each_run_counts_anew_and_masks_without_a_name_are_seen(tmp_path):
    model, found = tiny_model("v3"), []
    for name in "ab":
        trained(tmp_path / name, ExpertLoadCallback(), ExpertLoadCallback(), model=model, steps=1)
        found.append(sum(load.sum() for load in expert_load(model).values()))
    assert found[0] == found[1]
    mask = torch.ones(24, 16, dtype=torch.long)
    mask[:, 12:] = 0
    load = ExpertLoad(model.train())
    model(IDS, mask, use_cache=False)
    assert all(counts.sum() == 24 * 12 * 3 for counts in load.counts.values())


def test_an_adapter_without_the_bias_it_was_trained_beside_is_refused(tmp_path):
    def model():
        return get_peft_model(tiny_model("v3"), LoraConfig(target_modules=["o_proj"]))

    trained(tmp_path, model=model(), steps=2)
    with pytest.raises(ValueError, match="no router bias in its trainer_state.json"):
        trained(tmp_path, RouterBiasCallback(), model=model(), steps=4, resume=True)


def test_a_model_without_bias_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no router of DeepseekV2ForCausalLM has a bias.*aux_loss_alpha"):
        trained(tmp_path, RouterBiasCallback(), model=tiny_model("v2"))


def test_load_and_drops_of_a_model_without_bias_are_counted(tmp_path):
    model = tiny_model("v2", moe_capacity_factor=0.5, aux_loss_alpha=0.1)
    counts, gone = chosen_counts(model, IDS), []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda _module, _inputs, out: gone.append((out[1] == 0).float().mean().item()))
    options = dict(model=model, steps=1, per_device_train_batch_size=24, logging_steps=1)
    _, seen = trained(tmp_path, ExpertLoadCallback(), **options)
    torch.testing.assert_close(expert_load(model)[LAYERS[0]], counts[0])  # the next layer sees what is left
    assert seen.logs[0]["dropped_share"] == pytest.approx(sum(gone) / len(gone))
    assert 0.2 < seen.logs[0]["dropped_share"] < 0.6
    assert seen.logs[0]["maxvio"] > 0 and "router_bias_range" not in seen.logs[0]


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DeepseekForCausalLM has no routed experts"):
        trained(tmp_path, ExpertLoadCallback(), model=tiny_model("llm"))


def test_a_negative_speed_is_refused():
    with pytest.raises(ValueError, match="not negative, got -1"):
        RouterBiasCallback(-1)


def test_a_load_that_nobody_counted_is_refused():
    with pytest.raises(ValueError, match="No load was counted"):
        expert_load(tiny_model("v3"))


def test_measures_at_balance_and_at_the_worst():
    assert max_violation(torch.full((8,), 3.0)) == 0
    assert max_violation(torch.tensor([8.0, 8.0, 0, 0, 0, 0, 0, 0])) == 8 / 2 - 1
    assert load_entropy(torch.full((8,), 3.0)) == pytest.approx(1)
    assert load_entropy(torch.tensor([8.0, 0, 0, 0])) == 0


def test_the_picture_has_a_row_per_layer(tmp_path):
    pytest.importorskip("matplotlib")
    plot_expert_load({name: torch.rand(8) for name in LAYERS}, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def rank(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    model, callback = tiny_model("v3").train(), RouterBiasCallback(0.01)
    state = TrainerState()
    callback.on_train_begin(None, state, None, model=model)
    for _ in range(2):
        model(IDS[number::2], use_cache=False)
        callback.on_step_end(None, state, None)
    torch.save(bias_of(model), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_ranks_move_the_bias_by_the_load_of_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    model, callback = tiny_model("v3").train(), RouterBiasCallback(0.01)
    state = TrainerState()
    callback.on_train_begin(None, state, None, model=model)
    for _ in range(2):
        model(IDS, use_cache=False)
        callback.on_step_end(None, state, None)
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), bias_of(model))
