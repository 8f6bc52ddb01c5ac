"""Whole models at work: every way to generate, every kind of cache, packed rows, outputs and switches."""

import copy
import itertools
import logging

import pytest
import torch
from torch.nn import functional as F
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from modeling_deepseek import LatentCache
from tiny import tiny_config, tiny_model, tiny_tokens

LITE = dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
MODELS = {
    "llm": ("llm", {}),
    "v2_lite": ("v2", LITE),
    "v3": ("v3", dict(num_nextn_predict_layers=1)),
}
MLA = ("v2_lite", "v3")
NEW = 12


def make(name: str, **overrides):
    """A tiny model that never says that it is done, so that all outputs have the length asked for."""
    family, fields = MODELS[name]
    model = tiny_model(family, **fields | overrides)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture(params=MLA)
def mla_model(request):
    return make(request.param)


def dynamic_cache(model) -> DynamicCache:
    """transformers' cache, which grows by concatenation and knows nothing of ours."""
    return DynamicCache(config=model.config)


def prompts(model, batch: int = 2, length: int = 10) -> torch.Tensor:
    return tiny_tokens(model.config, batch, length)


@torch.no_grad()
def logits_of(model, tokens, **kwargs) -> torch.Tensor:
    return model(tokens, **kwargs).logits


@torch.no_grad()
def greedy_by_full_forwards(model, tokens: torch.Tensor, new: int = NEW) -> torch.Tensor:
    for _ in range(new):
        tokens = torch.cat((tokens, logits_of(model, tokens, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return tokens


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within fp32 rounding of logits that reach about 10."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- decoding strategies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_with_cache_is_greedy_by_full_forwards(model, attention):
    model.set_attn_implementation(attention)
    tokens = prompts(model)
    expected = greedy_by_full_forwards(model, tokens)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False), expected)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False, use_cache=False), expected)


@pytest.mark.parametrize("mla_mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", MLA)
def test_greedy_is_the_same_in_every_mla_mode(name, mla_mode):
    tokens = prompts(make(name))
    expected = make(name).generate(tokens, max_new_tokens=NEW, do_sample=False)
    forced = make(name, mla_mode=mla_mode).generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(forced, expected)


