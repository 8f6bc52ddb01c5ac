"""`generate(..., use_mtp=True)`: the tokens of plain `generate`, whatever the drafts, the cache, the batch and the rules."""

import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, QuantizedLayer
from transformers.generation import (
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from drafting import EOS, NEW, PAD, both, make, prompts
from modeling_deepseek import DeepseekV3ForCausalLM, LatentCache
from modeling_deepseek.speculative import Chooser

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


class Asked:
    """A `prefix_allowed_tokens_fn` that knows `texts` and fails for what cannot be asked without drafts."""

    def __init__(self, texts: list[list[int]], prompt: int):
        self.texts, self.prompt, self.rows = texts, prompt, set()

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        self.rows.add(row)
        text = ids.tolist()[self.prompt :]
        if EOS in text:
            assert set(text[text.index(EOS) + 1 :]) <= {PAD}
            return [PAD]
        allowed = sorted({known[len(text)] for known in self.texts if known[: len(text)] == text})
        assert allowed, text
        return allowed


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_prefix_function_is_asked_only_about_texts_that_can_occur(rows, number):
    model, random = make(), Random(0)
    texts = [[*text[: random.randint(1, 5)], EOS] for text in itertools.product((3, 4, 5, 6), repeat=5)]
    for seed in range(6):
        asked = Asked(texts, 9)
        plain, drafted = both(model, prompts(model, rows, seed=seed), prefix_allowed_tokens_fn=asked)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert asked.rows == set(range(rows))


class Watched(LogitsProcessor):
    """Keeps what it is asked about, row by row. It may rely on a tensor of its own."""

    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids.view(-1).view(input_ids.shape).tolist())
        return scores


class StopAt(StoppingCriteria):
    """Like an end-of-sequence rule of one's own, and with another type for the ends."""

    eos_token_id = [5]

    def __init__(self):
        self.watched = Watched()

    def __call__(self, input_ids, scores, **kwargs):
        self.watched(input_ids, scores)
        return input_ids[:, -1] == 5


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.2), dict(do_sample=True, top_k=0)])
def test_alone_a_row_asks_what_it_asks_without_drafts(options):
    model, count = make(), 0
    for seed in range(6):
        calls = []
        for use_mtp in (False, True):
            torch.manual_seed(0)
            watched, stop = Watched(), StopAt()
            result = model.generate(
                prompts(model, 1, seed=seed)["input_ids"].int(),
                max_new_tokens=12,
                logits_processor=[watched],
                stopping_criteria=[stop],
                eos_token_id=None,
                use_mtp=use_mtp,
                **options,
            )
            calls.append((watched.texts, stop.watched.texts))
            texts = [[result[0, :length].tolist()] for length in range(9, result.shape[1] + 1)]
            assert calls[-1] == (texts[:-1], texts[1:])
        if "do_sample" not in options:
            assert calls[0] == calls[1]
        count += len(calls[1][0])
    assert count > 12


def test_rows_ask_what_they_would_alone():
    model, watched, stop = make(), Watched(), StopAt()
    options = dict(logits_processor=[watched], stopping_criteria=[stop], num_assistant_tokens=3)
    result = model.generate(**prompts(model, 4, seed=1), max_new_tokens=NEW, use_mtp=True, **options)
    asked = {row: [] for row in range(4)}
    for texts in watched.texts:
        for row, text in enumerate(texts):
            generated = result[row, : len(text)].tolist()
            own = next((n for n in range(9, len(text) + 1) if text[n:] == [PAD] * (len(text) - n)), len(text))
            assert text[:own] == generated[:own]
            asked[row].append(own)
    assert all(set(range(9, result.shape[1])) >= set(lengths) for lengths in asked.values())


def test_guidance_works_for_one_row():
    model = make(depths=2)
    for seed in range(4):
        options = dict(guidance_scale=1.5, eos_token_id=None, num_assistant_tokens=3)
        plain, drafted = both(model, prompts(model, 1, seed=seed), **options)
        assert torch.equal(plain.sequences, drafted.sequences)


