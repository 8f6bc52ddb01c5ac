"""Kernels are tried before they are used: what fails or is wrong is left out and named, and ours is preferred among equals."""

import contextlib
import sys
import threading
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
KINDS = pytest.mark.parametrize(
    "kind",
    [(several, masked, quantized) for several in (0, 1) for masked in (0, 1) for quantized in (0, 1)],
    ids=lambda kind: (
        " ".join(name for name, on in zip(("several", "masked", "8 bits"), kind, strict=True) if on) or "one"
    ),
)


@pytest.fixture(autouse=True)
def warned(monkeypatch) -> list[str]:
    """Trials begin anew; what is warned of."""
    messages = []
    monkeypatch.setattr(trials, "logger", SimpleNamespace(warning_once=messages.append))
    monkeypatch.setattr(trials, "_answers", {})
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


@pytest.mark.parametrize(("factor", "first"), [(0.5, "flashmla"), (0.95, "kernel"), (1.0, "kernel"), (2.0, "kernel")])
def test_another_kernel_is_taken_where_it_is_clearly_faster(factor, first, flashmla, monkeypatch, warned):
    def seconds(call, device):
        call()
        return factor if call.func is ops.DECODES["flashmla"] else 1.0

    monkeypatch.setattr(ops, "seconds", seconds)
    names = ops.try_decodes(*SHAPE)
    assert names[0] == first
    assert sorted(names) == ["flashmla", "kernel"]
    assert not warned
    torch.use_deterministic_algorithms(True)
    try:
        assert ops.try_decodes(*SHAPE) == ("kernel", "flashmla")
    finally:
        torch.use_deterministic_algorithms(False)


@KINDS
def test_our_kernel_is_right_in_every_kind_of_decoding(kind, flashmla, warned):
    names = ops.try_decodes(*SHAPE, *kind)
    assert set(names) == ({"kernel"} if any(kind) else {"kernel", "flashmla"})
    assert not warned


@pytest.mark.parametrize("kind", [(False, False, False), (True, True, True)], ids=["one", "several masked 8 bits"])
def test_rounding_to_bf16_is_no_fault(kind, monkeypatch, warned):
    """In the geometry of V2-Lite and V3, with room to spare: a false alarm would cost every GPU its kernel."""
    monkeypatch.setattr(ops, "present", lambda *asked: [])
    monkeypatch.setattr(trials, "TOLERANCE", trials.TOLERANCE / 2)
    monkeypatch.setattr(ops, "MLA_DECODE_TRIED", (2, 300))
    assert ops.try_decodes(DEVICE, torch.bfloat16, 16, 512, 64, *kind) == ("kernel",)
    assert not warned


@KINDS
def test_a_kind_that_is_wrong_is_found(kind, monkeypatch, warned):
    decode = ops.mla_decode

    def wrong(query, *args, scales=None):
        mask = args[4] if len(args) > 4 else None
        asked = (query.shape[2] > 1, mask is not None, scales is not None)
        return decode(query, *args, scales=scales) * (3.0 if asked == tuple(map(bool, kind)) else 1.0)

    monkeypatch.setattr(ops, "mla_decode", wrong)
    monkeypatch.setattr(ops, "present", lambda *asked: [])
    assert ops.try_decodes(*SHAPE, *kind) == ()
    assert len(warned) == 1


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
        (lambda output: (_ for _ in ()).throw(KeyError()), "fails on this GPU and is not used: KeyError"),
    ],
)
@pytest.mark.parametrize("of", ["kernel", "flashmla"])
def test_what_is_wrong_is_left_out_and_named(of, fault, message, flashmla, monkeypatch, warned):
    if of == "kernel":
        decode = ops.mla_decode
        monkeypatch.setattr(ops, "mla_decode", lambda *args, **kwargs: fault(decode(*args, **kwargs)))
    else:
        right = flashmla.flash_mla_with_kvcache
        flashmla.flash_mla_with_kvcache = lambda *args, **kwargs: (fault(right(*args, **kwargs)[0]), None)
    assert ops.try_decodes(*SHAPE) == tuple({"kernel", "flashmla"} - {of})
    (warning,) = warned
    assert warning.startswith(f"The kernel '{of}' for MLA_DECODE")
    assert message in warning


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_none_of_the_kernels_faults(problem, monkeypatch, warned):
    def interrupted(*args, **kwargs):
        raise problem

    monkeypatch.setattr(ops, "mla_decode", interrupted)
    with pytest.raises(problem):
        ops.try_decodes(*SHAPE)
    assert not warned


@pytest.mark.parametrize(
    ("names", "queries", "masked", "quantized", "expected"),
    [
        (("flashmla", "kernel"), 1, False, False, "flashmla"),
        (("kernel",), 2, False, False, "kernel"),
        (("kernel",), 1, True, True, "kernel"),
        (("kernel",), ops.MLA_DECODE_MAX_QUERIES + 1, False, False, None),
        ((), 1, False, False, None),
    ],
)
def test_auto_takes_the_first_of_its_kind(names, queries, masked, quantized, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "gpu_decodes", lambda *shape: asked.append(shape) or names)
    shapes = ((2, 4, queries, 12), (2, 4, queries, 8), (2, 30, 20), (2, 30, 8), (4, 12, 20), (4, 10, 20))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    device = torch.device("cuda", 0)
    tensors[2] = SimpleNamespace(device=device, dtype=torch.bfloat16, requires_grad=False)
    mask = torch.ones(2, 1, 1, 30, dtype=torch.bool) if masked else None
    assert ops.decode_kernel(tensors, mask, quantized) == expected
    if queries <= ops.MLA_DECODE_MAX_QUERIES:
        assert asked == [(device, torch.bfloat16, 4, 20, 8, queries > 1, masked, quantized)]


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


