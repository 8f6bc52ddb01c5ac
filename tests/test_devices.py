"""Models spread over devices, and what a GPU takes another way than a CPU: as far as a CPU can show it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from modeling_deepseek import fp8, moe, ops
from modeling_deepseek.attention import plain_weight
from modeling_deepseek.fp8 import dequantize, dequantize_at_once, fp8_linear, quantize
from modeling_deepseek.load_balance import ExpertLoad
from tiny import tiny_model, tiny_tokens

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def spread_over(model, *devices):
    """As `device_map` does: the first layer with the embedding on one device, the rest on the last one."""
    parts = dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), devices[-1])
    parts |= {f"model.layers.{i}": devices[min(i, len(devices) - 1)] for i in range(len(model.model.layers))}
    return dispatch_model(model, {"model.embed_tokens": devices[0], **parts}, main_device=devices[0], force_hooks=True)


def test_a_weight_that_is_only_placed_is_read_as_it_is():
    """accelerate wraps every part of a model on several GPUs; absorbing must not ask it for its weight row by row."""
    model, ids = tiny_model("v3"), tiny_tokens(tiny_model("v3").config, length=9)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    attention = model.model.layers[1].self_attn
    costs = [attention.use_absorbed(1, keys, True) for keys in (1, 20, 21, 60)]
    spread_over(model, "cpu", "cpu")
    assert "forward" in vars(attention.kv_b_proj)
    assert plain_weight(attention.kv_b_proj) is attention.kv_b_proj.weight
    assert [attention.use_absorbed(1, keys, True) for keys in (1, 20, 21, 60)] == costs
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_a_weight_that_is_more_than_placed_is_not():
    offloaded, doubled, patched = (torch.nn.Linear(3, 2, bias=False) for _ in range(3))
    cpu_offload(offloaded, execution_device="cpu")
    doubled.forward = lambda x: 2 * torch.nn.functional.linear(x, doubled.weight)
    add_hook_to_module(doubled, AlignDevicesHook("cpu"))
    add_hook_to_module(patched, AlignDevicesHook("cpu"))
    patched.forward = lambda x: x
    assert plain_weight(offloaded) is None
    assert plain_weight(doubled) is None
    assert plain_weight(patched) is None
    for hook in (AlignDevicesHook("cpu", io_same_device=True), AlignDevicesHook("cpu")):
        linear = torch.nn.Linear(3, 2, bias=False)
        add_hook_to_module(linear, hook)
        hook.no_grad = not hook.io_same_device
        assert plain_weight(linear) is None
    linear = torch.nn.Linear(3, 2, bias=False)
    add_hook_to_module(linear, AlignDevicesHook("cpu"))
    assert plain_weight(linear) is linear.weight
    assert plain_weight(copy.copy(linear)) is None  # its forward is that of the other one
    linear._hf_hook.post_forward = lambda module, output: 2 * output
    assert plain_weight(linear) is None


@TWO_GPUS
@pytest.mark.parametrize("depths", [1, 2])
def test_two_gpus_generate_what_one_does(depths):
    model, ids = tiny_model("v3", num_nextn_predict_layers=depths), tiny_tokens(tiny_model("v3").config, length=9)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    spread_over(model, "cuda:0", "cuda:1")
    for options in ({}, {"use_mtp": True}):
        assert torch.equal(model.generate(ids.to(0), max_new_tokens=8, do_sample=False, **options).cpu(), expected)


@TWO_GPUS
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("given", [dict(aux_loss_alpha=0.1), dict(moe_capacity_factor=1.0)], ids=str)
def test_two_gpus_train_as_one_does(given, padded):
    losses = []
    for devices in (["cuda:0", "cuda:0"], ["cuda:0", "cuda:1"]):
        model = spread_over(tiny_model("v2", **given).train(), *devices)
        ids, mask = tiny_tokens(model.config, length=9).to(0), torch.ones(2, 9, dtype=torch.long, device=0)
        mask[0, 5:] = 0
        torch.manual_seed(0)
        with ExpertLoad(model) as load:
            loss = model(ids, labels=ids, attention_mask=mask if padded else None).loss
        loss.backward()
        losses.append(loss.item())
        assert all(counts.sum() > 0 for counts in load.counts.values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(576, 256), (128, 128), (64, 384), (300, 200), (129, 128), (1, 128)], ids=str)
def test_at_once_is_what_the_pieces_of_a_cpu_are(shape, kind, dtype):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(kind)
    weight = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(kind)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 1e-2
    found = torch.full(shape, torch.nan, dtype=dtype)
    assert dequantize_at_once(weight, scale, (128, 128), found) is found
    assert torch.equal(found, dequantize(weight, scale, dtype=dtype))
    wider = torch.full((shape[0], shape[1] + 1), torch.nan, dtype=dtype)
    dequantize_at_once(weight, scale, (128, 128), wider[:, 1:])
    assert torch.equal(wider[:, 1:], found)


def test_gradients_of_kept_weights_are_summed_in_fp32(monkeypatch):
    """As a GPU multiplies, in bf16, piece by piece: many pieces cost no more than one."""
    monkeypatch.setattr(fp8, "_compute_dtype", lambda x: x.dtype)
    weight, scale = quantize(torch.randn(64 * 128, 128))
    x, gradient = torch.randn(8, 128, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, 64 * 128).bfloat16()
    exact = gradient.double() @ dequantize(weight, scale).double()
    errors = []
    for piece in (2**14, 2**30):
        monkeypatch.setattr(fp8, "PIECE", piece)
        (found,) = torch.autograd.grad(fp8_linear(x, weight, scale, (128, 128)), x, gradient)
        errors.append(((found.double() - exact).norm() / exact.norm()).item())
    assert errors[0] < 1.5 * errors[1]


def test_experts_of_fp32_weights_under_autocast_take_products_that_it_knows(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    experts = SimpleNamespace(gate_up_proj=torch.empty(2, 4, 3))
    states = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(5, 3))
    taken = moe.auto_experts_forward(lambda *given: "sorted", experts, states, torch.zeros(5, 2), torch.zeros(5, 2))
    assert taken == "sorted"
    monkeypatch.setattr(moe, "grouped_mm_experts_forward", lambda *given: "grouped")
    experts.gate_up_proj = experts.gate_up_proj.bfloat16()
    taken = moe.auto_experts_forward(lambda *given: "sorted", experts, states, torch.zeros(5, 2), torch.zeros(5, 2))
    assert taken == "grouped"


@torch.no_grad()
def test_scores_that_are_too_many_for_a_gpu_come_in_blocks(monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "absorbed_attention_in_blocks", lambda *given: taken.append(given))
    shapes = ((1, 128, 128, 128), (1, 128, 128, 64), (1, 2**17, 512), (1, 2**17, 64), (128, 128, 512), (128, 128, 512))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    ops.attend_latents(*tensors, 0.1, weights=False)
    assert len(taken) == 1
    ops.attend_latents(*(x[:, :, :4] if i < 2 else x for i, x in enumerate(tensors)), 0.1, weights=False)
    assert len(taken) == 1
