"""Balance losses and token dropping: by the papers' sums, token by token, and inside training."""

import copy

import pytest
import torch

from modeling_deepseek import DeepseekV2ForSequenceClassification
from modeling_deepseek.balance import balance_losses, within_capacity
from modeling_deepseek.cache import LatentCache
from modeling_deepseek.router import router_scores
from tiny import tiny_config, tiny_model, tiny_tokens

E, K, GROUPS, TOP_GROUPS = 8, 3, 4, 2


def routed(tokens: int, seed: int = 0, scoring: str = "sigmoid") -> tuple[torch.Tensor, torch.Tensor]:
    scores = router_scores(torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed)), scoring)
    return scores.requires_grad_(), scores.topk(K).indices


def plain_losses(scores, chosen, groups=GROUPS, top_groups=TOP_GROUPS, best=None) -> list[torch.Tensor]:
    """One sequence, by the sums of the DeepSeek-V2 paper, section 2.2.3; with `best` V3's expert-level loss (2.1.2)."""
    tokens = len(scores)
    if best is not None:
        return [
            plain_losses(scores, best, groups, top_groups)[0],
            *plain_losses(scores, chosen, groups, top_groups)[1:],
        ]
    f = [sum(float(i in row) for row in chosen.tolist()) * E / (K * tokens) for i in range(E)]
    p = [sum(scores[t, i] / scores[t].sum() for t in range(tokens)) / tokens for i in range(E)]
    size = E // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    sent = [
        sum(any(i in members[g] for i in row) for row in chosen.tolist()) * groups / (top_groups * tokens)
        for g in range(groups)
    ]
    expert = sum(f[i] * p[i] for i in range(E))
    device = sum(sum(f[i] for i in group) / size * sum(p[i] for i in group) for group in members)
    return [expert, device, sum(sent[g] * sum(p[i] for i in members[g]) for g in range(groups))]


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_losses_and_their_gradients_are_those_of_the_sums(scoring):
    scores, chosen = routed(11, scoring=scoring)
    ours = balance_losses(scores, chosen, None, GROUPS, TOP_GROUPS)
    for found, expected in zip(ours, plain_losses(scores, chosen), strict=True):
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_sequences_are_balanced_apart_and_averaged():
    (a, chosen_a), (b, chosen_b) = routed(5, 1), routed(9, 2)
    rows = torch.tensor([0] * 5 + [1] * 9)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    found = balance_losses(
        torch.cat((a, b))[order], torch.cat((chosen_a, chosen_b))[order], rows[order], GROUPS, TOP_GROUPS
    )
    apart = zip(plain_losses(a, chosen_a), plain_losses(b, chosen_b), strict=True)
    for ours, parts in zip(found, apart, strict=True):
        torch.testing.assert_close(ours, sum(parts) / 2)


def test_at_perfect_balance_every_loss_is_one():
    chosen = torch.stack([(torch.arange(4) * 2 + t) % E for t in range(E)])  # every group once, every expert alike
    for loss in balance_losses(torch.full((E, E), 0.3), chosen, None, 4, 4):
        torch.testing.assert_close(loss, torch.tensor(1.0))


def test_a_group_over_its_budget_drops_its_lowest_affinities():
    scores, chosen = routed(40, 3)
    protected = torch.arange(40) % 10 == 0
    stays = within_capacity(scores.detach(), chosen, protected, GROUPS, 0.8)
    budget, size = int(0.8 * 40 * K / GROUPS), E // GROUPS
    assert stays[protected].all()
    for group in range(GROUPS):
        inside = chosen // size == group
        affinity = scores.detach().gather(1, chosen)
        kept, dropped = affinity[inside & stays & ~protected[:, None]], affinity[inside & ~stays]
        assert (inside & stays).sum() == min(inside.sum(), max(budget, (inside & protected[:, None]).sum()))
        assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()
    assert (~stays).any()
    assert within_capacity(scores.detach(), chosen, protected, GROUPS, 100.0).all()


