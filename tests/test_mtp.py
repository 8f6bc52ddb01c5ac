"""Multi-token prediction: targets against loops, the block against its equation, the chain of depths against single positions."""

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek.mtp import DeepseekMTPLayer, mtp_targets
from modeling_deepseek.rope import DeepseekRotaryEmbedding
from tiny import randomize, tiny_config, tiny_model, tiny_tokens


def targets_by_loop(labels: list[int], depth: int, documents: list[int]) -> list[int]:
    """Row i reads the embedding of token i + depth and predicts token i + depth + 1, within one document."""
    result = []
    for i in range(len(labels) - depth):
        j = i + depth + 1
        result.append(labels[j] if j < len(labels) and documents[i] == documents[j] else -100)
    return result


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("length", [4, 5, 12])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_targets_lie_one_token_further_per_depth(depth, length, packed):
    labels = torch.randint(0, 90, (2, length))
    labels[torch.rand(labels.shape) < 0.2] = -100
    documents = torch.tensor([[0] * 3 + [1] * (length - 3), [0] * 2 + [1] + [2] * (length - 3)])
    result = mtp_targets(labels, depth, documents if packed else None)
    ids = documents if packed else torch.zeros_like(labels)
    expected = [targets_by_loop(row.tolist(), depth, doc.tolist()) for row, doc in zip(labels, ids, strict=True)]
    assert result.shape == (2, length - depth)
    assert result.tolist() == expected


def test_targets_of_a_short_example_are_the_expected_ones():
    labels = torch.tensor([[10, 11, 12, -100, 14, 15]])
    assert mtp_targets(labels, 1).tolist() == [[12, -100, 14, 15, -100]]
    assert mtp_targets(labels, 2).tolist() == [[-100, 14, 15, -100]]
    assert mtp_targets(labels, 1, torch.tensor([[0, 0, 0, 0, 1, 1]])).tolist() == [[12, -100, -100, -100, -100]]


def test_a_row_as_short_as_the_depth_has_only_ignored_targets():
    assert mtp_targets(torch.tensor([[7, 8]]), 1).tolist() == [[-100]]
    assert mtp_targets(torch.tensor([[7, 8]]), 2).shape == (1, 0)


def test_labels_are_left_as_they_were():
    labels = torch.randint(0, 90, (2, 6))
    before = labels.clone()
    mtp_targets(labels, 1, torch.tensor([[0, 0, 0, 1, 1, 1]] * 2))
    assert torch.equal(labels, before)


def built() -> tuple[DeepseekMTPLayer, dict]:
    """A layer behind three main ones, and what its block needs for five positions."""
    config = tiny_config("v3", num_nextn_predict_layers=1)
    config._attn_implementation = "sdpa"
    layer = DeepseekMTPLayer(config, 3).eval()
    randomize(layer)
    tables = DeepseekRotaryEmbedding(config)(torch.zeros(1), torch.arange(5)[None])
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    return layer, dict(position_embeddings=tables, attention_mask=mask)


def by_equation(layer: DeepseekMTPLayer, hidden: torch.Tensor, embeds: torch.Tensor, block: dict, swapped: bool):
    halves = [layer.enorm(embeds), layer.hnorm(hidden)]
    x = torch.cat(halves[::-1] if swapped else halves, dim=-1) @ layer.eh_proj.weight.T
    x = x + layer.self_attn(layer.input_layernorm(x), **block)[0]
    return layer.shared_head.norm(x + layer.mlp(layer.post_attention_layernorm(x)))


def test_a_layer_merges_the_embedding_first_and_the_hidden_state_second():
    layer, block = built()
    hidden, embeds = torch.randn(2, 2, 5, 48)
    result = layer(hidden, inputs_embeds=embeds, **block)
    torch.testing.assert_close(result, by_equation(layer, hidden, embeds, block, swapped=False))
    assert (result - by_equation(layer, hidden, embeds, block, swapped=True)).abs().max() > 0.1


def test_a_layer_has_the_official_names_and_experts_whatever_its_index():
    layer, _ = built()
    names = layer.state_dict().keys()
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names
    assert "mlp.experts.gate_up_proj" in names
    assert layer.eh_proj.weight.shape == (48, 96)


def test_the_norms_of_a_layer_use_the_epsilon_of_the_config():
    layer = DeepseekMTPLayer(tiny_config("v3", rms_norm_eps=0.25), 3)
    norms = layer.enorm, layer.hnorm, layer.shared_head.norm, layer.input_layernorm
    assert {norm.variance_epsilon for norm in norms} == {0.25}


