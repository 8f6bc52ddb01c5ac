"""Mixture of experts: every implementation against a loop over tokens, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeV3

from modeling_deepseek import DeepseekV3Config, cpu_kernels, moe, products
from modeling_deepseek.moe import (
    DeepseekExperts,
    DeepseekMoE,
    few_tokens_experts_forward,
    gathered_experts_forward,
)
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


FORMS = {"few": few_tokens_experts_forward, "gathered": gathered_experts_forward}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_forms_for_few_tokens_equal_a_loop_over_tokens(form, dtype, tokens):
    experts, x = built(DeepseekExperts, "v3"), torch.randn(tokens, 48)
    chosen, gates = routing(tokens)
    expected = loop_over_tokens(experts, x, chosen, gates)
    output = FORMS[form](experts.to(dtype), x.to(dtype), chosen, gates)
    assert output.dtype == dtype
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.03, atol=0.03 * expected.std().item())
    torch.testing.assert_close(output.float(), expected, **close)


def test_few_tokens_pass_over_experts_that_are_served_elsewhere():
    experts, x = built(DeepseekExperts, "v3"), torch.randn(2, 48)
    chosen, gates = torch.tensor([[0, EXPERTS, 3], [EXPERTS, 1, 2]]), torch.rand(2, 3)
    expected = loop_over_tokens(experts, x, chosen, gates)
    torch.testing.assert_close(few_tokens_experts_forward(experts, x, chosen, gates), expected, rtol=1e-4, atol=1e-5)
    nowhere = torch.full((1, 3), EXPERTS)
    assert not few_tokens_experts_forward(experts, x[:1], nowhere, gates[:1]).any()


@pytest.mark.parametrize(
    ("tokens", "small", "form"),
    [
        (1, 2**20, "gathered_experts_forward"),
        (1, 0, "few_tokens_experts_forward"),
        (2, 0, "grouped_mm_experts_forward"),
        (moe.MANY_TOKENS - 1, 0, "grouped_mm_experts_forward"),
        (moe.MANY_TOKENS, 0, None),
    ],
)
def test_auto_takes_a_form_by_the_number_of_tokens(tokens, small, form, monkeypatch):
    """The sorted loop is the module's own; under gradients it is grouped_mm."""
    experts, x = built(DeepseekExperts, "v3", "auto"), torch.randn(tokens, 48)
    experts._is_expert_parallel = False  # transformers 5.17 does not say
    chosen, gates = routing(tokens)
    monkeypatch.setattr(moe, "SMALL_WEIGHTS", small)
    taken = []

    def spied(name, form):
        return lambda *arguments: taken.append(name) or form(*arguments)

    for kind in ("gathered", "few_tokens", "grouped_mm", "batched_mm"):
        name = f"{kind}_experts_forward"
        monkeypatch.setattr(moe, name, spied(name, getattr(moe, name)))
    with torch.no_grad():
        output = experts(x, chosen, gates)
    assert taken == ([] if form is None else [form])
    torch.testing.assert_close(output, loop_over_tokens(experts, x, chosen, gates), rtol=1e-4, atol=1e-5)
    experts(x, chosen, gates).sum().backward()
    assert taken[-1] == "grouped_mm_experts_forward" and experts.down_proj.grad is not None


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_in_16_bits_go_in_fp32_where_a_cpu_is_slow_at_them(dtype, slow, monkeypatch):
    monkeypatch.setattr(moe, "has_fast_gemm", lambda *_: not slow)
    monkeypatch.setattr(moe, "SMALL_WEIGHTS", 0)
    computed = []
    loop = moe.sorted_experts_forward
    monkeypatch.setattr(moe, "sorted_experts_forward", lambda *args: computed.append(args[-1]) or loop(*args))
    experts = built(DeepseekExperts, "v3", "auto").to(dtype)
    errors = []
    for tokens in (8, 300):
        x, (chosen, gates) = torch.randn(tokens, 48, dtype=dtype), routing(tokens)
        with torch.no_grad():
            output = experts(x, chosen, gates)
        assert output.dtype == dtype
        expected = loop_over_tokens(experts.float(), x.float(), chosen, gates)
        errors.append(((output.float() - expected).norm() / expected.norm()).item())
        experts.to(dtype)
    assert computed == [torch.float32] * slow
    limit = torch.finfo(dtype).eps
    assert errors[1] < (limit / 2 if slow else 2 * limit)  # where it is wide, the result alone is rounded


