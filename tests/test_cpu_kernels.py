"""The C kernels against PyTorch's own operations, and what happens where there is no compiler."""

import functools
import itertools
import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek import cpu_kernels, fp8, ops
from modeling_deepseek.fp8 import FP8Experts, FP8Linear, dequantize, fp8_linear, quantize

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


BUILDS = {"as the machine has it": (), "portable": ("-UWIDE", "-U__AVX2__")}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["without AVX512_BF16"] = ("-mno-avx512bf16",)


@pytest.fixture(params=BUILDS)
def kernels(request, monkeypatch):
    library = cpu_kernels._library(*BUILDS[request.param])
    monkeypatch.setattr(cpu_kernels, "_library", functools.cache(lambda: library))
    monkeypatch.setattr(ops, "FP8_PRODUCT", "c")
    assert cpu_kernels.kernels_available()
    assert request.param == "as the machine has it" or not cpu_kernels.multiplies_pairs()
    assert request.param != "portable" or not cpu_kernels.kernels_fast()
    return request.param


def plain(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(ops, "FP8_PRODUCT", "dequantize")
        return call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 250, 17, 3])
def test_every_code_has_its_value(kernels, dtype, columns):
    for scale in (1.0, 1 / 3, 2.0**-130, 2.0**125, float("nan")):
        scales = torch.full((1, -(-columns // 100)), scale)
        out = torch.full((2, columns), 7.0, dtype=dtype)
        assert ops.dequantize_in_c(CODES.expand(2, 256)[:, -columns:], scales, (128, 100), out)
        expected = (CODES.float() * torch.tensor(scale))[-columns:].to(dtype).expand(2, columns)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows,columns,block", [(1, 1, (1, 1)), (300, 200, (128, 128)), (576, 128, (128, 128))])
def test_dequantises_bit_for_bit(kernels, monkeypatch, rows, columns, block):
    weight, scale = quantize(torch.randn(rows, columns), block)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((rows, columns), float("nan"), dtype=dtype)
        assert ops.dequantize_in_c(weight, scale, block, out)
        expected = plain(monkeypatch, lambda dtype=dtype: dequantize(weight, scale, block, dtype))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns,at", [(1, 0), (32, 31), (64, 5), (65, 64), (130, 127), (300, 299)])
def test_every_code_has_its_value_in_a_product(kernels, dtype, columns, at):
    """Subnormal codes and NaN too: of the pairs' operands, processors take subnormal bf16 for zero."""
    weight = torch.zeros(256, columns).to(torch.float8_e4m3fn)
    weight[:, at] = CODES
    for scale in (1.0, 1 / 3, 2.0**-100):
        x = torch.full((5, columns), 0.75, dtype=dtype)
        product = cpu_kernels.fp8_product(x, weight, torch.full((2, -(-columns // 128)), scale), (128, 128))
        expected = (CODES.float() * 0.75 * torch.tensor(scale)).expand(5, 256)
        torch.testing.assert_close(product, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [*range(1, 10), 24, 25])
@pytest.mark.parametrize("rows,columns,block", [(5, 3, (2, 2)), (130, 300, (128, 128)), (64, 100, (16, 24))])
def test_product_is_that_of_the_dequantised_weight(kernels, monkeypatch, tokens, rows, columns, block, dtype):
    torch.manual_seed(tokens)
    weight, scale = quantize(torch.randn(rows, columns), block)
    x = torch.randn(tokens, columns).to(dtype)
    product = cpu_kernels.fp8_product(x, weight, scale, block)
    expected = x.double() @ plain(monkeypatch, lambda: dequantize(weight, scale, block)).double().T
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)
    kept = ops.dequantizing_product(x, weight, scale, block)
    pairs = dtype == torch.bfloat16 and cpu_kernels.multiplies_pairs()
    assert (kept is None) == (tokens > (ops.C_MAX_TOKENS_IN_PAIRS if pairs else ops.C_MAX_TOKENS))


@pytest.mark.parametrize("counts", [[1], [1, 1, 1, 1, 1, 1], [3, 8, 1], [0, 5, 0, 2]])
def test_products_with_several_weights_are_those_with_each(kernels, counts):
    torch.manual_seed(0)
    held = [quantize(torch.randn(130, 300)) for _ in range(7)]
    weights, scales = (torch.stack(each) for each in zip(*held, strict=True))
    chosen, starts = [6, 0, 2, 3, 5, 4][: len(counts)], [sum(counts[:i]) for i in range(len(counts) + 1)]
    x = torch.randn(sum(counts), 300)
    products = ops.dequantizing_products(x, weights, scales, chosen, starts, (128, 128))
    for expert, start, count in zip(chosen, starts, counts, strict=False):
        own = slice(start, start + count)
        expected = cpu_kernels.fp8_product(x[own], *held[expert], (128, 128))
        torch.testing.assert_close(products[own], expected, rtol=0, atol=0)
    assert ops.dequantizing_products(x, weights, scales, [7] * len(counts), starts, (128, 128)) is None
    assert ops.dequantizing_products(x[:, 1:], weights, scales, chosen, starts, (128, 128)) is None


@pytest.mark.parametrize("weights_in,x_in", itertools.product(("float32", "bfloat16"), repeat=2))
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 31), (5, 64), (4, 97), (2, 300)])
def test_plain_weights_meet_their_tokens(kernels, weights_in, x_in, rows, columns):
    torch.manual_seed(0)
    weights = torch.randn(6, rows, columns + 3).to(getattr(torch, weights_in))[
        :, :, 1 : columns + 1
    ]  # rows that lie apart
    counts = [0, 1, 2, 3, 4, 9]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    x = torch.randn(starts[-1], columns).to(getattr(torch, x_in))
    found, chosen = cpu_kernels.products(x, weights, [4, 2, 0, 5, 1, 1], starts), [4, 2, 0, 5, 1, 1]
    for expert, start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
        expected = x[start:end].double() @ weights[expert].double().T
        torch.testing.assert_close(found[start:end].double(), expected, rtol=1e-5, atol=1e-5)


def test_as_many_threads_as_pytorch_has(monkeypatch):
    asked = []
    library = SimpleNamespace(products=lambda *args: asked.append(args[-1]), takes_pairs=lambda: 0)
    monkeypatch.setattr(cpu_kernels, "_library", lambda: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    cpu_kernels.products(torch.randn(1, 4), torch.randn(2, 3, 4), [1], [0, 1])
    assert asked == [7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_kept_experts_of_a_step_go_together(kernels, monkeypatch, dtype, tokens):
    """V2-Lite's experts, 11 blocks of 128 rows for gate and for up: as one expert after another gives it."""
    torch.manual_seed(tokens)
    number, top_k, hidden, width = 4, 3, 256, 1408
    names = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    held = {name: [quantize(torch.randn(shape) / 20) for _ in range(number)] for name, shape in names.items()}
    weights = {name: torch.stack([weight for weight, _ in each]) for name, each in held.items()}
    weights |= {name + "_scale_inv": torch.stack([scale for _, scale in each]) for name, each in held.items()}
    weights["gate_up_proj_scale_inv"] = weights["gate_up_proj_scale_inv"].view(number, 2, 11, 2)
    experts = FP8Experts(weights, (128, 128), "silu")
    x, gates = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    chosen = torch.rand(tokens, number + 1).topk(top_k).indices  # number: served elsewhere
    asked = []
    original = ops.dequantizing_products
    monkeypatch.setattr(fp8, "dequantizing_products", lambda *args: asked.append(original(*args)) or asked[-1])
    with torch.no_grad():
        together = experts(x, chosen, gates)
        assert [answer is None for answer in asked] == ([] if tokens == 40 else [False, False])
        monkeypatch.setattr(FP8Experts, "_together", lambda *_: None)
        tolerance = 0 if dtype == torch.float32 else 2e-2  # sums of three in bf16
        torch.testing.assert_close(together, experts(x, chosen, gates), rtol=tolerance, atol=tolerance)
        assert not experts(x, torch.full_like(chosen, number), gates).any()


def test_reads_rows_that_lie_apart(kernels):
    weight, scale = quantize(torch.randn(40, 64), (16, 16))
    x = torch.randn(2, 32)
    torch.testing.assert_close(
        ops.dequantizing_product(x, weight[16:, 32:], scale[1:, 2:], (16, 16)),
        F.linear(x, dequantize(weight, scale, (16, 16))[16:, 32:]),
        rtol=1e-5,
        atol=1e-4,
    )


def test_a_kept_layer_of_v3_decodes_and_learns(kernels, monkeypatch):
    """kv_a_proj_with_mqa in its real shape, 576 rows: outputs in bf16 against fp32, and the gradient of what is in front."""
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(576, 7168) / 85)
    layer = FP8Linear(weight, scale, (128, 128), bias=None)
    x = torch.randn(2, 1, 7168, requires_grad=True)
    output = layer(x)
    expected = plain(monkeypatch, lambda: layer(x))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=2e-2, atol=2e-2)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    assert layer(x.double()).dtype == torch.float64


def test_small_weights_and_traced_ones_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_library", functools.cache(lambda: pytest.fail("a compiler was started")))
    weight, scale = quantize(torch.randn(64, 64), (16, 16))
    assert ops.dequantizing_product(torch.randn(1, 64), weight, scale, (16, 16)) is None
    large = torch.empty(2048, 1024, dtype=torch.float8_e4m3fn, device="meta")
    assert ops.dequantizing_product(torch.randn(1, 1024, device="meta"), large, scale, (128, 128)) is None


def test_without_a_compiler_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_library", functools.cache(lambda: None))
    monkeypatch.setattr(ops, "C_MIN_WEIGHTS", 0)
    weight, scale = quantize(torch.randn(64, 64), (16, 16))
    x = torch.randn(1, 64)
    torch.testing.assert_close(fp8_linear(x, weight, scale, (16, 16)), F.linear(x, dequantize(weight, scale, (16, 16))))
    monkeypatch.setattr(ops, "FP8_PRODUCT", "c")
    with pytest.raises(ValueError, match="C compiler"):
        fp8_linear(x, weight, scale, (16, 16))


def test_what_does_not_fit_is_refused_before_memory_is_read(kernels):
    weight, scale = quantize(torch.randn(64, 64), (16, 16))
    for width in (1, 32, 65):
        with pytest.raises(RuntimeError, match="shapes"):
            fp8_linear(torch.randn(1, width), weight, scale, (16, 16))
    with pytest.raises(ValueError, match="blocks"):
        fp8_linear(torch.randn(1, 64), weight, scale[:2], (16, 16))