@pytest.mark.parametrize("family", ["moe16b", "v3"])
@pytest.mark.parametrize("depths", [1, 2])
def test_hidden_states_of_all_depths_equal_a_loop_over_positions(family, depths):
    model = tiny_model(family, "Model", num_nextn_predict_layers=depths)
    tokens = tiny_tokens(model.config, 2, 7)
    previous, embeds = model(tokens).last_hidden_state, model.embed_tokens(tokens)
    result = model.mtp_hidden_states(previous, embeds)
    assert [tuple(states.shape) for states in result] == [(2, 7 - k, 48) for k in range(1, depths + 1)]
    for k, states in enumerate(result, start=1):
        layer, expected = model.layers[3 + k - 1], []
        for i in range(7 - k):
            seen = slice(0, i + 1)  # position i sees the positions before it, at their own places
            mask = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()[None, None]
            block = dict(position_embeddings=model.rotary_emb(embeds, torch.arange(i + 1)[None]), attention_mask=mask)
            shifted = embeds[:, k : k + i + 1]
            expected.append(by_equation(layer, previous[:, seen], shifted, block, swapped=False)[:, -1])
        torch.testing.assert_close(states, torch.stack(expected, dim=1), rtol=0, atol=1e-4)
        previous = states


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_shorter_than_the_depths_has_fewer_of_them(length):
    model = tiny_model("v3", "Model", num_nextn_predict_layers=2)
    states = torch.randn(1, length, 48)
    assert [s.shape[1] for s in model.mtp_hidden_states(states, states)] == [
        n for n in (length - 1, length - 2) if n > 0
    ]


@pytest.mark.parametrize("depths", [1, 2])
def test_left_padding_changes_nothing(depths):
    model = tiny_model("v3", num_nextn_predict_layers=depths)
    tokens = tiny_tokens(model.config, 1, 7)
    padded = F.pad(tokens, (3, 0), value=2)
    mask = (torch.arange(10) >= 3).long()[None]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = model(tokens, output_mtp_logits=True).mtp_logits
    shifted = model(padded, attention_mask=mask, position_ids=places, output_mtp_logits=True).mtp_logits
    for ours, theirs in zip(shifted, plain, strict=True):
        torch.testing.assert_close(ours[:, 3:], theirs, rtol=0, atol=2e-4)


def test_mtp_layers_leave_the_main_logits_bit_identical():
    with_mtp = tiny_model("v3", num_nextn_predict_layers=2)
    without = tiny_model("v3")
    assert not without.load_state_dict(with_mtp.state_dict(), strict=False).missing_keys
    tokens = tiny_tokens(without.config)
    assert torch.equal(with_mtp(tokens).logits, without(tokens).logits)
    assert torch.equal(with_mtp(tokens, output_mtp_logits=True).logits, without(tokens).logits)


@pytest.mark.parametrize("weight", [0.3, 0.1])
@pytest.mark.parametrize("depths", [1, 2])
def test_the_training_loss_adds_lambda_over_d_times_the_losses_of_the_depths(depths, weight):
    model = tiny_model("v3", num_nextn_predict_layers=depths, mtp_loss_weight=weight).train()
    labels = tiny_tokens(model.config)
    labels[:, 3] = -100
    output = model(tiny_tokens(model.config), labels=labels, output_mtp_logits=True)
    for k, (loss, logits) in enumerate(zip(output.mtp_loss, output.mtp_logits, strict=True), start=1):
        kept = logits[:, :-1].flatten(0, 1), labels[:, k + 1 :].flatten()
        torch.testing.assert_close(loss, F.cross_entropy(*kept, ignore_index=-100))
    main = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.lm_loss, main)
    torch.testing.assert_close(output.loss, main + weight / depths * sum(output.mtp_loss))


def test_the_loss_in_eval_mode_is_that_of_the_next_token():
    model = tiny_model("v3", num_nextn_predict_layers=1)
    tokens = tiny_tokens(model.config)
    output = model(tokens, labels=tokens)
    assert output.mtp_loss is None
    torch.testing.assert_close(
        output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    )


def test_packed_documents_have_the_loss_of_their_own_rows():
    model = tiny_model("v3", num_nextn_predict_layers=1).train()
    first, second = tiny_tokens(model.config, 1, 6), tiny_tokens(model.config, 1, 5, seed=1)
    packed = torch.cat((first, second), dim=1)
    places = torch.cat((torch.arange(6), torch.arange(5)))[None]
    output = model(packed, position_ids=places, labels=packed, output_mtp_logits=True)
    logits = [model(tokens, labels=tokens, output_mtp_logits=True).mtp_logits[0] for tokens in (first, second)]
    torch.testing.assert_close(output.mtp_logits[0][:, :5], logits[0], rtol=0, atol=2e-4)
    targets = first[0, 2:], second[0, 2:]
    losses = [F.cross_entropy(row[0, :-1], t, reduction="sum") for row, t in zip(logits, targets, strict=True)]
    torch.testing.assert_close(output.mtp_loss[0], sum(losses) / (4 + 3), rtol=0, atol=2e-4)


def test_every_mtp_parameter_and_the_shared_ones_learn():
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    tokens = tiny_tokens(model.config, 4, 30)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_loss_is_zero_and_not_nan_where_no_target_is_left():
    model = tiny_model("v3", num_nextn_predict_layers=1).train()
    ids = torch.tensor([[5, 6]])
    output = model(ids, labels=ids)
    assert output.mtp_loss[0].item() == 0
    assert output.loss.isfinite()


def test_padding_on_the_left_changes_no_loss():
    model = tiny_model("v3", num_nextn_predict_layers=1).train()
    ids = torch.arange(10, 18)[None]
    padded, mask = torch.cat((torch.full((1, 3), 2), ids), dim=1), torch.tensor([[0] * 3 + [1] * 8])
    labels = torch.cat((torch.full((1, 3), -100), ids), dim=1)
    alone = model(ids, labels=ids, position_ids=torch.arange(8)[None])
    together = model(padded, labels=labels, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(together.mtp_loss[0], alone.mtp_loss[0], atol=1e-5, rtol=1e-5)
