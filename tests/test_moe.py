"""Mixture of experts: every implementation against a loop over tokens, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek import DeepseekV3Config
from modeling_deepseek.moe import DeepseekExperts, DeepseekMoE
from tiny import randomize, tiny_config, tiny_model, tiny_tokens

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
FAMILIES = pytest.mark.parametrize("family", ["moe16b", "v2", "v3"])
EXPERTS = 8  # of the tiny configs


def built(cls, family: str, implementation: str = "eager", **overrides):
    config = tiny_config(family, **overrides)
    config._experts_implementation = implementation
    module = cls(config)
    randomize(module)
    return module


def routing(tokens: int, top_k: int = 3, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts and gates `[tokens, top_k]`."""
    return torch.rand(tokens, experts).topk(top_k).indices, torch.rand(tokens, top_k)


def loop_over_tokens(experts: DeepseekExperts, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor):
    width, rows = experts.intermediate_dim, []
    for token, indices, weights in zip(x, chosen.tolist(), gates, strict=True):
        total = torch.zeros_like(token)
        for index, weight in zip(indices, weights, strict=True):
            if index < experts.num_experts:
                gate, up = experts.gate_up_proj[index][:width] @ token, experts.gate_up_proj[index][width:] @ token
                total = total + weight * (experts.down_proj[index] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def gradients(forward, experts: DeepseekExperts, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor):
    """Of the input, the gates and both weights."""
    leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_(), experts.gate_up_proj, experts.down_proj]
    output = forward(leaves[0], chosen, leaves[1])
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), leaves)


@IMPLEMENTATIONS
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_experts_equal_a_loop_over_tokens(implementation, tokens):
    experts, x = built(DeepseekExperts, "v3", implementation), torch.randn(tokens, 48)
    chosen, gates = routing(tokens)
    expected = loop_over_tokens(experts, x, chosen, gates)
    torch.testing.assert_close(experts(x, chosen, gates), expected, rtol=1e-4, atol=1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("tokens", [2, 33])
def test_their_gradients_equal_those_of_a_loop_over_tokens(implementation, tokens):
    experts, x = built(DeepseekExperts, "v3", implementation), torch.randn(tokens, 48)
    chosen, gates = routing(tokens)
    expected = gradients(lambda *args: loop_over_tokens(experts, *args), experts, x, chosen, gates)
    for ours, theirs in zip(gradients(experts, experts, x, chosen, gates), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_bf16_implementations_agree_within_rounding(implementation):
    eager = built(DeepseekExperts, "v3").bfloat16()
    other = built(DeepseekExperts, "v3", implementation).bfloat16()
    x = torch.randn(33, 48, dtype=torch.bfloat16)
    chosen, gates = routing(33)
    expected = built(DeepseekExperts, "v3")(x.float(), chosen, gates)
    for experts in (eager, other):
        result = experts(x, chosen, gates)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.1)


@IMPLEMENTATIONS
def test_an_index_behind_the_last_expert_adds_nothing(implementation):
    experts, x = built(DeepseekExperts, "v3", implementation), torch.randn(9, 48)
    experts._is_expert_parallel = True  # only then do the implementations of transformers look for such an index
    chosen, gates = routing(9)
    chosen[::2, 1] = EXPERTS
    chosen[4] = EXPERTS
    gates = gates.masked_fill(chosen == EXPERTS, 0.0)
    result = experts(x, chosen, gates)
    torch.testing.assert_close(result, loop_over_tokens(experts, x, chosen, gates), rtol=1e-4, atol=1e-5)
    assert not result[4].any()


def test_eager_ignores_such_an_index_whatever_its_gate():
    experts, x = built(DeepseekExperts, "v3"), torch.randn(9, 48)
    chosen, gates = routing(9)
    chosen[::2, 1] = EXPERTS
    torch.testing.assert_close(experts(x, chosen, gates), loop_over_tokens(experts, x, chosen, gates))


def test_a_token_may_meet_the_same_expert_twice():
    experts, x = built(DeepseekExperts, "v3"), torch.randn(3, 48)
    chosen, gates = torch.tensor([[5, 5], [0, 5], [0, 0]]), torch.rand(3, 2)
    torch.testing.assert_close(experts(x, chosen, gates), loop_over_tokens(experts, x, chosen, gates))


def test_experts_without_tokens_get_zero_gradients():
    experts, x = built(DeepseekExperts, "v3"), torch.randn(5, 48)
    chosen = torch.tensor([[1, 4, 6]]).expand(5, 3)
    experts(x, chosen, torch.rand(5, 3)).sum().backward()
    for weight in (experts.gate_up_proj, experts.down_proj):
        used = weight.grad.flatten(1).abs().sum(dim=1) > 0
        assert used.nonzero().flatten().tolist() == [1, 4, 6]


@IMPLEMENTATIONS
def test_no_tokens_give_no_output(implementation):
    experts = built(DeepseekExperts, "v3", implementation)
    chosen, gates = routing(0)
    assert experts(torch.empty(0, 48), chosen, gates).shape == (0, 48)


@FAMILIES
@IMPLEMENTATIONS
def test_the_block_adds_routed_and_shared_experts(family, implementation):
    moe, x = built(DeepseekMoE, family, implementation), torch.randn(2, 7, 48)
    _, gates, chosen = moe.gate(x)
    routed = loop_over_tokens(moe.experts, x.flatten(0, 1), chosen, gates).view(2, 7, 48)
    shared = moe.shared_experts
    expected = routed + shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))
    torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_shared_experts_are_one_mlp_of_their_joint_width(shared):
    moe = built(DeepseekMoE, "v3", n_shared_experts=shared)
    assert moe.shared_experts.gate_proj.weight.shape == (40 * shared, 48)
    assert moe.shared_experts.down_proj.weight.shape == (48, 40 * shared)


