"""What training keeps in memory: selective recomputation, and gradients of experts without tokens."""

import copy
import socket
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_deepseek.load_balance import ExpertLoad
from test_training import trained
from tiny import tiny_model, tiny_tokens

BALANCED = dict(aux_loss_alpha=0.1, device_aux_loss_alpha=0.1, comm_aux_loss_alpha=0.1)


class LiveMemory(TorchDispatchMode):
    """Bytes of what was made under it and is not freed yet."""

    def __init__(self):
        super().__init__()
        self.sizes, self.made = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes or self.sizes[storage._cdata][0].expired():
                    self.sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.made.append((func, storage.nbytes()))
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.sizes.values() if not storage.expired())


def step(model, mode=None, tokens=24, **inputs) -> tuple[torch.Tensor, list[torch.Tensor | None], int]:
    """Loss and gradients of `model` in training, and bytes that its forward leaves for the backward pass."""
    model.train()
    if mode is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"mode": mode})
    ids = tiny_tokens(model.config, 2, tokens)
    torch.manual_seed(3)
    with LiveMemory() as memory:
        loss = model(input_ids=ids, labels=ids, **dict(use_cache=False) | inputs).loss
        kept = memory.bytes()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], kept


def assert_same(result, expected, **tolerance):
    for ours, theirs in zip((result[0], *result[1]), (expected[0], *expected[1]), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, **tolerance or dict(rtol=0, atol=0))


def adapted(model, **options):
    targets = ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "shared_experts.gate_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options))
    return model


def kept_in_fp8(model):
    model.quantize_fp8()
    return adapted(model)


MODELS = {
    "llm": lambda: tiny_model("llm"),
    "moe16b": lambda: tiny_model("moe16b"),
    "v2 without q_lora": lambda: tiny_model("v2", q_lora_rank=None),
    "v2 dropping tokens": lambda: tiny_model("v2", moe_capacity_factor=1.0),
    "v3": lambda: tiny_model("v3"),
    "v3 eager": lambda: tiny_model("v3", attn_implementation="eager"),
    "v3 absorbed": lambda: tiny_model("v3", mla_mode="absorbed"),
    "v3 MTP and balance": lambda: tiny_model("v3", num_nextn_predict_layers=2, **BALANCED),
    "v3 attention dropout": lambda: tiny_model("v3", attention_dropout=0.3),
    "v3 adapters": lambda: adapted(tiny_model("v3")),
    "v3 adapters with dropout": lambda: adapted(tiny_model("v3"), lora_dropout=0.3),
    "v3 kept in FP8": lambda: kept_in_fp8(tiny_model("v3")),
    "v3 bfloat16": lambda: tiny_model("v3").to(torch.bfloat16),
}


@pytest.fixture
def padded(monkeypatch):
    """Attention runs in PyTorch's kernel in every mode, as it does with selective recomputation."""
    monkeypatch.setattr("modeling_deepseek.attention.PADDED_MIN_QUERIES", 1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_selective_recomputation_changes_no_bit(model, padded):
    expected, result = step(model()), step(model(), "selective")
    assert_same(result, expected)
    assert result[2] < expected[2]


def test_selective_recomputation_under_autocast_changes_no_bit(padded):
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = step(tiny_model("v3")), step(tiny_model("v3"), "selective")
    assert_same(result, expected)
    assert result[2] < expected[2]


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_padded_values_are_the_same_attention(family, monkeypatch):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    expected = step(tiny_model(family), attention_mask=mask)
    monkeypatch.setattr("modeling_deepseek.attention.PADDED_MIN_QUERIES", 1)
    assert_same(step(tiny_model(family), attention_mask=mask), expected, rtol=1e-3, atol=1e-5)


def test_two_backward_passes_find_what_was_recomputed():
    model = tiny_model("v3").train()
    model.gradient_checkpointing_enable({"mode": "selective"})
    ids = tiny_tokens(model.config)
    loss = model(ids, labels=ids, use_cache=False).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_norms_and_up_projections_run_again_and_nothing_else():
    model, calls = tiny_model("v3", num_nextn_predict_layers=1), Counter()
    for name, module in model.model.layers.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    load = ExpertLoad(model)
    step(model, "selective")
    assert {name.rpartition(".")[2] for name, count in calls.items() if count != 1} == {
        *("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "enorm", "hnorm"),
        *("q_b_proj", "kv_b_proj"),
    }
    assert max(calls.values()) == 2
    assert all(counts.sum() == 2 * (24 if layer < 2 else 23) * 3 for layer, counts in enumerate(load.counts.values()))


def test_memory_of_the_modes_goes_down_from_none_to_selective_to_full(padded):
    sizes = dict(
        hidden_size=64, n_routed_experts=4, num_experts_per_tok=1, num_hidden_layers=4, n_group=1, topk_group=1
    )
    none, selective, full = (step(tiny_model("v3", **sizes), mode)[2] for mode in (None, "selective", "full"))
    assert none * 0.8 > selective > full


def test_trainer_passes_the_mode_on(tmp_path):
    found = []
    for name, options in (("none", {}), ("selective", dict(gradient_checkpointing_kwargs={"mode": "selective"}))):
        model = tiny_model("v3", aux_loss_alpha=0.1)
        _, seen = trained(
            tmp_path / name, model=model, gradient_checkpointing=bool(options), logging_steps=1, **options
        )
        found.append([log["loss"] for log in seen.logs if "loss" in log])
        assert [layer.recompute is not None for layer in model.model.layers] == [bool(options)] * 3
        assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_mode_is_that_of_the_last_call():
    model = tiny_model("v3")
    chosen = lambda: [(layer.recompute is not None, layer.gradient_checkpointing) for layer in model.model.layers]  # noqa: E731
    model.gradient_checkpointing_enable({"mode": "selective"}, every_n_layers=2)
    assert chosen() == [(True, False), (False, False), (True, False)]
    assert model.is_gradient_checkpointing
    model.add_mtp_layers(1)
    assert chosen()[3] == (True, False)
    model.gradient_checkpointing_enable({"mode": "full"})
    assert chosen() == [(False, True)] * 4
    model.gradient_checkpointing_enable({"mode": "selective"})
    copy.deepcopy(model)
    model.gradient_checkpointing_disable()
    assert chosen() == [(False, False)] * 4
    assert all(layer.self_attn.recompute is None for layer in model.model.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "norms"}, "mode of gradient checkpointing is 'norms': expected 'full' or 'selective'"),
        ({"mode": "selective", "use_reentrant": True}, "never reentrant"),
    ],
)
def test_modes_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("v3").gradient_checkpointing_enable(options)