STRATEGIES = {
    "beams": dict(num_beams=3, do_sample=False),
    "all_beams": dict(num_beams=4, num_return_sequences=4, length_penalty=0.5, do_sample=False),
    "beam_sampling": dict(num_beams=3, do_sample=True, num_return_sequences=2),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "several_samples": dict(do_sample=True, num_return_sequences=3, top_p=0.9),
    "penalised": dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_do_not_depend_on_the_cache(model, strategy):
    tokens, options = prompts(model), STRATEGIES[strategy] | dict(max_new_tokens=NEW, return_dict_in_generate=True)
    found = []
    for cache in ({}, dict(past_key_values=dynamic_cache(model)), dict(use_cache=False)):
        torch.manual_seed(1)
        found.append(model.generate(tokens, **options, **cache).sequences)
    assert found[0].shape == (2 * options.get("num_return_sequences", 1), 10 + NEW)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def count_calls(monkeypatch, model) -> list[int]:
    """Lengths of the inputs that `model.forward` will get."""
    lengths, forward = [], model.forward

    def counted(input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return lengths


def test_prompt_lookup_is_greedy_in_fewer_steps(model, monkeypatch):
    # a prompt that quotes its own continuation: the drafts are right at first, then wrong
    start = prompts(model, batch=1, length=4)
    tokens = torch.cat((greedy_by_full_forwards(model, start, new=8), start), dim=1)
    expected = greedy_by_full_forwards(model, tokens, new=20)
    lengths = count_calls(monkeypatch, model)
    found = model.generate(tokens, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert max(lengths[1:]) > 1


@pytest.mark.parametrize("disagreement", [0.0, 0.05, 10.0])
def test_assisted_decoding_is_greedy(model, disagreement):
    """With an assistant that agrees always, mostly, never: the cache is cropped by none, some, all of the draft."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(3)
        assistant.lm_head.weight += disagreement * torch.randn_like(assistant.lm_head.weight)
    tokens = prompts(model, batch=1)
    found = model.generate(tokens, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, greedy_by_full_forwards(model, tokens, new=20))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_batch_equals_one_by_one(model, use_cache, attention):
    model.set_attn_implementation(attention)
    rows = [prompts(model, batch=1, length=length) for length in (9, 5, 2)]
    batch = torch.cat([F.pad(row, (9 - row.shape[1], 0), value=2) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
    options = dict(max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    found = model.generate(batch, attention_mask=mask, **options)
    for row, sequence in zip(rows, found, strict=True):
        assert torch.equal(sequence[9:], model.generate(row, **options)[0, row.shape[1] :])


def test_generation_from_embeddings(model):
    tokens = prompts(model)
    expected = model.generate(tokens, max_new_tokens=NEW, do_sample=False)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False), expected[:, 10:])


# --- caches ---------------------------------------------------------------------------------------------------------


def test_the_default_cache(model):
    latent = hasattr(model.config, "kv_lora_rank")
    tokens = prompts(model)
    generated = model.generate(tokens, max_new_tokens=3, return_dict_in_generate=True)
    for cache in (generated.past_key_values, model(tokens, use_cache=True).past_key_values):
        assert type(cache) is (LatentCache if latent else DynamicCache)
        assert len(cache) == model.config.num_hidden_layers


def test_latent_cache_holds_only_latents(mla_model):
    config = mla_model.config
    cache = mla_model.generate(prompts(mla_model), max_new_tokens=3, return_dict_in_generate=True).past_key_values
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.get_seq_length() == 12
    assert cache.nbytes == 2 * 12 * width * config.num_hidden_layers * 4
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 12, config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 12, config.qk_rope_head_dim)


@pytest.mark.parametrize("steps", [(4, 4, 2), (1,) * 10, (9, 1), (3, 7)], ids=str)
def test_chunked_prefill_by_hand(model, steps):
    tokens = prompts(model)
    expected, cache, start = logits_of(model, tokens, use_cache=False), None, 0
    for length in steps:
        with torch.no_grad():
            output = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True)
        assert_close(output.logits, expected[:, start : start + length])
        cache, start = output.past_key_values, start + length
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_prefill_chunk_size(model, chunk, kind):
    tokens = prompts(model)
    expected = model.generate(tokens, max_new_tokens=NEW, do_sample=False)
    options = dict(max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk, cache_implementation=kind)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_a_cache_goes_from_call_to_call(model):
    """A conversation: each turn adds tokens behind those that the cache already holds."""
    conversation, cache = prompts(model), None
    for turn in range(3):
        fresh = model.generate(conversation, max_new_tokens=5, do_sample=False)
        found = model.generate(
            conversation, past_key_values=cache, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(found.sequences, fresh)
        cache = found.past_key_values
        conversation = torch.cat((fresh, tiny_tokens(model.config, 2, 4, seed=turn + 1)), dim=1)


def test_a_copied_cache_serves_many_continuations(model):
    """What one continuation appends in place must not show in another."""
    tokens = prompts(model)
    with torch.no_grad():
        prefix = model(tokens[:, :6], use_cache=True).past_key_values
    for seed in (1, 2):
        continued = torch.cat((tokens[:, :6], tiny_tokens(model.config, 2, 3, seed)), dim=1)
        expected = model.generate(continued, max_new_tokens=NEW, do_sample=False)
        options = dict(max_new_tokens=NEW, do_sample=False, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(model.generate(continued, **options), expected)
    assert prefix.get_seq_length() == 6


@pytest.mark.parametrize("options", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
def test_static_cache_equals_dynamic(model, options):
    tokens, options = prompts(model), options | dict(max_new_tokens=NEW, do_sample=False)
    static = model.generate(tokens, cache_implementation="static", return_dict_in_generate=True, **options)
    assert isinstance(static.past_key_values, StaticCache)
    assert torch.equal(static.sequences, model.generate(tokens, **options))


def test_static_cache_with_a_left_padded_batch(model):
    tokens, mask = prompts(model), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        model.generate(tokens, cache_implementation="static", **options), model.generate(tokens, **options)
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("steps", [(6, 1, 3), (10,)], ids=str)
def test_static_cache_by_hand(model, steps, attention):
    """Without an `attention_mask`, and with room behind the tokens held."""
    model.set_attn_implementation(attention)
    tokens, cache, start = prompts(model), StaticCache(config=model.config, max_cache_len=16), 0
    expected = logits_of(model, tokens, use_cache=False)
    for length in steps:
        found = logits_of(model, tokens[:, start : start + length], past_key_values=cache, use_cache=True)
        assert_close(found, expected[:, start : start + length])
        start += length


# The whole model through the graph capture of torch.compile, one layer of it through code generation as well.
COMPILED = {
    "llm": ("llm", "aot_eager", torch.float32, {}),
    "v2_lite": ("v2_lite", "aot_eager", torch.float32, {}),
    "v3": ("v3", "aot_eager", torch.float32, {}),
    "v3-bf16": ("v3", "aot_eager", torch.bfloat16, {}),
    "v3-one-layer-inductor": (
        "v3",
        "inductor",
        torch.float32,
        dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0),
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_static_cache_under_torch_compile(case):
    """`generate` compiles the decoding step as one graph."""
    name, backend, dtype, fields = COMPILED[case]
    model = make(name, experts_implementation="batched_mm", **fields).to(dtype)
    tokens, options = prompts(model), dict(max_new_tokens=6, do_sample=False, cache_implementation="static")
    expected = model.generate(tokens, **options)
    compiling = CompileConfig(fullgraph=True, mode=None, backend=backend)
    compiling._compile_all_devices = True  # otherwise transformers compiles on accelerators only
    found = model.generate(tokens, compile_config=compiling, **options)
    torch.compiler.reset()
    assert torch.equal(found, expected)


def test_a_compiled_model_generates_without_compiling_again():
    """As the README has it: one graph for prompts, one for the steps behind them, whatever their number."""
    model, graphs = make("v3"), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    tokens, options = prompts(model), dict(do_sample=False, cache_implementation="static")
    expected = model.generate(tokens, max_new_tokens=9, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend=backend)
    found = model.generate(tokens, max_new_tokens=9, **options)
    compiled = len(graphs)
    again = model.generate(tokens, max_new_tokens=9, **options)
    torch.compiler.reset()
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert compiled == len(graphs) == 2


def test_a_cache_of_another_width_is_an_error(mla_model):
    narrower = copy.deepcopy(mla_model.config)
    narrower.kv_lora_rank -= 4
    with pytest.raises(ValueError, match="24.*28"):
        mla_model(prompts(mla_model), past_key_values=LatentCache(narrower))


def test_a_cache_of_another_depth_is_an_error(mla_model):
    shallower = copy.deepcopy(mla_model.config)
    shallower.num_hidden_layers -= 1
    with pytest.raises(ValueError, match="layers"):
        mla_model(prompts(mla_model), past_key_values=LatentCache(shallower))


def test_a_latent_cache_for_a_dense_model_is_an_error():
    model = make("llm")
    with pytest.raises(ValueError, match="kv_lora_rank"):
        LatentCache(model.config)
    with pytest.raises(ValueError, match="LatentCache"):
        model(prompts(model), past_key_values=LatentCache(tiny_config("v3")))


# --- packed rows ----------------------------------------------------------------------------------------------------

DOCUMENTS = ((5, 1, 4), (2, 8))  # lengths of the documents in two rows of ten tokens


def packed_positions(rows=DOCUMENTS) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def separate_logits(model, tokens: torch.Tensor, rows=DOCUMENTS) -> torch.Tensor:
    """Logits of every document on its own, put where it lies in its row."""
    result = [
        [logits_of(model, document[None], use_cache=False)[0] for document in row.split(lengths)]
        for row, lengths in zip(tokens, rows, strict=True)
    ]
    return torch.stack([torch.cat(row) for row in result])


@pytest.mark.parametrize(
    ("name", "attention", "use_cache"),
    [
        *itertools.product(MODELS, ("eager", "sdpa"), (True, False)),
        ("v3", "flex_attention", True),  # compiled, so once
    ],
)
def test_packed_rows_equal_separate_documents(name, attention, use_cache):
    model = make(name)
    tokens = prompts(model)
    expected = separate_logits(model, tokens)
    model.set_attn_implementation(attention)
    assert_close(logits_of(model, tokens, position_ids=packed_positions(), use_cache=use_cache), expected)


@pytest.mark.parametrize("mla_mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", MLA)
def test_packed_rows_in_every_mla_mode(name, mla_mode):
    model = make(name, mla_mode=mla_mode)
    tokens = prompts(model)
    found = logits_of(model, tokens, position_ids=packed_positions(), use_cache=True)
    assert_close(found, separate_logits(model, tokens))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("steps", [(3, 7), (5, 5), (6, 1, 3), (1,) * 10], ids=str)
def test_packed_rows_meet_a_filled_cache(model, steps, attention):
    model.set_attn_implementation(attention)
    tokens, positions = prompts(model), packed_positions()
    expected, cache, start = separate_logits(model, tokens), None, 0
    for length in steps:
        step = slice(start, start + length)
        with torch.no_grad():
            output = model(tokens[:, step], position_ids=positions[:, step], past_key_values=cache, use_cache=True)
        assert_close(output.logits, expected[:, step])
        cache, start = output.past_key_values, start + length


def test_packed_row_in_training_equals_separate_documents(model):
    """No document is asked for the first token of the next, by the MTP layers neither."""
    model.train()
    tokens = prompts(model, batch=1)
    labels = tokens.clone()
    labels[:, [0, 5, 6]] = -100
    packed = model(tokens, labels=labels, position_ids=packed_positions(DOCUMENTS[:1]))
    first, _, last = tokens.split(DOCUMENTS[0], dim=1)  # the one between has nothing to predict
    separate = [model(document, labels=document) for document in (first, last)]
    predicted = torch.tensor([4.0, 3.0])
    if packed.mtp_loss is None:
        assert_close(packed.loss, torch.stack([part.loss for part in separate]) @ predicted / 7)
        return
    assert_close(packed.lm_loss, torch.stack([part.lm_loss for part in separate]) @ predicted / 7)
    assert_close(packed.mtp_loss[0], torch.stack([part.mtp_loss[0] for part in separate]) @ (predicted - 1) / 5)


# --- switches -------------------------------------------------------------------------------------------------------


def spying(monkeypatch, registry, plain: str, name: str) -> list:
    """Registers implementation `name`, which does what `plain` does and notes every call."""
    calls, implementation = [], registry[plain]

    def spy(*args, **kwargs):
        calls.append(name)
        return implementation(*args, **kwargs)

    monkeypatch.setitem(registry._global_mapping, name, spy)
    return calls


def test_set_attn_implementation_switches(model, monkeypatch):
    tokens = prompts(model)
    expected = logits_of(model, tokens, use_cache=False)
    calls = spying(monkeypatch, ALL_ATTENTION_FUNCTIONS, "sdpa", "spy")
    model.set_attn_implementation("spy")
    found = logits_of(model, tokens, use_cache=False)
    assert len(calls) == model.config.num_hidden_layers
    model.set_attn_implementation("eager")
    assert_close(logits_of(model, tokens, use_cache=False), expected)
    assert len(calls) == model.config.num_hidden_layers
    assert found.shape == expected.shape


def test_set_experts_implementation_switches(mla_model, monkeypatch):
    tokens = prompts(mla_model)
    expected = logits_of(mla_model, tokens)
    calls = spying(monkeypatch, ALL_EXPERTS_FUNCTIONS, "batched_mm", "spy")
    mla_model.set_experts_implementation("spy")
    assert_close(logits_of(mla_model, tokens), expected)
    assert len(calls) == 2  # of three layers the first is dense
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        mla_model.set_experts_implementation(implementation)
        assert_close(logits_of(mla_model, tokens), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(model, reentrant):
    model.train()
    tokens, gradients = prompts(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert any(grad is not None and grad.any() for grad in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mla_mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_weights(name, mla_mode):
    model = make(name, attn_implementation="eager", **dict(mla_mode=mla_mode) if name in MLA else {})
    tokens, config = prompts(model), model.config
    with torch.no_grad():
        first = model(tokens[:, :7], use_cache=True, output_attentions=True)
        second = model(tokens[:, 7:], past_key_values=first.past_key_values, output_attentions=True)
        whole = model(tokens, output_attentions=True)
    for output, shape in ((first, (7, 7)), (second, (3, 10)), (whole, (10, 10))):
        assert len(output.attentions) == config.num_hidden_layers
        for weights in output.attentions:
            assert weights.shape == (2, config.num_attention_heads, *shape)
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for chunk, full in zip(second.attentions, whole.attentions, strict=True):
        assert_close(chunk, full[:, :, 7:])


@pytest.mark.parametrize("training", [True, False])
def test_hidden_states(model, training):
    """The embeddings, then every main layer's output, the last behind the final norm; the MTP layers add none."""
    model.train(training)
    tokens, config = prompts(model), model.config
    output = model(tokens, labels=tokens, output_hidden_states=True)
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert all(states.shape == (2, 10, config.hidden_size) for states in output.hidden_states)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens))
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("training", [True, False])
def test_router_logits(mla_model, training):
    mla_model.train(training)
    tokens, config = prompts(mla_model), mla_model.config
    output = mla_model(tokens, labels=tokens, output_router_logits=True)
    assert len(output.router_logits) == config.num_hidden_layers - config.first_k_dense_replace
    assert all(logits.shape == (20, config.n_routed_experts) for logits in output.router_logits)
    assert mla_model(tokens).router_logits is None


def test_generate_returns_what_was_asked_for(model):
    config = model.config
    model.set_attn_implementation("eager")
    output = model.generate(
        prompts(model),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(output.logits) == len(output.attentions) == len(output.hidden_states) == 3
    assert [step[0].shape[-2:] for step in output.attentions] == [(10, 10), (1, 11), (1, 12)]
    assert all(len(step) == config.num_hidden_layers + 1 for step in output.hidden_states)


def test_logits_to_keep(model):
    tokens = prompts(model)
    logits = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(model, tokens, logits_to_keep=3), logits[:, -3:])
    torch.testing.assert_close(logits_of(model, tokens, logits_to_keep=torch.tensor([1, 4])), logits[:, [1, 4]])


@pytest.mark.parametrize("training", [True, False])
def test_loss_over_the_items_of_a_global_batch(model, training):
    """`num_items_in_batch` divides sums of token losses, the MTP part's too, so that accumulation steps add up."""
    model.train(training)
    tokens = prompts(model)
    mean, scaled = (model(tokens, labels=tokens, **options) for options in ({}, dict(num_items_in_batch=36)))
    lm_loss = mean.loss if mean.lm_loss is None else mean.lm_loss
    assert_close(F.cross_entropy(mean.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), lm_loss)
    expected = lm_loss * 18 / 36
    if mean.mtp_loss is not None:
        expected = expected + model.config.mtp_loss_weight * mean.mtp_loss[0] * 16 / 36
    assert_close(scaled.loss, expected)


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings_logged():
    handler, logger = Records(), logging.getLogger("modeling_deepseek")
    transformers_logging.warning_once.cache_clear()
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def test_beyond_max_position_embeddings_warns_once(model, warnings_logged):
    model.config.max_position_embeddings = 10
    tokens = prompts(model)
    logits_of(model, tokens)
    assert not warnings_logged
    model.generate(tokens, max_new_tokens=6, do_sample=False)
    logits_of(model, prompts(model, length=15))
    assert len([message for message in warnings_logged if "max_position_embeddings" in message]) == 1