@pytest.mark.parametrize("absent", [None, 0])
def test_a_block_without_shared_experts_is_the_routed_ones(absent):
    moe, x = built(DeepseekMoE, "v3", n_shared_experts=absent), torch.randn(2, 7, 48)
    _, gates, chosen = moe.gate(x)
    expected = loop_over_tokens(moe.experts, x.flatten(0, 1), chosen, gates).view(2, 7, 48)
    assert moe.shared_experts is None
    torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-5)


def test_the_router_learns_through_the_gates():
    moe = built(DeepseekMoE, "v3")
    moe(torch.randn(2, 7, 48)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in moe.parameters())


@FAMILIES
def test_autocast_stays_within_bf16_rounding(family):
    moe, x = built(DeepseekMoE, family, routed_scaling_factor=1.0), torch.randn(2, 7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = moe(x)
    torch.testing.assert_close(result.float(), moe(x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("experts", "hidden", "width", "shared"), [(256, 7168, 2048, 1), (160, 5120, 1536, 2)], ids=["V3", "V2"]
)
def test_the_released_geometry_has_fused_weights_and_one_shared_mlp(experts, hidden, width, shared):
    config = DeepseekV3Config(
        hidden_size=hidden, n_routed_experts=experts, moe_intermediate_size=width, n_shared_experts=shared
    )
    with torch.device("meta"):
        moe = DeepseekMoE(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()}
    assert shapes == {
        "experts.gate_up_proj": (experts, 2 * width, hidden),
        "experts.down_proj": (experts, hidden, width),
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
        "shared_experts.gate_proj.weight": (shared * width, hidden),
        "shared_experts.up_proj.weight": (shared * width, hidden),
        "shared_experts.down_proj.weight": (hidden, shared * width),
    }


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@FAMILIES
def test_a_model_switches_its_implementation(family, implementation):
    model = tiny_model(family)
    tokens = tiny_tokens(model.config)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
