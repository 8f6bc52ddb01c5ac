"""Tokens in the order of their experts."""

import torch

from modeling_deepseek.dispatch import experts_at_once, sorted_by_expert


def test_tokens_are_sorted_by_expert():
    tokens, places, counts = sorted_by_expert(torch.tensor([[3, 0], [4, 3], [0, 4]]), 4)
    assert (tokens.tolist(), places.tolist()) == ([0, 2, 0, 1, 1, 2], [1, 4, 0, 3, 2, 5])
    assert counts == [2, 0, 0, 2]  # 4: served elsewhere


def test_tokens_of_one_expert_keep_their_order():
    tokens, places, counts = sorted_by_expert(torch.randint(4, (3000, 2)), 4)
    for own, at in zip(tokens.split(counts), places.split(counts), strict=True):
        assert (own.diff() >= 0).all() and (at.diff() > 0).all()


def test_what_experts_answer_in_bf16_is_summed_in_fp32():
    """1 and 255 times 1/256: in bf16 the sum of the small ones would be lost."""
    states, gates = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 256, dtype=torch.bfloat16)
    answers = torch.full((256, 1), 1 / 256, dtype=torch.bfloat16)
    answers[0] = 1
    output = experts_at_once(
        states, torch.arange(256)[None], gates, 256, lambda *_: answers, lambda x: x, lambda x, *_: x
    )
    assert output.dtype == torch.bfloat16 and output.item() == 2


def test_all_experts_at_once_are_one_after_another():
    torch.manual_seed(0)
    states, up, down = torch.randn(5, 6), torch.randn(4, 8, 6), torch.randn(4, 6, 8)
    chosen, gates = torch.tensor([[0, 2], [2, 4], [4, 4], [3, 2], [0, 3]]), torch.rand(5, 2)

    def product(weights):
        def meet(x, experts, starts):
            assert len(starts) == len(experts) + 1 and starts[-1] == len(x)
            return torch.cat([x[starts[i] : starts[i + 1]] @ weights[expert].T for i, expert in enumerate(experts)])

        return meet

    output = experts_at_once(states, chosen, gates, 4, product(up), torch.tanh, product(down))
    expected = torch.zeros(5, 6)
    for token in range(5):
        for expert, gate in zip(chosen[token].tolist(), gates[token], strict=True):
            if expert < 4:
                expected[token] += gate * (down[expert] @ torch.tanh(up[expert] @ states[token]))
    torch.testing.assert_close(output, expected)
    assert experts_at_once(states, chosen, gates, 4, lambda *_: None, torch.tanh, product(down)) is None
    assert experts_at_once(states, chosen, gates, 4, product(up), torch.tanh, lambda *_: None) is None
