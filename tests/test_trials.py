"""Kernels are tried before they are used: what fails or is wrong is left out and named, the fastest of the others comes first."""

import contextlib
import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from modeling_deepseek import hub_kernels, ops, trials
from modeling_deepseek.triton_mla import AVAILABLE
from test_hub_kernels import Paged

if not AVAILABLE:
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (DEVICE, torch.float32, 4, 20, 8)


@pytest.fixture(autouse=True)
def warned(monkeypatch) -> list[str]:
    """Trials begin anew; what is warned of."""
    messages = []
    monkeypatch.setattr(trials, "logger", SimpleNamespace(warning_once=messages.append))
    for name in ("tried_decodes", "tried_fp8_product"):
        monkeypatch.setattr(ops, name, functools.cache(getattr(ops, name).__wrapped__))
    monkeypatch.setattr(ops, "MLA_DECODE_TRIED", (2, 70))
    return messages


@pytest.fixture
def flashmla(monkeypatch) -> Paged:
    """A second kernel that is there."""
    module = Paged()
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    monkeypatch.setattr(ops, "present", lambda *asked: ["flashmla"])
    hub_kernels._flashmla_plan.cache_clear()
    yield module
    hub_kernels._flashmla_plan.cache_clear()


@pytest.mark.parametrize("slow", ["kernel", "flashmla"])
def test_the_fastest_comes_first(slow, flashmla, monkeypatch, warned):
    def seconds(call, device):
        call()
        return 2.0 if (call.func is ops.DECODES["flashmla"]) == (slow == "flashmla") else 1.0

    monkeypatch.setattr(ops, "seconds", seconds)
    names = ops.tried_decodes(*SHAPE)
    assert sorted(names) == ["flashmla", "kernel"]
    assert names[-1] == slow
    assert not warned
    calls = len(flashmla.seen)
    assert ops.tried_decodes(*SHAPE) == names
    assert len(flashmla.seen) == calls  # tried once


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda output: output * 1.05, "is wrong on this GPU (relative error 5.0e-02)"),
        (lambda output: output * torch.nan, "is wrong on this GPU (relative error nan)"),
        (
            lambda output: output[:1],
            "fails on this GPU and is not used: (1, 4, 1, 20) came out, expected (2, 4, 1, 20)",
        ),
        (lambda output: [][0], "fails on this GPU and is not used: list index out of range"),
        (lambda output: (_ for _ in ()).throw(MemoryError()), "fails on this GPU and is not used: MemoryError"),
    ],
)
@pytest.mark.parametrize("of", ["kernel", "flashmla"])
def test_what_is_wrong_is_left_out_and_named(of, fault, message, flashmla, monkeypatch, warned):
    if of == "kernel":
        decode = ops.mla_decode
        monkeypatch.setattr(ops, "mla_decode", lambda *args: fault(decode(*args)))
    else:
        right = flashmla.flash_mla_with_kvcache
        flashmla.flash_mla_with_kvcache = lambda *args, **kwargs: (fault(right(*args, **kwargs)[0]), None)
    assert ops.tried_decodes(*SHAPE) == tuple({"kernel", "flashmla"} - {of})
    (warning,) = warned
    assert warning.startswith(f"The kernel '{of}' for MLA_DECODE")
    assert message in warning


@pytest.mark.parametrize(
    ("names", "queries", "masked", "quantized", "expected"),
    [
        (("flashmla", "kernel"), 1, False, False, "flashmla"),
        (("kernel", "flashmla"), 1, False, False, "kernel"),
        (("flashmla", "kernel"), 2, False, False, "kernel"),
        (("flashmla", "kernel"), 1, True, False, "kernel"),
        (("flashmla", "kernel"), 1, False, True, "kernel"),
        (("flashmla",), 1, True, False, None),
        (("kernel",), ops.MLA_DECODE_MAX_QUERIES + 1, False, False, None),
        ((), 1, False, False, None),
    ],
)
def test_auto_takes_the_first_that_is_for_it(names, queries, masked, quantized, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "gpu_decodes", lambda *shape: asked.append(shape) or names)
    shapes = ((2, 4, queries, 12), (2, 4, queries, 8), (2, 30, 20), (2, 30, 8), (4, 12, 20), (4, 10, 20))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    tensors[2] = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=False)
    mask = torch.ones(2, 1, 1, 30, dtype=torch.bool) if masked else None
    assert ops.decode_kernel(tensors, mask, quantized) == expected
    assert asked in ([], [(torch.device("cuda", 0), torch.bfloat16, 4, 20, 8)])