def answers(monkeypatch, *found):
    """Trials that find these, one after the other; what was tried."""
    asked, found = [], iter(found)

    def trial(*about):
        asked.append(about)
        answer = next(found)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ops, "try_decodes", trial)
    monkeypatch.setattr(ops, "try_fp8_product", trial)
    return asked


ABOUT = (torch.device("cpu"), torch.bfloat16, 16, 512, 64)  # it only has to be somewhere


def test_a_gpu_is_tried_once_for_each_kind(monkeypatch):
    asked = answers(monkeypatch, ("flashmla",), ("kernel",))
    with a_gpu(monkeypatch):
        for _ in range(3):
            assert ops.gpu_decodes(*ABOUT, False, False, False) == ("flashmla",)
            assert ops.gpu_decodes(*ABOUT, False, True, False) == ("kernel",)
    assert asked == [(*ABOUT, False, False, False), (*ABOUT, False, True, False)]


def test_nothing_is_tried_on_an_old_gpu_or_on_rocm(monkeypatch):
    asked = answers(monkeypatch)
    with a_gpu(monkeypatch, (7, 5)):
        assert ops.gpu_decodes(*ABOUT) == ()
        assert not ops.gpu_multiplies_fp8(ABOUT[0])
    with a_gpu(monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert ops.gpu_decodes(*ABOUT) == ()
        assert not ops.gpu_multiplies_fp8(ABOUT[0])
    assert not asked


@pytest.mark.parametrize("where", ["in a CUDA graph", "without numbers"])
def test_where_nothing_can_be_tried_what_is_known_counts(where, monkeypatch):
    asked = answers(monkeypatch, (), False)

    def there():
        mode = FakeTensorMode() if where == "without numbers" else contextlib.nullcontext()
        with a_gpu(monkeypatch, capturing=where == "in a CUDA graph"), mode:
            return ops.gpu_decodes(*ABOUT), ops.gpu_multiplies_fp8(ABOUT[0])

    assert there() == (("kernel",), True)
    assert not asked
    with a_gpu(monkeypatch):
        assert (ops.gpu_decodes(*ABOUT), ops.gpu_multiplies_fp8(ABOUT[0])) == ((), False)
    assert there() == ((), False)


def test_memory_that_ran_out_forbids_nothing(monkeypatch):
    asked = answers(monkeypatch, torch.OutOfMemoryError(), ("kernel",), torch.OutOfMemoryError(), True)
    with a_gpu(monkeypatch):
        assert [ops.gpu_decodes(*ABOUT) for _ in range(3)] == [(), ("kernel",), ("kernel",)]
        assert [ops.gpu_multiplies_fp8(ABOUT[0]) for _ in range(3)] == [False, True, True]
    assert len(asked) == 4


def test_one_thread_tries_at_a_time(monkeypatch):
    inside, most = [], []

    def trial(*about):
        inside.append(1)
        most.append(len(inside))
        trials.time.sleep(0.05)
        inside.pop()
        return ("kernel",)

    monkeypatch.setattr(ops, "try_decodes", trial)
    with a_gpu(monkeypatch):
        threads = [
            threading.Thread(target=ops.gpu_decodes, args=(*ABOUT[:2], heads % 2, 512, 64)) for heads in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1]


def test_flashmla_is_present_where_it_is_installed_and_fits(monkeypatch):
    monkeypatch.setattr(hub_kernels, "find_spec", lambda name: None)
    device = torch.device("cuda", 0)
    with a_gpu(monkeypatch):
        assert hub_kernels.present(device, 512, 64) == []
        monkeypatch.setattr(hub_kernels, "find_spec", lambda name: name)
        assert hub_kernels.present(device, 512, 64) == ["flashmla"]
        assert hub_kernels.present(device, 20, 8) == []
        monkeypatch.undo()
    with a_gpu(monkeypatch):
        monkeypatch.setitem(sys.modules, "flash_mla", SimpleNamespace(__spec__=None))
        assert hub_kernels.present(device, 512, 64) == []
    with a_gpu(monkeypatch, (8, 0)):
        monkeypatch.setattr(hub_kernels, "find_spec", lambda name: name)
        assert hub_kernels.present(device, 512, 64) == []


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.1, False)])
def test_the_fp8_product_is_tried(factor, right, monkeypatch, warned):
    """What stands in for the kernel rounds as a GPU does; the interpreter's cast to FP8 does not carry into the exponent."""
    calls = []

    def product(x, weight, scale, rows, ue8m0):
        calls.append(len(x))
        return factor * ops.block_scaled_product_reference(x, weight, scale, (rows, 128), ue8m0)

    monkeypatch.setattr(ops, "triton_block_scaled_product", product)
    assert ops.try_fp8_product(DEVICE) == right
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
