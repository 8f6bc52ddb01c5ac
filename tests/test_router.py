"""Routing against plain loops over tokens, in the published geometries, and what must not leak into the gates."""

import math
from dataclasses import dataclass

import pytest
import torch

from modeling_deepseek import DeepseekV3Model
from modeling_deepseek.router import (
    DeepseekTopkRouter,
    choose_experts,
    gate_values,
    group_limited,
    router_scores,
)
from tiny import randomize, tiny_config


@dataclass
class Routing:
    """How a release routes; the defaults are V3's at a tiny size."""

    experts: int = 16
    top_k: int = 4
    groups: int = 4
    top_groups: int = 2
    scoring: str = "sigmoid"
    method: str = "noaux_tc"
    normalize: bool = True
    scaling: float = 2.5
    hidden: int = 48

    def router(self) -> DeepseekTopkRouter:
        family = "v3" if self.scoring == "sigmoid" else "v2"
        config = tiny_config(
            family,
            hidden_size=self.hidden,
            n_routed_experts=self.experts,
            num_experts_per_tok=self.top_k,
            n_group=self.groups,
            topk_group=self.top_groups,
            scoring_func=self.scoring,
            topk_method=self.method,
            norm_topk_prob=self.normalize,
            routed_scaling_factor=self.scaling,
        )
        router = DeepseekTopkRouter(config)
        randomize(router)
        return router


ROUTINGS = {
    "MoE-16B and V2-Lite: 64 experts": Routing(64, 6, 1, 1, "softmax", "greedy", False, 1.0),
    "V2: 160 experts, 3 of 8 groups": Routing(160, 6, 8, 3, "softmax", "group_limited_greedy", False, 16.0),
    "V3: 256 experts, 4 of 8 groups": Routing(256, 8, 8, 4, "sigmoid", "noaux_tc", True, 2.5),
    "V3 tiny": Routing(),
    "V2 tiny": Routing(scoring="softmax", method="group_limited_greedy", normalize=False, scaling=16.0),
    "V2 tiny, normalised": Routing(scoring="softmax", method="group_limited_greedy", normalize=True, scaling=16.0),
    "groups of one expert": Routing(experts=8, groups=8, top_groups=5),
    "all groups": Routing(top_groups=4),
    "V3 tiny, greedy": Routing(method="greedy"),
    "greedy ignores groups": Routing(scoring="softmax", method="greedy", normalize=False),
}
ALL = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def route_one_token(scores: list[float], bias: list[float], routing: Routing) -> set[int]:
    """The choice for one token in plain Python: rank the groups, then the experts of the best ones."""
    ranking = [score + offset for score, offset in zip(scores, bias, strict=True)]
    candidates = range(len(ranking))
    if routing.method != "greedy":
        size = len(ranking) // routing.groups
        best = 2 if routing.method == "noaux_tc" else 1

        def worth(group: int) -> float:
            return sum(sorted(ranking[group * size : (group + 1) * size])[-best:])

        groups = sorted(range(routing.groups), key=worth)[-routing.top_groups :]
        candidates = [expert for expert in candidates if expert // size in groups]
    return set(sorted(candidates, key=lambda expert: ranking[expert])[-routing.top_k :])


def gates_of_one_token(scores: list[float], chosen: list[int], routing: Routing) -> list[float]:
    gates = [scores[expert] for expert in chosen]
    if routing.normalize:
        total = sum(gates)
        scaling = routing.scaling if routing.scoring == "sigmoid" else 1.0
        return [gate / total * scaling for gate in gates]
    return [gate * routing.scaling for gate in gates]


def scores_by_hand(logits: list[float], scoring: str) -> list[float]:
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


@ALL
@pytest.mark.parametrize("offset", [0.0, -3.0], ids=["bias around 0", "score + bias < 0"])
def test_experts_and_gates_equal_a_loop_over_tokens(routing, offset):
    router, x = routing.router(), torch.randn(3, 11, routing.hidden)
    bias = torch.zeros(routing.experts)
    if router.e_score_correction_bias is not None:
        bias = router.e_score_correction_bias.add_(offset)
    logits, gates, chosen = router(x)
    assert chosen.shape == gates.shape == (33, routing.top_k)
    torch.testing.assert_close(logits, x.flatten(0, 1) @ router.weight.T)
    for token in range(33):
        scores = scores_by_hand(logits[token].tolist(), routing.scoring)
        picked = chosen[token].tolist()
        assert set(picked) == route_one_token(scores, bias.tolist(), routing)
        assert gates[token].tolist() == pytest.approx(gates_of_one_token(scores, picked, routing), rel=1e-4)


def test_a_masked_group_is_never_chosen_though_its_zero_beats_every_score():
    scores = -torch.rand(50, 16) - 1
    masked = group_limited(scores, n_group=4, topk_group=2, group_top=2)
    assert (masked.isinf().view(50, 4, 4).all(dim=-1).sum(dim=-1) == 2).all()
    chosen = choose_experts(torch.zeros(50, 16), scores, 8, "noaux_tc", 4, 2)
    assert all(len(set((row // 4).tolist())) == 2 for row in chosen)


def test_groups_are_ranked_by_their_best_expert_in_v2_and_by_their_best_two_in_v3():
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.6, 0.5, 0.0]])  # group 0 has the best expert, group 1 the best pair
    assert choose_experts(scores, None, 1, "group_limited_greedy", 2, 1).tolist() == [[0]]
    assert choose_experts(scores, torch.zeros(6), 1, "noaux_tc", 2, 1).tolist() == [[3]]


def test_the_bias_ranks_experts_and_groups():
    scores, bias = torch.full((1, 8), 0.5), torch.zeros(8)
    bias[5], bias[7] = 0.25, 0.125
    assert sorted(choose_experts(scores, bias, 2, "noaux_tc", 2, 1)[0].tolist()) == [5, 7]


def test_the_bias_never_enters_the_gates():
    router, x = Routing(top_k=8).router(), torch.randn(20, 48)  # 8 experts of 2 groups: the bias only picks groups
    router.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]).repeat_interleave(4))
    logits, gates, chosen = router(x)
    assert (chosen < 8).all()
    expected = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(gates, 2.5 * expected / expected.sum(dim=-1, keepdim=True))


