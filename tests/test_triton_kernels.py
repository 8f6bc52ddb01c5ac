"""The block-FP8 product in one kernel, against its plain twin. Without a GPU the kernels run in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek import DeepseekV3ForCausalLM, ops
from modeling_deepseek.fp8 import FP8Linear, dequantize, fp8_linear, quantize
from test_fp8 import FP8
from tiny import tiny_model, tiny_tokens

triton_kernels = pytest.importorskip("modeling_deepseek.triton_kernels")
if not triton_kernels.AVAILABLE:
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
E4M3 = torch.float8_e4m3fn
SHAPES = [
    (1, 576, 300),
    (17, 200, 256),
    (70, 130, 129),
    (3, 128, 128),
    (130, 64, 640),
]  # rows of x, of the weight, columns


def representable(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that E4M3 holds exactly under their own scales: the interpreter's cast to FP8 does not carry into the exponent."""
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
    values = codes.view(E4M3).float().clamp(max=240) * torch.randn(rows, columns).sign()
    values[:, ::128] = 448  # the largest of every group: its scale is a power of two
    return (values * 2.0 ** torch.randint(-4, 4, (rows, 1))).to(dtype)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outer", "inner"), SHAPES)
def test_the_kernel_multiplies_as_its_plain_twin_does(rows, outer, inner, dtype, ue8m0):
    weight, scale = quantize(torch.randn(outer, inner), scale_fmt="ue8m0" if ue8m0 else None)
    x = representable(rows, inner, dtype)
    arguments = (weight.to(DEVICE), scale.to(DEVICE), (128, 128), ue8m0)
    ours = ops.block_scaled_product(x.to(DEVICE), *arguments)
    expected = ops.block_scaled_product_reference(x.float().to(DEVICE), *arguments)
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("ue8m0", [False, True])
def test_activations_get_the_scales_of_the_definition(ue8m0):
    x = torch.randn(19, 300) * 10.0 ** torch.randint(-7, 4, (19, 1))
    x[3] = 0
    _, scales = triton_kernels.quantize_rows(x.to(DEVICE), ue8m0)
    for row in range(19):
        for group in range(3):
            scale = max(x[row, group * 128 : (group + 1) * 128].abs().max(), torch.tensor(1e-4)) / 448
            scale = scale.log2().ceil().exp2() if ue8m0 else scale
            assert scales[row, group].item() == pytest.approx(scale.item(), rel=1e-6)


def test_scales_may_be_e8m0_and_blocks_have_other_rows():
    weight, scale = quantize(torch.randn(192, 256), (64, 128), "ue8m0")
    x = representable(5, 256, torch.float32).to(DEVICE)
    stored = scale.to(torch.float8_e8m0fnu)
    ours = ops.block_scaled_product(x, weight.to(DEVICE), stored.to(DEVICE), (64, 128))
    expected = ops.block_scaled_product_reference(x, weight.to(DEVICE), scale.to(DEVICE), (64, 128))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-3)


def test_the_plain_twin_is_near_the_product_without_rounding():
    weight, scale = quantize(torch.randn(256, 512))
    x = torch.randn(4, 512)
    plain = fp8_linear(x, weight, scale, (128, 128))
    rounded = ops.block_scaled_product_reference(x, weight, scale, (128, 128))
    assert 1e-3 < ((rounded - plain).norm() / plain.norm()).item() < 0.05


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that multiplies FP8")
@pytest.mark.parametrize("ue8m0", [False, True])
def test_on_a_gpu_any_activation_is_rounded_as_torch_does(ue8m0):
    weight, scale = quantize(torch.randn(7168, 2048, device="cuda"), scale_fmt="ue8m0" if ue8m0 else None)
    for rows in (1, 64, 4096):
        x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
        ours = ops.block_scaled_product(x, weight, scale, (128, 128), ue8m0)
        expected = ops.block_scaled_product_reference(x.float(), weight, scale, (128, 128), ue8m0)
        assert ((ours.float() - expected).norm() / expected.norm()).item() < 5e-3


def test_every_product_of_a_kept_model_can_run_in_the_kernel(monkeypatch):
    calls = []

    def exact(x, weight, scale, rows, ue8m0):
        calls.append((x.ndim, rows, ue8m0))
        return F.linear(x, dequantize(weight, scale, (rows, 128)))

    model = tiny_model("v3").to(DEVICE)
    ids = tiny_tokens(model.config).to(DEVICE)
    model.quantize_fp8("ue8m0")
    monkeypatch.setattr(ops, "FP8_PRODUCT", "dequantize")
    expected = model(ids).logits
    assert not calls
    monkeypatch.setattr(ops, "FP8_PRODUCT", "kernel")
    monkeypatch.setattr(ops, "triton_block_scaled_product", exact)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-4)
    assert set(calls) == {(2, 128, True)}
    assert len(calls) > 3 * 4 + 2 * 3 * 4  # attention of every layer, and several experts


def test_the_gradient_is_that_of_the_plain_product(monkeypatch):
    weight, scale = quantize(torch.randn(200, 300))
    layer = FP8Linear(weight, scale, (128, 128), None).to(DEVICE)
    gradients = []
    for way in ("kernel", "dequantize"):
        monkeypatch.setattr(ops, "FP8_PRODUCT", way)
        x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        layer(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_way_to_multiply_is_chosen_by_name(monkeypatch):
    weight = torch.zeros(128, 128, dtype=E4M3)
    assert not ops.multiplies_fp8(weight, (128, 128))  # on a CPU
    monkeypatch.setattr(ops, "FP8_PRODUCT", "kernel")
    assert ops.multiplies_fp8(weight, (128, 128))
    with pytest.raises(ValueError, match=r"blocks of 128 columns.*\(128, 64\)"):
        ops.multiplies_fp8(weight, (128, 64))
    with pytest.raises(ValueError, match="float8_e5m2"):
        ops.multiplies_fp8(weight.to(torch.float8_e5m2), (128, 128))
    monkeypatch.setattr(ops, "FP8_PRODUCT", "fast")
    with pytest.raises(ValueError, match="'auto', 'kernel', 'c' or 'dequantize', got 'fast'"):
        ops.multiplies_fp8(weight, (128, 128))


def test_a_checkpoint_says_which_scales_its_activations_get(tmp_path):
    for scale_fmt in (None, "ue8m0"):
        model = DeepseekV3ForCausalLM.from_pretrained(FP8, dtype=torch.float32)
        model.quantize_fp8(scale_fmt)
        model.save_pretrained(tmp_path / str(scale_fmt))
        again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / str(scale_fmt), fp8_weights="keep")
        kept = {module.ue8m0 for each in (model, again) for module in each.modules() if hasattr(module, "ue8m0")}
        assert kept == {scale_fmt == "ue8m0"}
