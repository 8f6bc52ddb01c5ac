"""How a step is cut up does not matter: packed, padded on either side, in micro-batches; with every loss on, in all families."""

import pytest
import torch

from modeling_deepseek.load_balance import ExpertLoad
from test_mtp import assert_same_gradients, documents, gradients, packed_row, padded_rows
from test_training import trained
from tiny import tiny_model

LENGTHS = (9, 6, 4, 1)  # the last is shorter than the MTP depths: it has no target, and no token at them
GROUPS = dict(device_aux_loss_alpha=0.2, comm_aux_loss_alpha=0.1)
LOSSES = {
    "moe16b": dict(aux_loss_alpha=0.3),
    "v2": dict(aux_loss_alpha=0.3, **GROUPS),
    "v3": dict(aux_loss_alpha=0.3, **GROUPS, num_nextn_predict_layers=2),
}


def batches(texts) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The same texts as batches of one step, in every form."""
    return {
        "right padding": [padded_rows(texts, "right")],
        "left padding": [padded_rows(texts, "left")],
        "packed": [packed_row(texts)],
        "two packed rows": [packed_row(texts[:2]), packed_row(texts[2:])],
        "padded micro-batches": [padded_rows(texts[:1], "right"), padded_rows(texts[1:], "left")],
        "separate": [packed_row([text]) for text in texts],
    }


def step(model, parts) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss, the share of the balance losses in it, and gradients, of what Trainer does in an optimiser step."""
    items = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
    loss, balance = 0, 0
    for part in parts:
        output = model(**part, use_cache=False, num_items_in_batch=items)
        output.loss.backward()
        mtp = sum(output.mtp_loss or ())
        depths = max(1, model.config.num_nextn_predict_layers)
        loss = loss + output.loss.detach()
        balance = balance + (output.loss - output.lm_loss - model.config.mtp_loss_weight / depths * mtp).detach()
    return loss, balance, gradients(model)


@pytest.mark.parametrize("family", LOSSES)
def test_the_form_of_a_step_changes_neither_loss_nor_gradients(family):
    model = tiny_model(family, **LOSSES[family]).train()
    texts = documents(model.config, LENGTHS)
    expected = None
    for parts in batches(texts).values():
        found = step(model, parts)
        expected = expected or found
        assert found[1] > 0.2
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        assert_same_gradients(found[2], expected[2], atol=1e-5)


def test_the_form_of_a_step_changes_no_load():
    model, expected = tiny_model("v3", num_nextn_predict_layers=2).train(), None
    texts = documents(model.config, LENGTHS)
    for parts in batches(texts).values():
        load = ExpertLoad(model)
        for part in parts:
            model(**part, use_cache=False)
        load.detach()
        counts = torch.stack(list(load.counts.values()))
        expected = counts if expected is None else expected
        assert torch.equal(counts, expected)
    tokens = [sum(max(0, length - depth) for length in LENGTHS) for depth in (0, 0, 1, 2)]
    assert (expected.sum(1) == 3 * torch.tensor(tokens)).all()


@pytest.mark.parametrize("family", ["moe16b", "v3"])
def test_trainer_accumulates_to_the_large_batch(tmp_path, family):
    found = []
    for size in (8, 2):
        model = tiny_model(family, **LOSSES[family])
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, logging_steps=1)
        _, seen = trained(tmp_path / str(size), model=model, steps=3, save_strategy="no", **options)
        found.append([log["loss"] for log in seen.logs if "loss" in log])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], abs=1e-5)