# --- experts without tokens -----------------------------------------------------------------------------------------------

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
LORA_EXPERTS = dict(target_modules=["experts.gate_proj", "experts.up_proj", "experts.down_proj"])


def without_gradient(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


@IMPLEMENTATIONS
@pytest.mark.parametrize("case", ["idle", "dropped", "adapters"])
def test_every_parameter_has_a_gradient_when_most_experts_are_idle(case, implementation):
    model = tiny_model("v3", num_nextn_predict_layers=2, moe_capacity_factor=0.01 if case == "dropped" else None)
    model.set_experts_implementation(implementation)
    if case == "adapters":
        model = get_peft_model(model, LoraConfig(r=2, **LORA_EXPERTS))
    model.train()
    load = ExpertLoad(model)
    ids = tiny_tokens(model.config, 1, 2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all((counts == 0).sum() >= 2 for counts in load.counts.values())
    assert without_gradient(model) == []


@IMPLEMENTATIONS
@pytest.mark.parametrize("tokens", [0, 4])
def test_weights_have_gradients_when_no_expert_of_a_layer_has_a_token(tokens, implementation):
    experts = tiny_model("v3").train().model.layers[1].mlp.experts
    experts.config._experts_implementation = implementation
    served_elsewhere = 8 if implementation == "eager" else 0  # which the others know under expert parallelism only
    chosen = torch.full((tokens, 3), served_elsewhere)
    experts(torch.randn(tokens, 48), chosen, torch.zeros(tokens, 3)).sum().backward()
    assert not experts.gate_up_proj.grad.any()
    assert not experts.down_proj.grad.any()


def test_adapters_have_gradients_when_no_expert_kept_in_fp8_has_a_token():
    model = tiny_model("v3")
    model.quantize_fp8()
    model = get_peft_model(model, LoraConfig(r=2, **LORA_EXPERTS))
    experts = model.base_model.model.model.layers[1].mlp.experts
    experts(torch.randn(4, 48), torch.full((4, 3), 8), torch.zeros(4, 3)).sum().backward()
    assert without_gradient(experts) == []


def rank(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    found = {}
    for implementation in ("eager", "grouped_mm"):
        model = tiny_model("v3", num_nextn_predict_layers=1, aux_loss_alpha=0.1).train()
        model.set_experts_implementation(implementation)
        load, parallel, idle = ExpertLoad(model), DistributedDataParallel(model), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for index in range(2):
            load.reset()
            ids = tiny_tokens(model.config, 1, 3, seed=10 * number + index)
            parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            idle.append(torch.stack(list(load.counts.values())) == 0)
        found[implementation] = (torch.stack(idle), [parameter.detach() for parameter in model.parameters()])
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_ranks_whose_idle_experts_differ_do_not_wait_for_each_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    for implementation in first:
        (idle, weights), (other_idle, other_weights) = first[implementation], second[implementation]
        assert (idle & ~other_idle).flatten(1).any(1).all() and (other_idle & ~idle).flatten(1).any(1).all()
        assert all(map(torch.equal, weights, other_weights))