def test_a_watermark_of_one_row_is_asked_about_every_token_once(monkeypatch):
    model, asked = make(vocab_size=97), []
    call = SynthIDTextWatermarkLogitsProcessor.__call__
    monkeypatch.setattr(
        SynthIDTextWatermarkLogitsProcessor,
        "__call__",
        lambda self, ids, scores: asked.append(ids.tolist()) or call(self, ids, scores),
    )
    config = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    options = dict(do_sample=True, watermarking_config=config, eos_token_id=None, max_new_tokens=12)
    result = model.generate(prompts(model, 1)["input_ids"], use_mtp=True, **options)
    assert asked == [result[:, :length].tolist() for length in range(9, 21)]


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


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_prompts_go_on_from_their_last_document(rows):
    model = make(depths=2)
    positions = torch.cat((torch.arange(4), torch.arange(5))).expand(rows, -1).contiguous()
    positions[0] = torch.cat((torch.arange(6), torch.arange(3)))
    for seed in range(8):
        inputs = dict(input_ids=prompts(model, 8, seed=seed)["input_ids"][:rows].clamp(min=3), position_ids=positions)
        found = []
        for options in ({}, dict(prefill_chunk_size=4), dict(cache_implementation="static")):
            found += both(model, inputs, num_assistant_tokens=3, eos_token_id=None, **options)
        assert all(torch.equal(found[0].sequences, each.sequences) for each in found), seed