@contextlib.contextmanager
def a_gpu(monkeypatch, capability=(9, 0), capturing=False):
    """As far as questions go."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        yield


def test_nothing_is_tried_on_an_old_gpu_or_inside_of_a_cuda_graph(monkeypatch):
    for name in ("tried_decodes", "tried_fp8_product"):
        monkeypatch.setattr(ops, name, None)
    shape = (torch.device("cpu"), torch.bfloat16, 16, 512, 64)  # it only has to be somewhere
    with a_gpu(monkeypatch, (7, 5)):
        assert ops.gpu_decodes(*shape) == ()
        assert not ops.gpu_multiplies_fp8(shape[0])
    with a_gpu(monkeypatch, capturing=True):
        assert ops.gpu_decodes(*shape) == ("kernel",)
        assert ops.gpu_multiplies_fp8(shape[0])
    with a_gpu(monkeypatch), FakeTensorMode():
        assert ops.gpu_decodes(*shape) == ("kernel",)
        assert ops.gpu_multiplies_fp8(shape[0])
    tried = []
    for name in ("tried_decodes", "tried_fp8_product"):
        monkeypatch.setattr(ops, name, lambda *asked: tried.append(asked) or asked)
    with a_gpu(monkeypatch):
        assert ops.gpu_decodes(*shape) == shape
        assert ops.gpu_multiplies_fp8(shape[0]) == shape[:1]
    with a_gpu(monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
        assert ops.gpu_decodes(*shape) == ()
        assert not ops.gpu_multiplies_fp8(shape[0])


def test_kernels_that_are_installed_are_present(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_kernels.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_kernels, "find_spec", lambda name: None)
    shape = (torch.device("cuda", 0), 512, 64)
    with a_gpu(monkeypatch):
        assert hub_kernels.present(*shape) == []
        monkeypatch.setattr(hub_kernels, "find_spec", lambda name: name)
        assert hub_kernels.present(*shape) == ["flashmla"]
        (tmp_path / "models--kernels-community--flash-attn3").mkdir()  # as the `kernels` package leaves it
        assert hub_kernels.present(*shape) == ["flashmla", "fa3"]
        assert hub_kernels.present(shape[0], 20, 8) == []
    with a_gpu(monkeypatch, (8, 0)):
        assert hub_kernels.present(*shape) == []


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.1, False)])
def test_the_fp8_product_is_tried(factor, right, monkeypatch, warned):
    """What stands in for the kernel rounds as a GPU does; the interpreter's cast to FP8 does not carry into the exponent."""
    calls = []

    def product(x, weight, scale, rows, ue8m0):
        calls.append(len(x))
        return factor * ops.block_scaled_product_reference(x, weight, scale, (rows, 128), ue8m0)

    monkeypatch.setattr(ops, "triton_block_scaled_product", product)
    assert [ops.tried_fp8_product(DEVICE) for _ in range(2)] == [right, right]
    assert calls == ([1, 200] if right else [1])
    assert [warning.partition(" (")[0] for warning in warned] == ["The block-FP8 product is wrong on this GPU"] * (
        not right
    )


def test_seconds_are_those_of_the_fastest_call(monkeypatch):
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 25.0, 30.0, 32.0, 40.0, 44.0])
    monkeypatch.setattr(trials.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert trials.seconds(lambda: calls.append(1), torch.device("cpu")) == 1.0
    assert len(calls) == trials.CALLS
