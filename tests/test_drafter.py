"""The drafts of the MTP layers: each is what its depth predicts by the report, whatever the rows beside it do."""

from contextlib import contextmanager

import pytest
import torch

from drafting import NEW, make, prompts
from modeling_deepseek.speculative import _Referee


def record_drafts(monkeypatch) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Of every draft: the logits that it was chosen by, its place behind the certain tokens, and the draft."""
    found, draft = [], _Referee.draft

    def recorded(self, logits, place):
        found.append((logits, place, draft(self, logits, place)))
        return found[-1][2]

    monkeypatch.setattr(_Referee, "draft", recorded)
    return found


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("family", ["v3", "moe16b"])
def test_drafts_are_what_the_chain_of_depths_predicts(family, depths, monkeypatch):
    model, found = make(family, depths, vocab_size=5), record_drafts(monkeypatch)
    ids = prompts(model, 1)["input_ids"]
    result = model.generate(ids, max_new_tokens=NEW, use_mtp=True, eos_token_id=None, return_dict_in_generate=True)
    assert result.mtp_stats.accepted.sum() > 0
    rounds, known = [found[i : i + depths] for i in range(0, len(found), depths)], 10
    for drafts in rounds[:-1]:
        for logits, place, _ in drafts:
            text = torch.cat((result.sequences[:, :known], *(draft[None] for _, _, draft in drafts[:place])), dim=1)
            with torch.no_grad():
                expected = model(text, output_mtp_logits=True).mtp_logits[place][:, known - 2]
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
        following = result.sequences[0, known : known + depths].tolist()
        right = [draft.item() == token for (_, _, draft), token in zip(drafts, following, strict=False)]
        known += 1 + (right.index(False) if False in right else depths)


def test_behind_the_last_depth_its_layer_reads_its_own_state(monkeypatch):
    model, found = make(), record_drafts(monkeypatch)
    ids = prompts(model, 1)["input_ids"]
    result = model.generate(ids, max_new_tokens=8, use_mtp=True, num_assistant_tokens=3, eos_token_id=None)
    decoder, layer = model.model, model.model.layers[-1]
    tokens = torch.cat((result[0, 1:10], *(draft for _, _, draft in found[:2])))
    with torch.no_grad():
        states = decoder(ids).last_hidden_state
        for logits, place, _ in found[:3]:
            length = states.shape[1]
            places, mask = torch.arange(length)[None], torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            embeds = decoder.embed_tokens(tokens[None, : 9 + place])
            out = layer(states, embeds, position_embeddings=decoder.rotary_emb(embeds, places), attention_mask=mask)
            torch.testing.assert_close(logits, model.lm_head(out[:, -1]), rtol=0, atol=2e-4)
            states = torch.cat((states, out[:, -1:]), dim=1)


def test_rows_draft_as_they_would_alone(monkeypatch):
    model, found = make(depths=2), record_drafts(monkeypatch)
    inputs = prompts(model, 3, seed=5)
    options = dict(max_new_tokens=NEW, eos_token_id=None, use_mtp=True, return_dict_in_generate=True)
    together = model.generate(**inputs, **options)
    drafts = [logits for logits, _, _ in found]
    assert len(set(together.mtp_stats.accepted.tolist())) > 1
    for row in range(3):
        found.clear()
        alone = model.generate(inputs["input_ids"][row : row + 1, row:], **options)
        assert torch.equal(alone.sequences[0], together.sequences[row, row:])
        for (own, _, _), beside in zip(found[:20], drafts, strict=False):
            torch.testing.assert_close(own[0], beside[row], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["v3", "moe16b"])
def test_behind_a_given_cache_the_layers_read_what_is_new_at_its_positions(family, monkeypatch):
    model, found = make(family, vocab_size=5), record_drafts(monkeypatch)
    first = model.generate(
        prompts(model, 1, seed=1)["input_ids"], max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
    )
    past, longer = 12, torch.cat((first.sequences, torch.tensor([[3, 1, 3]])), dim=1)
    options = dict(past_key_values=first.past_key_values, max_new_tokens=16, eos_token_id=None, use_mtp=True)
    result = model.generate(longer, **options, return_dict_in_generate=True)
    decoder, known = model.model, longer.shape[1] + 1
    assert result.mtp_stats.accepted.sum() > 0
    for logits, _, draft in found:
        with torch.no_grad():
            states = decoder(result.sequences[:, : known - 1]).last_hidden_state[:, past:]
            embeds = decoder.embed_tokens(result.sequences[:, past + 1 : known])
            length = states.shape[1]
            out = decoder.layers[-1](
                states,
                embeds,
                position_embeddings=decoder.rotary_emb(embeds, torch.arange(past, past + length)[None]),
                attention_mask=torch.ones(length, length, dtype=torch.bool).tril()[None, None],
            )
        torch.testing.assert_close(logits, model.lm_head(out[:, -1]), rtol=0, atol=2e-4)
        known += 1 + int(known < result.sequences.shape[1] and draft.item() == result.sequences[0, known])


def test_in_chunks_the_layers_read_the_same_prompt(monkeypatch):
    model, found = make(depths=3), record_drafts(monkeypatch)
    widths, inputs = [], prompts(model, 3, length=23)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *seen: widths.append(seen[-1].shape[1]))
    logits = []
    for size in (None, 7):
        widths.clear()
        model.generate(**inputs, max_new_tokens=5, eos_token_id=None, use_mtp=True, prefill_chunk_size=size)
        logits.append(torch.stack([each for each, _, _ in found]))
        found.clear()
    torch.testing.assert_close(*logits, rtol=0, atol=2e-4)
    assert max(widths) == 7


def test_the_prompt_is_read_before_experts_are_set_up_for_few_tokens(monkeypatch):
    model, seen, active = make(depths=2), [], []

    @contextmanager
    def few_tokens():
        active.append(True)
        yield
        active.clear()

    monkeypatch.setattr(model, "_optimize_model_for_decode", few_tokens)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *call: seen.append((call[-1].shape[1], bool(active))))
    model.generate(prompts(model, 1)["input_ids"], max_new_tokens=8, eos_token_id=None, use_mtp=True)
    assert {width for width, few in seen if not few} == {9}
    assert max(width for width, few in seen if few) < 9
    assert not active
