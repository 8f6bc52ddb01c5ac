"""RMSNorm and the SwiGLU MLP against their formulas."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_deepseek.layers import DeepseekMLP, DeepseekRMSNorm


def norm_by_hand(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return weight.double() * x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 1), (0, 4)], ids=str)
def test_rms_norm_divides_by_the_root_mean_square(shape, eps):
    norm, x = DeepseekRMSNorm(shape[-1], eps), torch.randn(shape) * 3 + 1
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x).double(), norm_by_hand(x, norm.weight, eps), rtol=1e-5, atol=1e-6)


def test_rms_norm_starts_as_ones_with_the_epsilon_of_the_latent_norms():
    norm = DeepseekRMSNorm(4)
    assert norm.weight.tolist() == [1, 1, 1, 1]
    assert norm.variance_epsilon == 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_of_low_precision_input_is_computed_in_fp32(dtype):
    norm, x = DeepseekRMSNorm(512).to(dtype), (torch.randn(64, 512) * 300).to(dtype)  # squares overflow fp16
    result = norm(x)
    assert result.dtype == dtype
    assert (result == norm_by_hand(x, norm.weight, 1e-6).to(dtype)).float().mean() > 0.999


def test_rms_norm_of_fp64_input_is_computed_in_fp64():
    norm, x = DeepseekRMSNorm(48).double(), torch.randn(5, 48, dtype=torch.double)
    torch.testing.assert_close(norm(x), norm_by_hand(x, norm.weight, 1e-6), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (9, 24)], ids=str)
def test_the_mlp_is_down_of_silu_of_gate_times_up(shape, bias):
    mlp, x = DeepseekMLP(24, 40, bias=bias), torch.randn(shape)
    weights = {name: parameter.double() for name, parameter in mlp.named_parameters()}
    gate, up = (
        x.double() @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0) for name in ("gate", "up")
    )
    hidden = gate / (1 + (-gate).exp()) * up
    expected = hidden @ weights["down_proj.weight"].T + weights.get("down_proj.bias", 0)
    torch.testing.assert_close(mlp(x).double(), expected, rtol=0, atol=1e-6)


def test_the_mlp_uses_the_activation_it_is_told():
    mlp, x = DeepseekMLP(8, 16, "relu"), torch.randn(3, 8)
    expected = mlp.down_proj(mlp.gate_proj(x).clamp(min=0) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)


def test_the_mlp_has_the_official_names_and_shapes():
    shapes = {name: tuple(parameter.shape) for name, parameter in DeepseekMLP(8, 16).named_parameters()}
    assert shapes == {"gate_proj.weight": (16, 8), "up_proj.weight": (16, 8), "down_proj.weight": (8, 16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rms_norm_without_gradients_is_the_one_with_them(dtype):
    """On a CPU it takes other operations then."""
    norm, x = DeepseekRMSNorm(64).to(dtype), torch.randn(9, 64).to(dtype) * 30
    norm.weight.data.uniform_()
    x[0], x[1, 5] = 0, float("inf")
    with_gradients = norm(x).detach()
    with torch.no_grad():
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(norm(x), with_gradients, rtol=tolerance, atol=tolerance, equal_nan=True)
        with pytest.raises(RuntimeError, match="shape"):
            norm(torch.ones(2, 1, dtype=dtype))


def test_rms_norm_has_second_derivatives_also_of_zeros():
    norm, x = DeepseekRMSNorm(8).double(), torch.zeros(1, 8, dtype=torch.double, requires_grad=True)
    (first,) = torch.autograd.grad((norm(x) * torch.arange(8.0)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert not second.any()


def test_rms_norm_works_where_tensors_are_pretended():
    norm, x = DeepseekRMSNorm(64), torch.randn(2, 64)
    with torch.no_grad():
        norm(x)
        with FakeTensorMode():
            assert DeepseekRMSNorm(64)(torch.ones(2, 64)).shape == (2, 64)
    gradient = torch.func.grad(lambda x: norm(x).square().sum())(x)
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(lambda x: norm(x).square().sum(), x))