TUNING = {
    "prefix": ("moe16b", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prompt": ("v3", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "encoder": ("v3", lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("family", "config"), TUNING.values(), ids=TUNING)
def test_tuned_prompts_are_read_like_without_drafts(family, config, rows):
    torch.manual_seed(0)
    model = get_peft_model(make(family, depths=2), config()).eval()
    for seed in range(6):
        options = dict(num_assistant_tokens=3, eos_token_id=[EOS, None][seed % 2])
        plain, drafted = both(model, prompts(model, rows, seed=seed), **options)
        assert torch.equal(plain.sequences, drafted.sequences), seed
    assert drafted.mtp_stats.drafted.sum() > 0


def test_adapters_draft_too():
    model = make()
    model = get_peft_model(model, LoraConfig(target_modules=["q_b_proj", "o_proj", "kv_b_proj", "eh_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain, drafted = both(model, prompts(model, 3))
    assert torch.equal(plain.sequences, drafted.sequences)


# --- what is reported, and what is called ---------------------------------------------------------------


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


class AtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("length", [10, 11, 12, 13, 20])
def test_what_lies_behind_the_end_is_not_counted(length, eos):
    model = make()
    with torch.no_grad():  # all drafts are right
        model.lm_head.weight.zero_()
    options = dict(eos_token_id=eos, stopping_criteria=[AtLength(length)], num_assistant_tokens=4)
    plain, drafted = both(model, prompts(model, 2), **options)
    assert torch.equal(plain.sequences, drafted.sequences)
    generated = drafted.sequences.shape[1] - 9  # the prompt gives one, every round four drafts and one more
    expected = [generated - 1 - (generated - 1) // 5] * 2
    assert drafted.mtp_stats.drafted.tolist() == drafted.mtp_stats.accepted.tolist() == expected


def test_rows_that_end_early_count_what_they_have():
    model, unequal = make(vocab_size=4), 0
    for seed in range(8):
        result = both(model, prompts(model, 4, seed=seed), num_assistant_tokens=3)[1]
        ends = (result.sequences[:, 9:] == EOS).long().cumsum(1).cumsum(1)
        lengths, stats = (ends <= 1).sum(1), result.mtp_stats
        unequal += len(set(lengths.tolist())) > 1
        assert (stats.accepted <= lengths - 1).all()
        assert (stats.drafted <= 3 * (lengths - 1)).all()
        assert (stats.drafted - stats.accepted <= 3 * lengths).all()
    assert unequal > 3


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
    accepted, tokens = Chooser([], sample=True, rows=DRAWS).judge(drafts, offered, scores)
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
    "ensemble": (dict(assistant_ensemble_weight=0.5), "assistant_ensemble_weight is for other ones"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mtp_cannot_be_combined_with_is_named_before_anything_is_computed(options, message):
    model, calls = make(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True, **options)
    assert not calls


WATERMARK = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
STATEFUL = {
    "watermark": (dict(watermarking_config=WATERMARK, do_sample=True), "SynthID.*drop watermarking_config or use_mtp"),
    "guidance": (dict(guidance_scale=1.5), "UnbatchedClassifierFree.* 2 rows.*drop guidance_scale or use_mtp"),
}


@pytest.mark.parametrize(("options", "message"), STATEFUL.values(), ids=STATEFUL)
def test_processors_with_a_memory_are_refused_beside_several_rows(options, message):
    model, calls = make(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(model, 2), max_new_tokens=3, use_mtp=True, **options)
    assert not calls


def test_chunks_of_a_tuned_prompt_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(make(), config).eval()
    with pytest.raises(ValueError, match="prefill_chunk_size=4 puts a tuned prompt before every chunk"):
        model.generate(**prompts(model, 1), max_new_tokens=4, use_mtp=True, prefill_chunk_size=4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_are_refused(kind):
    factors = dict(long_factor=[1.0] * 4, short_factor=[1.0] * 4) if kind == "longrope" else {}
    model = make(rope_scaling=dict(rope_type=kind, factor=2.0, original_max_position_embeddings=64, **factors))
    with pytest.raises(ValueError, match=f"rope_type '{kind}' changes them: drop use_mtp"):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True)


def test_a_quantised_cache_is_refused():
    model = make()
    cache = Cache(layers=[Unquantised(residual_length=4) for _ in range(3)])
    with pytest.raises(ValueError, match="Unquantised cannot: use the default cache"):
        model.generate(prompts(model, 1)["input_ids"], past_key_values=cache, max_new_tokens=4, use_mtp=True)


def test_an_assistant_beside_mtp_is_refused():
    model = make()
    with pytest.raises(ValueError, match="use_mtp=True drafts by itself, and assistant_model"):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True, assistant_model=make())


def test_a_model_without_mtp_layers_is_refused():
    model = make(depths=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0.*drop use_mtp"):
        model.generate(prompts(model, 1)["input_ids"], max_new_tokens=3, use_mtp=True)


@pytest.mark.parametrize(("rows", "slots", "needed"), [(1, 11, 12), (2, 12, 13), (1, 5, 12)])
def test_a_static_cache_that_is_too_small_is_refused_before_it_is_filled(rows, slots, needed):
    model = make()
    cache = StaticCache(config=model.config, max_cache_len=slots)
    with pytest.raises(ValueError, match=f"has {slots} slots.*max_cache_len={needed}"):
        model.generate(**prompts(model, rows), past_key_values=cache, max_new_tokens=4, use_mtp=True)
    assert int(cache.get_seq_length()) == 0


def test_a_limit_that_is_never_reached_takes_no_memory():
    model = make()
    options = dict(max_new_tokens=10**12, stopping_criteria=[AtLength(40)], eos_token_id=None)
    plain, drafted = both(model, prompts(model, 2), **options)
    assert torch.equal(plain.sequences, drafted.sequences)


class Unquantised(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


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


def test_no_position_is_beyond_what_the_rows_may_have(monkeypatch):
    said = []
    monkeypatch.setattr("modeling_deepseek.modeling_deepseek.logger.warning_once", said.append)
    for seed in range(4):
        model = make(max_position_embeddings=30)
        options = dict(max_length=30, max_new_tokens=None, eos_token_id=None, num_assistant_tokens=6)
        both(model, prompts(model, 3, seed=seed), **options)
    assert not said


def test_stop_strings_stop_the_small_model():
    folder = "examples/tiny-v3"
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def read(path):\n", return_tensors="pt")
    options = dict(max_new_tokens=40, do_sample=False, stop_strings=["return", "self"], tokenizer=tokenizer)
    plain = model.generate(**inputs, **options)
    assert torch.equal(plain, model.generate(**inputs, **options, use_mtp=True, num_assistant_tokens=3))
    assert plain.shape[1] < inputs["input_ids"].shape[1] + 40