def test_the_bias_gets_no_gradient_and_the_weight_gets_that_of_the_gates():
    router, x = Routing().router(), torch.randn(20, 48, requires_grad=True)
    _, gates, chosen = router(x)
    target = torch.randn_like(gates)
    (gates * target).sum().backward()
    weight = router.weight.detach().double().requires_grad_()
    picked = (x.detach().double() @ weight.T).sigmoid().gather(1, chosen)
    (2.5 * picked / picked.sum(dim=-1, keepdim=True) * target).sum().backward()
    assert not router.e_score_correction_bias.requires_grad
    assert not chosen.requires_grad
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 8])
def test_v3_gates_sum_to_the_scaling_factor(scaling, top_k):
    _, gates, _ = Routing(top_k=top_k, scaling=scaling).router()(torch.randn(50, 48))
    torch.testing.assert_close(gates.sum(dim=-1), torch.full((50,), scaling))


def test_v2_gates_are_softmax_scores_times_the_scaling_factor():
    logits, gates, chosen = ROUTINGS["V2 tiny"].router()(torch.randn(50, 48))
    torch.testing.assert_close(gates, 16 * logits.softmax(dim=-1).gather(1, chosen))
    assert (gates.sum(dim=-1) < 16).all()


def test_v2_gates_that_are_normalised_are_not_scaled():
    _, gates, _ = ROUTINGS["V2 tiny, normalised"].router()(torch.randn(50, 48))
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(50))


def test_v2_gates_of_a_single_expert_are_scaled_and_not_normalised():
    scores, chosen = torch.rand(5, 4).softmax(dim=-1), torch.tensor([[0], [1], [2], [3], [0]])
    gates = gate_values(scores, chosen, normalize=True, scaling=16.0, scale_normalized=False)
    torch.testing.assert_close(gates, 16 * scores.gather(1, chosen))


def test_vanishing_scores_are_normalised_to_zero_not_to_nan():
    gates = gate_values(torch.zeros(2, 8), torch.tensor([[0, 1], [2, 3]]), True, 2.5, True)
    assert gates.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_are_per_row_probabilities_or_per_expert_affinities(scoring):
    logits = torch.randn(7, 5)
    expected = [scores_by_hand(row, scoring) for row in logits.tolist()]
    torch.testing.assert_close(router_scores(logits, scoring), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_routes_in_fp32(dtype):
    router = ROUTINGS["V3: 256 experts, 4 of 8 groups"].router()
    bias = router.e_score_correction_bias
    router.weight.data = router.weight.data.to(dtype)
    x = torch.randn(64, 48).to(dtype)
    logits, gates, chosen = router(x)
    assert logits.dtype == gates.dtype == router.e_score_correction_bias.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.float().T, rtol=0, atol=1e-5)
    assert torch.equal(chosen, choose_experts(logits.sigmoid(), bias, 8, "noaux_tc", 8, 4))


@ALL
def test_autocast_changes_nothing(routing):
    router, x = routing.router(), torch.randn(33, routing.hidden)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = router(x)
    for ours, reference in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()], ids=["to(bf16)", "half()"])
def test_casting_the_model_does_not_round_the_bias(cast):
    router = Routing().router()
    expected = router.e_score_correction_bias.clone()
    assert torch.equal(cast(router).e_score_correction_bias, expected)


def test_only_noaux_tc_has_a_bias_and_it_is_saved():
    assert "e_score_correction_bias" in ROUTINGS["V3 tiny"].router().state_dict()
    assert list(ROUTINGS["V2 tiny"].router().state_dict()) == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_built_in_any_dtype_has_a_bias_of_fp32_zeros(dtype):
    model = DeepseekV3Model._from_config(tiny_config("v3"), dtype=dtype)
    router = model.layers[1].mlp.gate
    assert router.weight.dtype == dtype
    assert router.e_score_correction_bias.dtype == torch.float32
    assert not router.e_score_correction_bias.any()


def test_no_tokens_are_routed_nowhere():
    logits, gates, chosen = Routing().router()(torch.empty(2, 0, 48))
    assert logits.shape == (0, 16)
    assert gates.shape == chosen.shape == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["v2", "v3", "moe16b"])
def test_it_never_waits_for_a_gpu(family):
    """Tensors without numbers cannot be asked for any, as a GPU could only after all that it was told before."""
    config = tiny_config(family)
    with torch.device("meta"):
        router = DeepseekTopkRouter(config)
        _, gates, chosen = router(torch.empty(2, 5, config.hidden_size))
    assert gates.shape == chosen.shape == (10, config.num_experts_per_tok)