@FAMILIES
def test_auto_is_the_default_and_other_names_are_kept(family):
    assert tiny_model(family).config._experts_implementation == "auto"
    model = tiny_model(family, experts_implementation="grouped_mm")
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("auto")
    assert model.config._experts_implementation == "auto"
    with pytest.raises(ValueError, match="quick"):
        model.set_experts_implementation("quick")


@torch.no_grad()
def test_one_layer_of_v3_in_its_size_takes_one_token():
    """256 experts of 7168 x 2048, of which eight are real: views of one, since nobody has the memory here."""
    with torch.device("meta"):
        experts = DeepseekExperts(DeepseekV3Config(num_hidden_layers=1))
    experts.config._experts_implementation = "auto"
    one = [torch.randn(1, *parameter.shape[1:]) * 0.01 for parameter in (experts.gate_up_proj, experts.down_proj)]
    for name, weight in zip(("gate_up_proj", "down_proj"), one, strict=True):
        setattr(experts, name, torch.nn.Parameter(weight.expand(256, -1, -1), requires_grad=False))
    x, gates = torch.randn(1, 7168), torch.rand(1, 8)
    gate, up = F.linear(x, one[0][0]).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, one[1][0]) * gates.sum()
    torch.testing.assert_close(experts(x, torch.arange(8)[None] * 31, gates), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_tokens_are_no_tokens():
    assert built(DeepseekMoE, "v3", "auto")(torch.randn(1, 0, 48)).shape == (1, 0, 48)


@torch.no_grad()
def test_where_nobody_says_whether_experts_are_elsewhere_none_is_looked_up(monkeypatch):
    """transformers 5.17 marks tokens of other ranks without telling the module."""
    experts, x = built(DeepseekExperts, "v3", "auto"), torch.randn(1, 48)
    monkeypatch.delattr(experts, "_is_expert_parallel", raising=False)
    chosen, gates = torch.tensor([[0, EXPERTS, 3]]), torch.rand(1, 3)
    expected = loop_over_tokens(experts, x, chosen, gates)
    torch.testing.assert_close(experts(x, chosen, gates), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_export_is_for_any_number_of_tokens():
    experts = built(DeepseekExperts, "v3", "auto")
    tokens = {0: torch.export.Dim("tokens", min=2, max=4096)}
    exported = torch.export.export(experts, (torch.randn(6, 48), *routing(6)), dynamic_shapes=(tokens,) * 3)
    x, (chosen, gates) = torch.randn(700, 48), routing(700)
    torch.testing.assert_close(exported.module()(x, chosen, gates), experts(x, chosen, gates), rtol=1e-4, atol=1e-5)


def test_native_classes_take_a_config_of_ours():
    model = tiny_model("v3")
    native = NativeV3(model.config)
    native.load_state_dict(model.state_dict(), strict=False)
    tokens = tiny_tokens(model.config)
    with torch.no_grad():
        torch.testing.assert_close(native(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


def test_a_model_in_fp64_learns():
    """As for checks of gradients; PyTorch's grouped product has no fp64."""
    model = tiny_model("v3").double().train()
    ids = tiny_tokens(model.config)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.experts.down_proj.grad.dtype == torch.float64
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits, rtol=1e-4, atol=1e-6)  # the router is in fp32


def in_c(experts: DeepseekExperts, *inputs: torch.Tensor) -> torch.Tensor | None:
    with torch.no_grad():
        return moe.experts_in_c(experts, *inputs)


@pytest.mark.parametrize("tokens", [1, 2, 9, 33])
def test_experts_in_c_equal_a_loop_over_tokens(monkeypatch, tokens):
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    experts, x = built(DeepseekExperts, "v3", moe_intermediate_size=37), torch.randn(tokens, 48)
    chosen, gates = routing(tokens, experts=EXPERTS + 1)  # one is served elsewhere
    expected = loop_over_tokens(experts, x, chosen, gates)
    torch.testing.assert_close(in_c(experts, x, chosen, gates), expected, rtol=1e-5, atol=1e-5)
    narrow = in_c(experts.bfloat16(), x.bfloat16(), chosen, gates)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())


def test_experts_of_the_released_size_meet_few_tokens_in_c(monkeypatch):
    """V2-Lite's 2048 x 1408, four of them: up to 12 tokens per expert, 32 for one."""
    monkeypatch.setattr(products, "kernels_fast", cpu_kernels.kernels_available)  # on any processor
    size = dict(n_routed_experts=4, n_group=1, topk_group=1, hidden_size=2048, moe_intermediate_size=1408)
    experts = built(DeepseekExperts, "v2", "auto", **size)
    asked = []
    original = moe.experts_in_c
    monkeypatch.setattr(moe, "experts_in_c", lambda *args: asked.append(original(*args)) or asked[-1])
    for tokens, same, taken in (
        (1, False, True),
        (24, False, True),
        (25, False, False),
        (32, True, True),
        (33, True, False),
    ):
        x, gates = torch.randn(tokens, 2048) / 40, torch.rand(tokens, 1 if same else 2)
        chosen = torch.full((tokens, 1), 3) if same else routing(tokens, 2, 4)[0]
        with torch.no_grad():
            output = experts(x, chosen, gates)
            expected = moe.sorted_experts_forward(experts, x, chosen, gates, torch.float32)
        assert (asked.pop() is not None) == taken, tokens
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_experts_as_wide_as_those_of_v3_take_fewer_tokens_in_bf16(monkeypatch):
    weights, x = torch.randn(2, 3, 7168).bfloat16(), torch.randn(10, 7168).bfloat16()
    for pairs in (True, False):
        monkeypatch.setattr(products, "multiplies_pairs", lambda pairs=pairs: pairs)
        for tokens in (9, 10):
            answer = products.expert_products(weights, x[:tokens], [0, 1], [0, 4, tokens])
            assert (answer is None) == (pairs and tokens == 10)
    assert products.expert_products(weights.float(), x.float(), [0, 1], [0, 4, 10]) is not None


def test_experts_meet_in_c_only_what_c_knows(monkeypatch):
    experts, x = built(DeepseekExperts, "v3"), torch.randn(2, 48)
    chosen, gates = routing(2)
    monkeypatch.setattr(products, "kernels_fast", cpu_kernels.kernels_available)
    assert in_c(experts, x, chosen, gates) is None  # small, each and
    monkeypatch.setattr(products, "MIN_WEIGHTS", 1 + experts.down_proj[0].numel())
    assert in_c(experts, x, chosen, gates) is None  # not by their number
    monkeypatch.setattr(products, "MIN_WEIGHTS", experts.down_proj[0].numel())
    assert in_c(experts, x, chosen, gates) is not None
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    assert in_c(experts, x, chosen, gates) is not None
    assert moe.experts_in_c(experts, x, chosen, gates) is None  # gradients
    assert in_c(experts, x.bfloat16(), chosen, gates) is None
    assert in_c(experts, x[:0], chosen[:0], gates[:0]) is None
    assert in_c(built(DeepseekExperts, "v3").half(), x.half(), chosen, gates) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert in_c(experts, x, chosen, gates) is None
    with torch.device("meta"):
        assert in_c(DeepseekExperts(tiny_config("v3")), x.to("meta"), chosen, gates) is None
        assert in_c(experts, x, chosen, gates).device.type == "cpu"
    apart = built(DeepseekExperts, "v3")
    apart.down_proj = torch.nn.Parameter(apart.down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2))
    assert in_c(apart, x, chosen, gates) is None
    few = built(DeepseekExperts, "v3")
    few.gate_up_proj, few.down_proj = (
        torch.nn.Parameter(w.detach()[:4].clone()) for w in (few.gate_up_proj, few.down_proj)
    )
    assert in_c(few, x, torch.tensor([[0, 1, 3], [1, 2, 3]]), gates) is not None
    assert in_c(few, x, torch.tensor([[0, 1, 4], [1, 2, 3]]), gates) is None  # no such weight
    assert products.expert_products(few.down_proj, x[:, 1:], [0], [0, 2]) is None
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "torch")
    assert in_c(experts, x, chosen, gates) is None
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "fast")
    with pytest.raises(ValueError, match="'auto', 'c' or 'torch', got 'fast'"):
        in_c(experts, x, chosen, gates)
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    monkeypatch.setattr(products, "kernels_available", lambda: False)
    with pytest.raises(ValueError, match="C compiler"):
        in_c(experts, x, chosen, gates)


def test_a_model_that_generates_meets_its_experts_in_c(monkeypatch):
    model = tiny_model("v2").eval()
    ids = tiny_tokens(model.config, 2, 7)
    model.config._experts_implementation = "auto"
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    asked = []
    original = moe.expert_products
    monkeypatch.setattr(moe, "expert_products", lambda *args: asked.append(1) or original(*args))
    found = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert asked and torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