def collected(model, ids, **inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and choice of every router that a training forward runs, by hooks."""
    found = []
    hooks = [
        module.register_forward_hook(
            lambda m, _, out: found.append((router_scores(out[0], m.scoring_func).detach(), out[2]))
        )
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    output = model(ids, use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    return output, found


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("family", ["v2", "v3", "moe16b"])
def test_the_loss_of_a_training_model_has_its_balance_losses(family, per_sequence):
    factors = (
        dict(aux_loss_alpha=0.3)
        if family == "moe16b"
        else dict(aux_loss_alpha=0.3, device_aux_loss_alpha=0.2, comm_aux_loss_alpha=0.1)
    )
    depth = 1 if family == "v3" else 0
    model = tiny_model(family, seq_aux=per_sequence, num_nextn_predict_layers=depth, **factors).train()
    ids, mask = tiny_tokens(model.config), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3], mask[1, 8:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    output, found = collected(model, ids, attention_mask=mask, labels=labels)
    assert len(found) == 2 + depth
    expected, groups = 0, (model.config.n_group or 1, model.config.topk_group or 1)
    targets = ((labels[:, 1:] != -100) & mask[:, :-1].bool()).sum(1)
    weights = targets / targets.sum() if per_sequence else torch.ones(1)
    for scores, chosen in found:
        width = len(scores) // 2
        seen = mask[:, :width].bool() & mask[:, 10 - width :].bool()  # at the MTP depth a token is merged with the next
        rows = [(scores.view(2, width, -1)[b][seen[b]], chosen.view(2, width, -1)[b][seen[b]]) for b in range(2)]
        if not per_sequence:
            rows = [(torch.cat([s for s, _ in rows]), torch.cat([c for _, c in rows]))]
        best = [s.topk(c.shape[1]).indices if family == "v3" else None for s, c in rows]
        parts = torch.tensor(
            [[float(x) for x in plain_losses(s, c, *groups, b)] for (s, c), b in zip(rows, best, strict=True)]
        )
        expected += (weights @ parts * torch.tensor(model.config.balance_factors)).sum()
    torch.testing.assert_close(output.aux_loss.detach(), expected, rtol=1e-4, atol=1e-5)
    weighted = output.lm_loss + 0.3 * sum(output.mtp_loss or ())
    torch.testing.assert_close(output.loss, weighted + output.aux_loss)
    output.aux_loss.backward()
    assert all(m.weight.grad.abs().sum() > 0 for n, m in model.named_modules() if n.endswith("mlp.gate"))
    assert model.eval()(ids, labels=ids).aux_loss is None


def test_without_factors_nothing_is_computed(monkeypatch):
    monkeypatch.setattr("modeling_deepseek.balance.balance_losses", None)
    model = tiny_model("v3").train()
    ids = tiny_tokens(model.config)
    assert model(ids, labels=ids).aux_loss is None
    copy.deepcopy(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once_and_says_when_it_hides_the_gradient(reentrant, monkeypatch):
    said, ids = [], tiny_tokens(tiny_config("v3"))
    monkeypatch.setattr("modeling_deepseek.objective.logger.warning_once", said.append)
    found = []
    for checkpointing in (False, True):
        model = tiny_model("v3", aux_loss_alpha=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        found.append((output.aux_loss, model.model.layers[1].mlp.gate.weight.grad))
        copy.deepcopy(model)  # nothing of the graph is left in it
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6) != reentrant
    assert any("use_reentrant" in message for message in said) == reentrant


def test_parts_of_a_step_weigh_as_much_as_their_tokens():
    model = tiny_model("v3", aux_loss_alpha=0.5).train()
    ids = tiny_tokens(model.config, 4)
    whole = model(ids, labels=ids, use_cache=False).loss
    items = ids[:, 1:].numel()
    parts = [model(part, labels=part, num_items_in_batch=items, use_cache=False).loss for part in ids.split(1)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_dropping_happens_in_training_alone_and_alike_in_the_recomputation():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model("v2", moe_capacity_factor=0.5)
        ids = tiny_tokens(model.config, 4)
        expected = model(ids).logits
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        output = model(ids, labels=ids, use_cache=False)
        assert not torch.allclose(output.logits, expected, atol=1e-2)
        output.loss.backward()
        gradients.append(model.model.layers[1].mlp.experts.down_proj.grad)
        assert torch.equal(model.eval()(ids).logits, expected)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_computed_again_drops_what_its_own_pass_dropped():
    gradients = []
    for other in (False, True):
        torch.manual_seed(0)
        model = tiny_model("v2", moe_capacity_factor=0.5).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = tiny_tokens(model.config, 4), torch.ones(4, 10, dtype=torch.long)
        mask[0, 6:] = 0
        torch.manual_seed(1)
        loss = model(ids, labels=ids, use_cache=False).loss
        if other:  # as of a reference, or of a second loss
            model(ids, attention_mask=mask, labels=ids, use_cache=False)
            model.model(ids[:1], use_cache=False)
        loss.backward()
        gradients.append(model.model.layers[1].mlp.experts.down_proj.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["no labels", "a task head"])
def test_a_balance_loss_that_is_not_added_is_said_so(way, monkeypatch):
    said, model = [], tiny_model("v2", aux_loss_alpha=0.1).train()
    if way == "a task head":
        model.config.pad_token_id = 0
        model = DeepseekV2ForSequenceClassification(model.config).train()
    monkeypatch.setattr("modeling_deepseek.modeling_deepseek.logger.warning_once", said.append)
    ids = tiny_tokens(model.config, 1)
    model(ids, use_cache=False)
    assert any("balance loss" in message for message in said)
    said.clear()
    with torch.no_grad():
        model(ids, use_cache=False)
    model.config.aux_loss_alpha = 0.0
    model(ids, use_cache=False)
    assert not said


WRONG = {
    "negative": (dict(aux_loss_alpha=-0.1), "aux_loss_alpha is -0.1"),
    "no groups": (
        dict(device_aux_loss_alpha=0.1, n_group=1, topk_group=1),
        "device_aux_loss_alpha is 0.1.*n_group is 1",
    ),
    "nothing fits": (dict(moe_capacity_factor=0), "moe_capacity_factor is 0: expected more than 0"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_factors_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("v2", **fields)


@torch.no_grad()
def test_a_rollout_in_training_mode_drops_nothing():
    """TRL's GRPO generates without leaving training mode."""
    model = tiny_model("v2", moe_capacity_factor=0.1)
    ids = torch.randint(3, 97, (4, 12))
    expected = model(ids, use_cache=True).logits
    model.train()
    torch.testing.assert_close(model(ids, past_key_values=LatentCache(model.config)).logits, expected)
    assert not torch.allclose(model(ids, use_cache=False).logits, expected)
