"""Continuous batching over the paged pool: whatever is batched, evicted and shared, a request gets what it gets alone."""

import inspect
import sys

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import modeling_deepseek
from modeling_deepseek import paged, serve
from tiny import tiny_model, tiny_tokens

PAGE, NEW = 8, 12
PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=[1, 7, 11], pad_token_id=2)
LENGTHS = (5, 17, 1, 61, 23, 9)


def pool(num_blocks: int = 64, max_batch_tokens: int = 64, **options) -> ContinuousBatchingConfig:
    sizes = {PAGE_SIZE: PAGE, "num_blocks": num_blocks, "max_batch_tokens": max_batch_tokens}
    return ContinuousBatchingConfig(**sizes, **options)


def prompts(model, lengths=LENGTHS) -> list[list[int]]:
    return [tiny_tokens(model.config, 1, length, seed=length)[0].tolist() for length in lengths]


def alone(model, prompt: list[int], **options) -> list[int]:
    return model.generate(torch.tensor([prompt]), **GREEDY | options)[0, len(prompt) :].tolist()


def batched(model, inputs, batching=None, **options) -> list[list[int]]:
    results = model.generate_batch(inputs, GenerationConfig(**GREEDY | options), batching or pool())
    assert all(result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


def counted(monkeypatch, owner, name: str) -> list:
    """What every call of `owner.name` returned."""
    returned, method = [], getattr(owner, name)

    def counting(self, *args, **kwargs):
        returned.append(method(self, *args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(owner, name, counting)
    return returned


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llm", "moe16b", "v2", "v3"])
def test_a_batch_of_requests_gives_what_each_gives_alone(family, attention):
    """Long prompts come in chunks of 24 tokens, requests end at different times, MTP layers stand by."""
    fields = dict(num_nextn_predict_layers=1) if family == "v3" else {}
    model = tiny_model(family, attn_implementation=attention, **fields)
    expected = [alone(model, prompt) for prompt in prompts(model)]
    assert len(set(map(len, expected))) > 1
    assert batched(model, prompts(model), pool(max_batch_tokens=24)) == expected
    assert model.config._attn_implementation == attention
    assert expected[0] == alone(model, prompts(model)[0])


@pytest.mark.parametrize(
    "fields", [dict(mla_mode="absorbed"), dict(mla_mode="expanded"), dict(kv_lora_rank=27)], ids=str
)
def test_every_form_of_attention_over_the_pool(fields):
    model = tiny_model("v2", **fields)
    assert batched(model, prompts(model)) == [alone(model, prompt) for prompt in prompts(model)]


def test_requests_of_very_different_lengths_are_not_padded_to_one(monkeypatch):
    monkeypatch.setattr(paged, "SPARE_TOKENS", 0)
    rows = paged.group_requests([0, 1, 2, 3, 6], [0, 4, 104, 109, 114], torch.device("cpu"))
    assert [group.slots.shape for group in rows] == [(2, 5), (1, 100), (1, 5)]
    assert rows[0].tokens.tolist() == [[0], [2]]
    assert rows[0].slots.tolist() == [[0, 1, 2, 3, 3], [104, 105, 106, 107, 108]]
    assert rows[0].mask.tolist() == [[[[True] * 4 + [False]]], [[[True] * 5]]]
    assert rows[1].mask is None
    assert rows[2].tokens.tolist() == [[3, 4, 5]]
    assert rows[2].mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_token_takes_its_latent_and_rope_key_and_nothing_else():
    model = tiny_model("v3", num_nextn_predict_layers=1)
    with model.continuous_batching_context_manager(
        GenerationConfig(**GREEDY), continuous_batching_config=pool()
    ) as manager:
        manager.add_request(prompts(model)[0])
        assert manager.get_result(timeout=30).is_finished()
        cache = manager.batch_processor.cache
        tensors = [cache.cache_tensor] if hasattr(cache, "cache_tensor") else [*cache.key_cache, *cache.value_cache]
        assert (
            manager.batch_processor.inputs_and_outputs.attention_mask is None
        )  # one over all requests and the whole pool
    config, unused_blocks = model.config, 2
    held = (64 + unused_blocks) * PAGE * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == held * model.dtype.itemsize


def test_requests_that_do_not_fit_at_once_are_put_off_and_come_back(monkeypatch):
    model = tiny_model("v3")
    put_off = counted(monkeypatch, OffloadingManager, "offload_requests")
    found = batched(model, prompts(model), pool(num_blocks=10, max_batch_tokens=24))
    assert put_off
    assert found == [alone(model, prompt) for prompt in prompts(model)]


def test_a_shared_prefix_is_computed_once(monkeypatch):
    model = tiny_model("v2")
    prefix = prompts(model, (24,))[0]
    inputs = [prefix + tail for tail in prompts(model, (3, 6))]
    found = counted(monkeypatch, PagedAttentionCache, "search_prefix_match")
    assert batched(model, inputs, pool(max_requests_per_batch=1)) == [alone(model, prompt) for prompt in inputs]
    assert sorted(found) == [0, len(prefix)]


def test_sampling_draws_what_it_may():
    model = tiny_model("v3")
    inputs, options = prompts(model)[:2], dict(do_sample=True, num_return_sequences=2)
    expected = [alone(model, prompt) for prompt in inputs]
    assert all(tokens in expected for tokens in batched(model, inputs, top_k=1, **options))
    free = [batched(model, inputs, pool(seed=seed), temperature=3.0, **options) for seed in (0, 0, 1)]
    assert free[0] == free[1] != free[2]


def test_tokens_are_streamed_while_others_go_on():
    model = tiny_model("v2")
    first, second = prompts(model)[:2]
    batching = model.continuous_batching_context_manager(GenerationConfig(**GREEDY), continuous_batching_config=pool())
    with batching as manager:
        name = manager.add_request(first, max_new_tokens=6, streaming=True)
        other = manager.add_request(second)
        outputs = []
        while not {name, other} <= {output.request_id for output in outputs if output.is_finished()}:
            outputs.append(manager.get_result(timeout=30))
    stream = [output.generated_tokens for output in outputs if output.request_id == name]
    assert [len(tokens) for tokens in stream] == list(range(1, len(stream) + 1))
    assert stream[-1] == alone(model, first, max_new_tokens=6)
    assert outputs[-1].generated_tokens == alone(model, second)


def test_a_manager_that_is_kept_serves_the_next_batch():
    model = tiny_model("v3")
    for inputs in (prompts(model)[:3], prompts(model)[3:]):
        results = model.generate_batch(inputs, GenerationConfig(**GREEDY), pool(), persistent_manager=True)
        assert [result.generated_tokens for result in results.values()] == [alone(model, prompt) for prompt in inputs]
    assert model._cached_continuous_batching_manager.model._model is model
    model.destroy_cached_continuous_batching_manager()
    assert not hasattr(model, "_cached_continuous_batching_manager")


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        (dict(use_mtp=True), "use_mtp"),
        (dict(num_beams=2), "num_beams"),
        (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens"),
        (dict(cache_implementation="quantized"), "cache_implementation"),
    ],
    ids=str,
)
def test_what_a_batch_would_pass_over_is_an_error(generation, named):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    config = GenerationConfig(**GREEDY)
    for name, value in generation.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=named):
        model.generate_batch(prompts(model), config, pool())
    with pytest.raises(ValueError, match=named):
        model.generate_batch(prompts(model), GenerationConfig(**GREEDY), pool(), **generation)
    assert model.config._attn_implementation == "sdpa"


def test_what_the_pool_cannot_do_is_an_error():
    model = tiny_model("v3")
    with pytest.raises(ValueError, match="use_cuda_graph"):
        model.generate_batch(prompts(model), GenerationConfig(**GREEDY), pool(use_cuda_graph=True))
    with pytest.raises(ValueError, match="no tokens"):
        model.generate_batch([[5], []], GenerationConfig(**GREEDY), pool())
    dynamic = tiny_model("v2", rope_scaling=dict(type="dynamic", factor=2.0))
    with pytest.raises(ValueError, match="dynamic"):
        dynamic.generate_batch(prompts(model), GenerationConfig(**GREEDY), pool())


def test_the_server_of_transformers_finds_our_classes(monkeypatch):
    """It loads `getattr(transformers, config.architectures[0])`."""
    transformers = sys.modules["transformers"]
    names = [name for name in modeling_deepseek.__all__ if name.endswith("ForCausalLM")]
    for name in names:
        monkeypatch.setattr(transformers, name, None, raising=False)
    serve.put_in_place()
    assert [getattr(transformers, name) for name in names] == [getattr(modeling_deepseek, name) for name in names]
