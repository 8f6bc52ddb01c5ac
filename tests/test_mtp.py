"""Multi-token prediction: targets against loops, the block against its equation, the chain of depths against single positions."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

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


# --- the loss, against plain positions of plain documents ---------------------------------------------------------------


def documents(config, lengths=(9, 6, 4), seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels `[T]` of a few documents; a token here and there is not to be predicted."""
    found = []
    for length in lengths:
        ids = tiny_tokens(config, 1, length, seed=seed + length)[0]
        labels = ids.clone()
        labels[[0, length // 2]] = -100  # the first is nobody's target
        found.append((ids, labels))
    return found


def plain_loss(model, texts, weight: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Equations 21 to 25 of the report, position by position, each document alone: the whole loss, and that of each depth."""
    decoder, depths = model.model, model.config.num_nextn_predict_layers
    sums, counts = [0.0] * (depths + 1), [0] * (depths + 1)
    for ids, labels in texts:
        embeds, states = decoder.embed_tokens(ids)[None], decoder(ids[None], use_cache=False).last_hidden_state
        for k in range(depths + 1):
            if k:
                width = len(ids) - k
                places, mask = torch.arange(width)[None], torch.ones(width, width, dtype=torch.bool).tril()[None, None]
                block = dict(position_embeddings=decoder.rotary_emb(embeds, places), attention_mask=mask)
                layer = decoder.layers[model.config.num_hidden_layers + k - 1]
                states = by_equation(layer, states[:, :-1], embeds[:, k:], block, swapped=False)
            for i in range(len(ids) - k - 1):
                label = labels[i + k + 1]
                if label != -100:
                    sums[k] = sums[k] - model.lm_head(states[0, i]).log_softmax(-1)[label]
                    counts[k] += 1
    losses = [total / count for total, count in zip(sums, counts, strict=True)]
    return losses[0] + weight / depths * sum(losses[1:]), losses[1:]


def padded_rows(texts, side: str) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in texts)
    pads = [(width - len(ids), 0) if side == "left" else (0, width - len(ids)) for ids, _ in texts]
    rows = {
        "input_ids": torch.stack([F.pad(ids, pad, value=2) for (ids, _), pad in zip(texts, pads, strict=True)]),
        "labels": torch.stack([F.pad(labels, pad, value=-100) for (_, labels), pad in zip(texts, pads, strict=True)]),
    }
    mask = torch.stack([F.pad(torch.ones_like(ids), pad) for (ids, _), pad in zip(texts, pads, strict=True)])
    return rows | dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))


def packed_row(texts) -> dict[str, torch.Tensor]:
    labels = torch.cat([labels for _, labels in texts])
    places = torch.cat([torch.arange(len(ids)) for ids, _ in texts])
    return dict(input_ids=torch.cat([ids for ids, _ in texts])[None], labels=labels[None], position_ids=places[None])


LAYOUTS = {
    "left padding": lambda texts: padded_rows(texts, "left"),
    "right padding": lambda texts: padded_rows(texts, "right"),
    "packed": packed_row,
}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict, theirs: dict, atol: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-3, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_loss_and_gradients_are_those_of_plain_positions(depths, layout):
    model = tiny_model("v3", num_nextn_predict_layers=depths).train()
    texts = documents(model.config)
    expected, parts = plain_loss(model, texts, 0.3)
    expected.backward()
    theirs = gradients(model)
    output = model(**LAYOUTS[layout](texts), use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(output.mtp_loss), torch.stack(parts), rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model), theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(reentrant):
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    inputs = padded_rows(documents(model.config), "left")
    plain = model(**inputs, use_cache=False).loss
    plain.backward()
    theirs = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = model(**inputs, use_cache=False).loss
    again.backward()
    torch.testing.assert_close(again, plain)
    assert_same_gradients(
        gradients(model), theirs, atol=3e-6
    )  # the largest is 1.3, and they are summed in another order


def test_micro_batches_add_up_to_the_whole_batch():
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    inputs = padded_rows(documents(model.config, (9, 8, 7, 5)), "right")
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole = model(**inputs, use_cache=False, num_items_in_batch=items)
    whole.loss.backward()
    theirs, total = gradients(model), 0
    for half in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[half] for name, tensor in inputs.items()}
        loss = model(**part, use_cache=False, num_items_in_batch=items).loss
        loss.backward()
        total += loss
    torch.testing.assert_close(total, whole.loss)
    assert_same_gradients(gradients(model), theirs)


def test_adapters_on_the_mtp_layer_learn_from_its_loss():
    config = LoraConfig(target_modules=["eh_proj", "q_b_proj", "o_proj"])
    model = get_peft_model(tiny_model("v3", num_nextn_predict_layers=1), config).train()
    inputs = padded_rows(documents(model.config), "left")
    model(**inputs, use_cache=False).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".layers.3.eh_proj.lora_B" in name for name in learning)
    assert any(".layers.3.self_attn.o_proj.lora_B" in name for name in learning)
    assert any(".layers.1.self_attn.o_proj.lora_B" in name for name in learning)
    assert all("lora" in name for name in learning)


def test_parts_are_reported_in_eval_mode_when_they_are_asked_for():
    model = tiny_model("v3", num_nextn_predict_layers=2)
    inputs = padded_rows(documents(model.config), "left")
    asked, training = model(**inputs, output_mtp_logits=True), model.train()(**inputs)
    torch.testing.assert_close(torch.stack(asked.mtp_loss), torch.stack(training.mtp_loss))
    torch.testing.assert_close(asked.loss, training.lm_loss)
    assert training.mtp_logits is None


def test_a_weight_of_zero_costs_nothing(monkeypatch):
    model = tiny_model("v3", num_nextn_predict_layers=1, mtp_loss_weight=0).train()
    monkeypatch.setattr(DeepseekMTPLayer, "forward", None)
    inputs = padded_rows(documents(model.config), "left")
    output = model(**inputs)
    assert output.loss is output.lm_loss
    assert output.mtp_loss is None


def test_the_weight_can_change_between_steps():
    model = tiny_model("v3", num_nextn_predict_layers=1).train()
    inputs = padded_rows(documents(model.config), "left")
    for weight in (0.3, 0.1, 0):
        model.config.mtp_loss_weight = weight
        output = model(**inputs)
        extra = weight * output.mtp_loss[0] if weight else 0
        torch.testing.assert_close(output.loss, output.lm_loss + extra)


def test_no_logits_of_an_mtp_depth_wait_for_the_backward_pass():
    held = {}
    for depths in (0, 3):
        model = tiny_model("v3", num_nextn_predict_layers=depths).train()
        inputs, kept = padded_rows(documents(model.config), "right"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.shape) or x, lambda x: x):
            model(**inputs, use_cache=False)
        rows = inputs["labels"].numel() // 2
        held[depths] = sum(shape[-1:] == (97,) and shape.numel() > rows * 97 for shape in kept)
    assert held[3] == held[0] > 0


def test_a_text_in_several_pieces_has_the_loss_of_the_whole(monkeypatch):
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    inputs = padded_rows(documents(model.config), "right")
    whole = model(**inputs, use_cache=False)
    whole.loss.backward()
    theirs = gradients(model)
    monkeypatch.setattr("modeling_deepseek.loss.LOSS_ROWS", 5)
    pieces = model(**inputs, use_cache=False)
    pieces.loss.backward()
    torch.testing.assert_close(torch.stack(pieces.mtp_loss), torch.stack(whole.mtp_loss))
    assert_same_gradients(gradients(model), theirs)


# --- layers for a model that has none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["v3", "moe16b"])
def test_added_layers_are_saved_loaded_and_draft(family, tmp_path):
    model = tiny_model(family)
    ids = tiny_tokens(model.config)
    before = model(ids).logits
    model.add_mtp_layers(2)
    assert model.config.num_nextn_predict_layers == 2
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for ours, theirs in zip(*(m(ids, output_mtp_logits=True).mtp_logits for m in (model, again)), strict=True):
        assert torch.equal(ours, theirs)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, use_mtp=True, **options), model.generate(ids, **options))


def test_added_layers_are_initialised_as_the_model_is_and_in_its_dtype():
    model = tiny_model("v3", num_nextn_predict_layers=1).to(torch.bfloat16)
    model.add_mtp_layers()
    layer = model.model.layers[-1]
    assert len(model.model.layers) == 5
    assert layer.self_attn.layer_idx == 4
    assert layer.eh_proj.weight.dtype == torch.bfloat16
    assert layer.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert layer.mlp.experts.down_proj.float().std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert (layer.shared_head.norm.weight == 1).all()


def test_with_all_else_frozen_the_added_layers_alone_learn():
    model = tiny_model("v3")
    model.add_mtp_layers(1)
    model.requires_grad_(False)
    model.model.layers[-1:].requires_grad_(True)
    inputs, losses = padded_rows(documents(model.config), "left"), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(15):
        output = model.train()(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.mtp_loss[0].item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".layers.3." in name}


def test_added_layers_are_trained_like_those_beside_them():
    model = tiny_model("v3").train()
    model.gradient_checkpointing_enable()
    model.add_mtp_layers()
    layer, runs = model.model.layers[-1], []
    assert layer.training
    layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    ids = tiny_tokens(model.config)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(runs) == 2  # once more in the backward pass


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_number_of_layers_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="num_layers is the number of MTP layers to add"):
        tiny_model("v3").add_mtp_layers(number)


def test_merged_adapters_are_saved_with_their_mtp_layer(tmp_path):
    config = LoraConfig(target_modules=["eh_proj", "o_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(tiny_model("v3", num_nextn_predict_layers=1), config).eval()
    ids = tiny_tokens(adapted.config)
    (expected,) = adapted(input_ids=ids, output_mtp_logits=True).mtp_logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    (found,) = type(merged).from_pretrained(tmp_path)(ids, output_mtp_logits=True).mtp_logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_an_adapted_head_drops_the_same_values_in_both_passes():
    config = LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_model("v3", num_nextn_predict_layers=1), config).train()
    ids, found = tiny_tokens(model.config), []
    for asked in (False, True):  # logits that are asked for are computed once
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids, use_cache=False, output_mtp_logits=asked).mtp_loss[0].backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_depths_beyond_the_text_take_part_with_a_loss_of_zero(length):
    model = tiny_model("v3", num_nextn_predict_layers=3).train()
    ids = tiny_tokens(model.config, length=length)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    output = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False, output_mtp_logits=True)
    assert [logits.shape[1] for logits in output.mtp_logits] == [length - 1, max(0, length - 2), max(0, length - 3)]
    assert [loss.item() > 0 for loss in output.mtp_loss] == [length > 2, False, False]
    sum(output.mtp_loss).backward()
    for layer in model.model.layers[3:]:
        unused = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
        assert not unused
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_depths_behind_a_cache_that_they_cannot_see_are_refused():
    model = tiny_model("v3", num_nextn_predict_layers=1)
    ids = tiny_tokens(model.config)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 6 tokens.*drop output_mtp_logits"):
        model(ids[:, 6:], past_key_values=cache, output_mtp_logits=True)
    with pytest.raises(ValueError, match="mtp_loss_weight = 0"):
        model.train()(ids[:, 6:], past_key_values=cache, labels=ids[:, 6:])
    assert cache.get_seq_length() == 6
    model.eval()(ids[:, 6:], past_key_values=cache, labels=ids[:, 6:])


@pytest.mark.parametrize(("weight", "frozen", "warned"), [(0.3, False, True), (0.0, False, False), (0.3, True, False)])
def test_a_step_that_leaves_the_mtp_layers_untrained_says_so(weight, frozen, warned, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_deepseek.modeling_deepseek.logger.warning_once", said.append)
    model = tiny_model("v3", num_nextn_predict_layers=1, mtp_loss_weight=weight).train()
    model.model.layers[-1].requires_grad_(not frozen)
    ids = tiny_tokens(model.config)
    model(ids, labels=ids, use_cache=False)
    model(ids, use_cache=False)
    model.eval()(ids)
    assert [message.startswith("The MTP layers are trained by forward(labels=...)") for message in said] == [
        True
    ] * warned


def test_padding_is_no_target_whatever_its_labels_say():
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    ids, mask = tiny_tokens(model.config), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:], mask[1, :4] = 0, 0
    marked = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    unmarked = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    assert unmarked.mtp_loss == marked.mtp_loss


def test_labels_may_be_ignored_by_another_number_or_come_shifted():
    model = tiny_model("v3", num_nextn_predict_layers=2).train()
    ids = tiny_tokens(model.config)
    labels = ids.clone()
    labels[:, 3:6] = -100
    expected = model(ids, labels=labels, use_cache=False)
    other = model(ids, labels=labels.masked_fill(labels == -100, -1), ignore_index=-1, use_cache=False)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    given = model(ids, labels=ids, shift_labels=shifted, use_cache=False)
    for found in (other, given):
        torch.testing.assert_close(found.lm_loss, expected.lm_loss)
        torch.testing.assert_close(found.mtp_loss, expected.mtp_loss)
