"""`generate(..., use_mtp=True)`: the tokens of plain `generate`, whatever the drafts, the cache, the batch and the rules."""

import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor, StaticCache, StoppingCriteria
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from modeling_deepseek import DeepseekV3ForCausalLM, LatentCache
from modeling_deepseek.drafter import MTPDrafter
from modeling_deepseek.speculative import Chooser
from tiny import tiny_model, tiny_tokens

PAD, EOS = 2, 1
NEW = 24


def make(family: str = "v3", depths: int = 1, **overrides):
    """A model of so few words that drafts are often right by chance."""
    model = tiny_model(family, num_nextn_predict_layers=depths, **dict(vocab_size=7) | overrides)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    return model


def prompts(model, rows: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` `[rows, length]` padded on the left by 0, 1, 2, ... tokens, and their mask."""
    ids = tiny_tokens(model.config, rows, length, seed=seed)
    mask = (torch.arange(length) >= torch.arange(rows)[:, None] % (length - 1)).long()
    return dict(input_ids=ids.where(mask == 1, PAD), attention_mask=mask)


def both(model, inputs: dict, **options) -> tuple:
    """What `generate` gives without and with drafts."""
    options = dict(max_new_tokens=NEW, return_dict_in_generate=True) | options
    number = options.pop("num_assistant_tokens", None)
    plain = model.generate(**inputs, **options)
    return plain, model.generate(**inputs, **options, use_mtp=True, num_assistant_tokens=number)


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 8])
def test_greedy_over_200_prompts_is_greedy_without_drafts(rows, cache):
    model, accepted = make(), 0
    for seed in range(200 // rows):
        inputs = prompts(model, rows, length=2 + seed % 9, seed=seed)
        plain, drafted = both(model, inputs, max_new_tokens=8, cache_implementation=cache)
        assert torch.equal(plain.sequences, drafted.sequences), seed
        accepted += drafted.mtp_stats.accepted.sum()
    assert accepted > 20


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("number", [None, 1, 2, 5])
@pytest.mark.parametrize(("family", "depths"), [*itertools.product(("v3", "moe16b"), (1, 2, 3))])
def test_greedy_of_every_depth_and_number_of_drafts(family, depths, number, cache):
    model = make(family, depths)
    for rows in (1, 5):
        options = dict(num_assistant_tokens=number, cache_implementation=cache)
        plain, drafted = both(model, prompts(model, rows, seed=rows), **options)
        assert torch.equal(plain.sequences, drafted.sequences)


OPTIONS = {
    "one token": dict(max_new_tokens=1),
    "two tokens": dict(max_new_tokens=2),
    "without an end": dict(eos_token_id=None),
    "several ends": dict(eos_token_id=[EOS, 5]),
    "not too early": dict(min_new_tokens=9),
    "penalised": dict(repetition_penalty=1.4, no_repeat_ngram_size=3),
    "prefix function": dict(prefix_allowed_tokens_fn=lambda row, ids: [3, 4, (row + len(ids)) % 7]),
    "chunked prefill": dict(prefill_chunk_size=4),
    "max_length": dict(max_new_tokens=None, max_length=20),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rules_of_generate_hold_with_drafts(options, rows):
    model = make(depths=2)
    plain, drafted = both(model, prompts(model, rows), num_assistant_tokens=3, **options)
    assert torch.equal(plain.sequences, drafted.sequences)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_attention_implementation_takes_the_masks(attention):
    model = make()
    model.set_attn_implementation(attention)
    plain, drafted = both(model, prompts(model, 2, 5), eos_token_id=None, max_new_tokens=6)
    assert torch.equal(plain.sequences, drafted.sequences)


def test_scores_and_logits_are_those_of_the_tokens():
    model = make()
    options = dict(output_scores=True, output_logits=True, repetition_penalty=1.2, eos_token_id=None)
    plain, drafted = both(model, prompts(model, 3), num_assistant_tokens=2, **options)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(drafted[name]), torch.stack(plain[name]), rtol=0, atol=1e-4)


class AfterTwoFives(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids == 5).sum(-1) >= 2


@pytest.mark.parametrize("eos", [EOS, None])
def test_own_stopping_criteria_stop_each_row_where_they_do_without_drafts(eos):
    model = make()
    for seed in range(6):
        options = dict(stopping_criteria=[AfterTwoFives()], eos_token_id=eos, num_assistant_tokens=3)
        plain, drafted = both(model, prompts(model, 3, seed=seed), **options)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert drafted.past_key_values.get_seq_length() == drafted.sequences.shape[1] - 1


class Received(BaseStreamer):
    def __init__(self):
        self.columns, self.ended = [], False

    def put(self, value):
        self.columns.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("rows", "eos"), [(1, None), (3, None), (3, EOS)])
def test_streamers_get_the_same_pieces(rows, eos):
    model = make()
    inputs, streams = prompts(model, rows), (Received(), Received())
    for streamer, use_mtp in zip(streams, (False, True), strict=True):
        model.generate(**inputs, max_new_tokens=NEW, streamer=streamer, use_mtp=use_mtp, eos_token_id=eos)
    plain, drafted = streams
    assert len(plain.columns) == len(drafted.columns) > 5
    assert all(torch.equal(*pieces) for pieces in zip(plain.columns, drafted.columns, strict=True))
    assert drafted.ended


def test_embeddings_may_stand_for_the_prompt():
    model = make()
    inputs = prompts(model, 3)
    inputs = dict(inputs_embeds=model.get_input_embeddings()(inputs.pop("input_ids")), **inputs)
    for cache in ("dynamic", "static"):
        plain, drafted = both(model, inputs, cache_implementation=cache)
        assert torch.equal(plain.sequences, drafted.sequences)


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache, StaticCache])
def test_a_cache_that_was_given_goes_on_where_it_stopped(kind):
    model = make()
    inputs = prompts(model, 1)
    room = dict(max_cache_len=40) if kind is StaticCache else {}
    caches = [kind(config=model.config, **room) for _ in range(2)]
    first, second = (
        model.generate(**inputs, past_key_values=cache, max_new_tokens=6, use_mtp=use_mtp, eos_token_id=None)
        for cache, use_mtp in zip(caches, (False, True), strict=True)
    )
    assert torch.equal(first, second)
    assert [int(cache.get_seq_length()) for cache in caches] == [14, 14]
    longer = torch.cat((second, second[:, 3:5]), dim=1)
    plain = model.generate(longer, max_new_tokens=6, eos_token_id=None)
    drafted = model.generate(longer, past_key_values=caches[1], max_new_tokens=6, eos_token_id=None, use_mtp=True)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize(("rows", "slots"), [(1, 32), (3, 33)])
def test_a_static_cache_without_room_for_drafts_at_the_end_is_filled_to_the_brim(rows, slots):
    model = make()
    cache = StaticCache(config=model.config, max_cache_len=slots)
    options = dict(max_new_tokens=NEW, eos_token_id=None)
    drafted = model.generate(
        **prompts(model, rows), **options, past_key_values=cache, use_mtp=True, num_assistant_tokens=4
    )
    assert torch.equal(drafted, model.generate(**prompts(model, rows), **options))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_cache_that_is_returned_holds_the_tokens_that_are(rows):
    model = make()
    inputs = prompts(model, rows)
    inputs["attention_mask"][:] = 1
    result = both(model, inputs, num_assistant_tokens=3)[1]
    length = result.sequences.shape[1] - 1
    ends = (result.sequences[:, 9:] == EOS).long().cumsum(-1).cumsum(-1) > 1
    expected = LatentCache(model.config)
    with torch.no_grad():
        model(result.sequences[:, :-1], past_key_values=expected)
    assert result.past_key_values.get_seq_length() == length
    for row in range(rows):
        held = 9 + int((~ends[row]).sum()) - 1
        for ours, theirs in zip(result.past_key_values.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.keys[row, :, :held], theirs.keys[row, :, :held], rtol=0, atol=1e-4)


def test_adapters_draft_too():
    model = make()
    model = get_peft_model(model, LoraConfig(target_modules=["q_b_proj", "o_proj", "kv_b_proj", "eh_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain, drafted = both(model, prompts(model, 3))
    assert torch.equal(plain.sequences, drafted.sequences)


# --- the drafts -------------------------------------------------------------------------------------------------------


def record_drafts(monkeypatch) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Of every draft: the logits that it was chosen by, its place behind the certain tokens, and the draft."""
    found, propose = [], MTPDrafter.propose

    def recorded(self, number, states, embeds, counts, choose, position_ids=None):
        def keep(logits, place):
            found.append((logits, place, choose(logits, place)))
            return found[-1][2]

        propose(self, number, states, embeds, counts, keep, position_ids)

    monkeypatch.setattr(MTPDrafter, "propose", recorded)
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


def test_statistics_count_what_was_drafted_and_what_stands():
    model = make()
    result = both(model, prompts(model, 4), eos_token_id=None, num_assistant_tokens=2)[1]
    stats = result.mtp_stats
    assert stats.drafted.shape == stats.accepted.shape == (4,)
    assert (stats.accepted <= stats.drafted).all()
    assert stats.acceptance_rate == pytest.approx((stats.accepted.sum() / stats.drafted.sum()).item())
    alone = both(model, prompts(model, 1), eos_token_id=None)[1].mtp_stats
    # every round gives one token of the main model and the drafts that it accepted; the prompt gives the first
    rounds = NEW - 1 - alone.accepted.item()
    assert alone.drafted.item() in (rounds, rounds - 1)  # the last one has no room for a draft if one token is left


def test_a_model_whose_drafts_are_right_needs_half_the_steps(monkeypatch):
    model = make()
    with torch.no_grad():  # both say the same token whatever they read
        model.lm_head.weight.zero_()
    calls, forward = [], DeepseekV3ForCausalLM.forward
    monkeypatch.setattr(DeepseekV3ForCausalLM, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    result = model.generate(
        prompts(model, 1)["input_ids"], max_new_tokens=21, use_mtp=True, return_dict_in_generate=True
    )
    assert result.sequences.shape == (1, 30)
    assert result.mtp_stats.acceptance_rate == 1.0
    assert len(calls) == 11  # the prompt and one token, then two by two


def test_arguments_of_the_model_reach_every_forward(monkeypatch):
    model, seen, forward = make(), [], DeepseekV3ForCausalLM.forward

    def recorded(self, *args, output_router_logits=None, **kwargs):
        seen.append(output_router_logits)
        return forward(self, *args, output_router_logits=output_router_logits, **kwargs)

    recorded.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(DeepseekV3ForCausalLM, "forward", recorded)
    model.generate(prompts(model, 1)["input_ids"], max_new_tokens=8, use_mtp=True, output_router_logits=True)
    assert len(seen) > 2
    assert all(seen)


def test_no_hook_stays_behind_after_an_error():
    model = make()

    def fail(ids, scores):
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"):
        model.generate(prompts(model, 1)["input_ids"], use_mtp=True, max_new_tokens=4, logits_processor=[fail])
    assert not model.model._forward_hooks


def test_threads_may_share_a_model():
    model = make()
    inputs = [prompts(model, 1, seed=seed) for seed in range(4)]
    options = dict(max_new_tokens=16, eos_token_id=None)
    expected = [model.generate(**each, **options) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: model.generate(**each, **options, use_mtp=True), inputs))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_nothing_is_read_from_disk(monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "from_pretrained", None)
    monkeypatch.setattr(torch, "load", None)
    assert model.generate(prompts(model, 1)["input_ids"], max_new_tokens=4, use_mtp=True).shape[1] <= 13


# --- sampling ---------------------------------------------------------------------------------------------------------

DRAWS = 20_000
LEVEL = 1e-3  # of the chi-square tests: the seed is fixed, and a wrong sampler is off by orders of magnitude


class Unlike(LogitsProcessor):
    """Looks at the tokens so far, one row at a time, as built-in penalties do."""

    def __call__(self, input_ids, scores):
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -1.0))


SAMPLERS = {
    "temperature": ([TemperatureLogitsWarper(0.8)], {}),
    "top-k": ([TopKLogitsWarper(4)], {}),
    "top-p and temperature": ([TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)], {}),
    "own processor": ([Unlike()], {}),
    "recursive": ([TemperatureLogitsWarper(1.2)], dict(num_assistant_tokens=3)),
}


def next_two(model, ids: torch.Tensor, processors) -> torch.Tensor:
    """Probabilities `[V, V, V]` of the next three tokens, by enumeration."""
    texts, joint = ids, torch.ones(1)
    for _ in range(3):
        scores = model(texts).logits[:, -1]
        for processor in processors:
            scores = processor(texts, scores)
        joint = (joint[:, None] * scores.softmax(-1)).flatten()
        vocabulary = torch.arange(scores.shape[-1]).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(scores.shape[-1], 0), vocabulary), dim=1)
    return joint.view([scores.shape[-1]] * 3)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a chi-square test; what is impossible must not occur, what is rare is pooled."""
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rare = torch.stack([(x[~common]).sum() for x in (counts, expected)])
    counts, expected = torch.cat((counts[common], rare[:1])), torch.cat((expected[common], rare[1:]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2).item()


@pytest.mark.parametrize(("processors", "options"), SAMPLERS.values(), ids=SAMPLERS)
@torch.no_grad()
def test_sampled_tokens_follow_the_distribution_of_the_main_model(processors, options):
    model = make(depths=2, seed=3)
    ids = prompts(model, 1, length=3)["input_ids"]
    torch.manual_seed(0)
    result = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=True,
        top_k=0,
        num_return_sequences=DRAWS,
        logits_processor=processors,
        eos_token_id=None,
        use_mtp=True,
        return_dict_in_generate=True,
        **options,
    )
    assert 0.05 < result.mtp_stats.acceptance_rate < 0.95  # both branches are taken
    expected = next_two(model, ids, processors) * DRAWS
    first, second, third, _ = result.sequences[:, 3:].T
    counts = torch.zeros_like(expected)
    counts.index_put_((first, second, third), torch.ones(DRAWS), accumulate=True)
    for away in (2, 0):  # the first and second token, the second and third
        assert p_value(counts.sum(away).flatten(), expected.sum(away).flatten()) > LEVEL


def test_the_chi_square_test_sees_a_sampler_that_takes_every_draft():
    scores = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]]).expand(DRAWS, -1, -1)
    offered = torch.tensor([0.5, 0.3, 0.2]).expand(DRAWS, 1, -1)
    torch.manual_seed(0)
    drafts = torch.multinomial(offered[:, 0], 1)
    expected = scores[0, 0].softmax(-1) * DRAWS
    accepted, tokens = Chooser([], sample=True).judge(drafts, offered, scores)
    assert p_value(torch.bincount(tokens[:, 0], minlength=3).float(), expected) > LEVEL
    assert p_value(torch.bincount(drafts[:, 0], minlength=3).float(), expected) < LEVEL
    assert accepted.float().mean().item() == pytest.approx(
        torch.minimum(offered[0, 0], expected / DRAWS).sum().item(), abs=0.01
    )


def test_several_samples_of_a_prompt_differ():
    model = make(vocab_size=97)
    torch.manual_seed(0)
    options = dict(do_sample=True, num_return_sequences=5, max_new_tokens=12, eos_token_id=None)
    result = model.generate(prompts(model, 2)["input_ids"], use_mtp=True, **options)
    assert result.shape == (10, 21)
    assert len({tuple(row.tolist()) for row in result}) > 5


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "beams": (dict(num_beams=3), "beam_search.*num_beams"),
    "beam sampling": (dict(num_beams=3, do_sample=True), "beam_sample"),
    "prompt lookup": (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens.*drop one of the two"),
    "early exit": (dict(assistant_early_exit=1), "assistant_early_exit.*drop one of the two"),
    "no cache": (dict(use_cache=False), "drop use_cache=False or use_mtp"),
    "no drafts": (dict(num_assistant_tokens=0), "num_assistant_tokens.*at least 1, got 0"),
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), "drop output_attentions or use_mtp"),
    "quantised": (dict(cache_implementation="quantized"), "."),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mtp_cannot_be_combined_with_is_named(options, message):
    model = make()
    with pytest.raises((ValueError, ImportError), match=message):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True, **options)


def test_an_assistant_beside_mtp_is_refused():
    model = make()
    with pytest.raises(ValueError, match="use_mtp=True and assistant_model both propose tokens"):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True, assistant_model=make())


def test_a_model_without_mtp_layers_is_refused():
    model = make(depths=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0.*drop use_mtp"):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True)


@pytest.mark.parametrize(("rows", "slots"), [(1, 11), (2, 12)])
def test_a_static_cache_that_is_too_small_is_refused(rows, slots):
    model = make()
    inputs = prompts(model, rows)
    with pytest.raises(ValueError, match=f"has {slots} slots.*max_cache_len={slots + 1}"):
        model.generate(
            **inputs,
            past_key_values=StaticCache(config=model.config, max_cache_len=slots),
            max_new_tokens=4,
            use_mtp=True,
        )


def test_a_cache_that_cannot_shrink_is_refused():
    model = make()
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4) for _ in range(3)])
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer cannot: use the default cache"):
        model.generate(prompts(model, 1)["input_ids"], past_key_values=cache, max_new_tokens=4, use_mtp=True)


def test_a_static_cache_too_small_for_embeddings_is_refused():
    model = make()
    embeds = model.get_input_embeddings()(prompts(model, 1)["input_ids"])
    cache = StaticCache(config=model.config, max_cache_len=11)
    with pytest.raises(ValueError, match="max_cache_len=12"):
        model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=4, use_mtp=True)


def test_a_generation_config_may_ask_for_drafts():
    model = make()
    model.generation_config.use_mtp, model.generation_config.num_assistant_tokens = True, 2
    ids = prompts(model, 1)["input_ids"]
    result = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, eos_token_id=None)
    plain = model.generate(ids, max_new_tokens=NEW, use_mtp=False, eos_token_id=None)
    assert result.mtp_stats.drafted.item() > NEW - result.mtp_stats.accepted.item()
    assert torch.equal(result.sequences, plain)


def test_stop_strings_stop_the_small_model():
    folder = "examples/tiny-v3"
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def read(path):\n", return_tensors="pt")
    options = dict(max_new_tokens=40, do_sample=False, stop_strings=["return", "self"], tokenizer=tokenizer)
    plain = model.generate(**inputs, **options)
    assert torch.equal(plain, model.generate(**inputs, **options, use_mtp=True, num_assistant_tokens=3))
    assert plain.shape[1] < inputs["input_ids"].shape[1] + 40
