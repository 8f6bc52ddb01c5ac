"""LatentCache in 8 and 6 bits: how far it may be off, that attention reads what lies there, and that nothing else changes."""

import copy
import importlib.util
import math

import pytest
import torch
from transformers import DynamicCache

from modeling_deepseek import LatentCache, attention, quantized
from modeling_deepseek.dtypes import has_fast_gemm
from modeling_deepseek.plain_attention import absorbed_attention_quantized, absorbed_attention_reference
from modeling_deepseek.quantized import QuantizedStates, as_tensor, pack, rotate, unpack, unpack_briefly
from tiny import tiny_config, tiny_model, tiny_tokens

RANK, ROPE, LAYERS = 28, 8, 3  # of tiny_config("v3")
BITS = (8, 6)
LEVELS = {8: 127, 6: 31}
BYTES = {8: RANK + 1 + 4 * ROPE, 6: 21 + 1 + 6 + 1}  # per token and layer, in fp32


def step_of(states: torch.Tensor, bits: int) -> torch.Tensor:
    """The widest step of each vector; its scale is rounded up by an eighth of an octave at most."""
    return rotate(states).abs().amax(-1, keepdim=True) * 2**0.125 / LEVELS[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 28, 48, 64, 512])
def test_an_element_is_off_by_half_a_step_at_most(width, dtype, bits):
    torch.manual_seed(width)
    states = torch.randn(2, 1, 40, width) * torch.randn(2, 1, 40, 1).exp()
    states[0, 0, :9, 0] *= 300  # outliers
    states[0, 0, 9] = 0
    states = states.to(dtype)
    read = QuantizedStates.of(states, bits).dequantize()
    assert read.dtype == dtype
    rounding = states.float().norm(dim=-1, keepdim=True) * torch.finfo(dtype).eps * 2
    error = (rotate(read) - rotate(states)).abs()
    assert (error <= 0.5001 * step_of(states, bits) + rounding).all()
    assert (read[0, 0, 9] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_vector_with_outliers_keeps_its_other_elements(bits):
    states = torch.randn(1, 1, 50, 512, generator=torch.Generator().manual_seed(0))
    states[..., 17] = 30.0
    error = (QuantizedStates.of(states, bits).dequantize() - states)[..., :17].square().mean().sqrt()
    assert error < 30 / LEVELS[bits] / math.sqrt(12) / 4  # a quarter of what a scale for the outlier would leave


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_has_no_scale_is_read_as_nan(value, bits):
    states = torch.randn(1, 1, 4, 64)
    states[0, 0, 2, 5] = value
    read = QuantizedStates.of(states, bits).dequantize()[0, 0]
    assert read[2].isnan().all()
    assert read[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("width", [1, 4, 6, 28, 512])
def test_four_numbers_are_packed_into_three_bytes(width):
    codes = (torch.randint(-32, 32, (2, 1, 30, width)) * 4).to(torch.int8)
    packed = pack(codes)
    assert packed.shape == (2, 1, 30, 3 * -(-width // 4))
    assert torch.equal(unpack(packed, width), codes)
    assert torch.equal(unpack_briefly(packed[:, :, 3:20], width), codes[:, :, 3:20])


@pytest.mark.parametrize("width", [1, 6, 28, 64, 512])
def test_the_rotation_is_its_own_inverse_and_keeps_products(width):
    a, b = torch.randn(2, 5, width, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(a)), a)
    torch.testing.assert_close((rotate(a) * rotate(b)).sum(-1), (a * b).sum(-1))


@pytest.mark.parametrize(
    ("bits", "bytes_per_layer", "saved"), [(None, 1152, 0.822), (16, 1152, 0.822), (8, 641, 0.901), (6, 434, 0.933)]
)
def test_bytes_at_the_geometry_of_v2_beside_the_cache_of_67b(bits, bytes_per_layer, saved):
    cache = LatentCache(tiny_config("v3", num_hidden_layers=60, kv_lora_rank=512, qk_rope_head_dim=64), bits=bits)
    for layer in range(60):
        cache.update(torch.randn(1, 1, 2, 512).bfloat16(), torch.randn(1, 1, 2, 64).bfloat16(), layer)
    assert cache.nbytes == 2 * 60 * bytes_per_layer
    gqa_of_67b = 95 * 8 * 128 * 2 * 2
    assert 1 - cache.nbytes / 2 / gqa_of_67b >= saved


GEOMETRIES = {  # batch, heads, queries, keys, rank, rope, nope, value
    "V2, 128 heads": (1, 128, 1, 300, 512, 64, 128, 128),
    "V2-Lite, blocks": (1, 16, 1, 2049, 512, 64, 128, 128),
    "one key": (2, 4, 1, 1, 28, 8, 16, 10),
    "rows, queries": (3, 4, 5, 1300, 28, 8, 16, 10),
}


def drawn(geometry: str, bits: int, dtype: torch.dtype):
    batch, heads, queries, keys, rank, rope, nope, value = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, heads, queries, nope), (batch, heads, queries, rope), (heads, nope, rank), (heads, value, rank)
    q_nope, q_rope, w_uk, w_uv = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    latent, k_rope = (torch.randn(batch, 1, keys, size, generator=generator).to(dtype) for size in (rank, rope))
    latent = QuantizedStates.of(latent, bits)
    return q_nope, q_rope, latent, QuantizedStates.of(k_rope, 6) if bits == 6 else k_rope, w_uk, w_uv, 0.02


def plain(q_nope, q_rope, latent, k_rope, w_uk, w_uv, scaling, mask=None) -> torch.Tensor:
    """The twin: everything is dequantised, and computed in fp64."""
    held = (as_tensor(states).squeeze(1).double() for states in (latent, k_rope))
    weights = (w_uk.double(), w_uv.double(), scaling, None if mask is None else mask)
    return absorbed_attention_reference(q_nope.double(), q_rope.double(), *held, *weights)[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["no mask", "boolean", "additive"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_attention_over_quantised_latents_equals_that_over_dequantised_ones(geometry, kind, bits):
    states = drawn(geometry, bits, torch.float32)
    batch, _, queries, keys, *_ = GEOMETRIES[geometry]
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, :, 0] = False  # a query that sees nothing is spread evenly
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = None if kind == "no mask" else mask
    expected = plain(*states, mask)
    result = absorbed_attention_quantized(*states, mask).double()
    torch.testing.assert_close(result / expected.std(), expected / expected.std(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
def test_attention_in_bf16_is_near_that_in_fp64(bits):
    states = drawn("V2-Lite, blocks", bits, torch.bfloat16)
    result, expected = absorbed_attention_quantized(*states), plain(*states)
    assert result.dtype == torch.bfloat16
    room = 0.03 if has_fast_gemm("cpu", torch.bfloat16) else 0.01  # where products are in bf16, scores are rounded too
    assert (result - expected).norm() / expected.norm() < room


def latents(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, length, RANK), torch.randn(batch, 1, length, ROPE)


def filled(bits: int, *lengths: int, batch: int = 2) -> tuple[LatentCache, DynamicCache]:
    """A quantised cache and one that concatenates, after the same updates."""
    caches = LatentCache(tiny_config("v3"), bits=bits), DynamicCache()
    for length in lengths:
        append(caches, length, batch)
    return caches


@torch.no_grad()
def append(caches, length: int, batch: int = 2) -> None:
    for layer in range(LAYERS):
        new = latents(length, batch)
        for cache in caches:
            cache.update(*new, layer)


def assert_quantised(ours: LatentCache, theirs: DynamicCache, bits: int) -> None:
    """`ours` holds what quantising all of `theirs` at once gives, but for a number here and there that lay between two."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.nbytes == theirs.get_seq_length() * theirs.layers[0].keys.shape[0] * LAYERS * BYTES[bits]
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        of_rope = other.values if bits == 8 else QuantizedStates.of(other.values, bits).dequantize()
        for found, expected in (
            (layer.keys, QuantizedStates.of(other.keys, bits).dequantize()),
            (layer.values, of_rope),
        ):
            assert found.shape == expected.shape
            assert ((found - expected).abs() > 1e-5).any(-1).float().mean() <= 0.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lengths", [(1,) * 150, (5, 1, 64, 200, 1)], ids=["150 x 1", "mixed"])
def test_appended_tokens_equal_those_quantised_at_once(lengths, bits):
    assert_quantised(*filled(bits, *lengths), bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_mixed_life_equals_that_of_a_plain_cache(bits):
    caches = filled(bits, 40)
    for step in range(60):
        append(caches, 1 + step % 3)
        for cache in caches:
            if step % 7 == 6:
                cache.crop(-2)
            if step % 5 == 4:
                cache.reorder_cache(torch.tensor([1, 0]))
            if step % 20 == 19:
                for layer in cache.layers:
                    layer.offload()
                    layer.prefetch()
    assert_quantised(*caches, bits)
    for cache in caches:
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
    append(caches, 2, batch=3)
    assert_quantised(*caches, bits)
    for cache in caches:
        cache.reset()
    append(caches, 4, batch=1)
    assert_quantised(*caches, bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_deep_copy_goes_its_own_way(bits):
    ours, theirs = filled(bits, 70)
    twin = copy.deepcopy(ours)
    append([twin], 3)
    assert_quantised(ours, theirs, bits)
    assert twin.get_seq_length() == 73


@pytest.mark.parametrize("bits", BITS)
def test_keys_and_values_can_be_assigned(bits):
    ours, theirs = filled(bits, 20)
    for cache in (ours, theirs):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1, :, :15] * 2, layer.values[:1, :, :15] * 2
    append((ours, theirs), 2, batch=1)
    assert ours.layers[0].keys.shape == (1, 1, 17, RANK)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):  # quantised twice
        assert ((layer.keys - other.keys).norm() / other.keys.norm()) < 2 / LEVELS[bits]
        assert ((layer.values - other.values).norm() / other.values.norm()) < 2 / LEVELS[bits]


@pytest.mark.parametrize("config", [None, "v3"])
def test_it_wants_a_number_of_bits_that_it_has(config):
    with pytest.raises(ValueError, match="bits=4"):
        LatentCache(config and tiny_config(config), bits=4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_both_forms_see_what_lies_in_the_cache(attn, mode, bits):
    model = tiny_model("v2", mla_mode=mode, attn_implementation=attn)
    tokens, logits = tiny_tokens(model.config, 2, 12), []
    for chunks in ((12,), (7, 1, 1, 3)):
        cache = LatentCache(model.config, bits=bits)
        steps = [model(chunk, past_key_values=cache).logits for chunk in tokens.split(chunks, dim=1)]
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    # the model that is given dequantised latents by a plain cache, call by call
    plain = LatentCache(model.config)
    for index in range(LAYERS):
        layer = plain.layers[index]
        update = layer.update
        layer.update = lambda keys, values, update=update, held=cache.layers[index]: update(
            *(
                (as_tensor(QuantizedStates.of(states, b)) if b else states)
                for states, b in zip((keys, values), held.bits, strict=True)
            )
        )
    torch.testing.assert_close(model(tokens, past_key_values=plain).logits, logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (6, 0.2)])
@torch.no_grad()
def test_a_dense_model_is_near_itself_without_quantisation(bits, tolerance):
    model = tiny_model("v3", n_routed_experts=None, first_k_dense_replace=3)  # a router would jump between experts
    tokens = tiny_tokens(model.config, 2, 30)
    logits = model(tokens, past_key_values=LatentCache(model.config, bits=bits)).logits
    expected = model(tokens).logits
    error = (logits - expected).norm() / expected.norm()
    assert tolerance / 10 < error < tolerance


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_step_in_latent_space_dequantises_nothing_at_once(bits, monkeypatch):
    model = tiny_model("v3", mla_mode="absorbed")
    cache = LatentCache(model.config, bits=bits)
    tokens = tiny_tokens(model.config, 2, 12)
    model(tokens, past_key_values=cache)
    monkeypatch.setattr(QuantizedStates, "dequantize", lambda self: pytest.fail("dequantised"))
    calls = []
    fast = attention.attend_quantized_latents
    monkeypatch.setattr(attention, "attend_quantized_latents", lambda *args: calls.append(1) or fast(*args))
    model(tokens[:, :1], past_key_values=cache)
    assert len(calls) == LAYERS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
@torch.no_grad()
def test_the_cache_of_another_copy_of_the_code_is_read_alike(mode, bits, monkeypatch):
    model = tiny_model("v3", mla_mode=mode)
    tokens, logits = tiny_tokens(model.config, 2, 12), []
    for copied in (False, True):
        if copied:
            spec = importlib.util.spec_from_file_location("modeling_deepseek.copied", quantized.__file__)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            monkeypatch.setattr("modeling_deepseek.cache.QuantizedStates", module.QuantizedStates)
        cache = LatentCache(model.config, bits=bits)
        logits.append([model(chunk, past_key_values=cache).logits for chunk in tokens.split((11, 1), dim=1)])
    assert all(map(torch.equal, *logits))


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_what_lies_in_the_spare_room_does_not_matter(bits):
    model = tiny_model("v3")
    tokens, logits = tiny_tokens(model.config, 2, 12), []
    for poison in (False, True):
        cache = LatentCache(model.config, bits=bits)
        model(tokens, past_key_values=cache)
        cache.crop(-3)
        if poison:
            for layer in cache.layers:
                for buffer in layer._buffers:
                    buffer[:, :, 9:] = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max
        logits.append([model(tokens[:, :n], past_key_values=cache).logits for n in (1, 2, 1)])
    for clean, poisoned in zip(*logits, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_refused_where_they_would_be_lost(bits):
    model = tiny_model("v3")
    tokens, cache = tiny_tokens(model.config, 2, 5), LatentCache(model.config, bits=bits)
    with pytest.raises(ValueError, match="no gradients.*torch.no_grad"):
        model(tokens, past_key_values=cache)
    model.requires_grad_(False)
    model(tokens, past_key_values=cache)  # nobody asks for any
    assert cache.get_seq_length() == 5


GREEDY = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "how", [dict(use_mtp=True), dict(use_mtp=True, num_assistant_tokens=3), dict(num_beams=3)], ids=str
)
def test_generate_gives_what_it_gives_when_all_is_computed_again(how, bits):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    prompt = tiny_tokens(model.config, 3, 6)
    result = model.generate(prompt, **GREEDY, **how, past_key_values=LatentCache(model.config, bits=bits))
    if "num_beams" not in how:
        plain = model.generate(prompt, **GREEDY, past_key_values=LatentCache(model.config, bits=bits))
        assert torch.equal(result, plain)
        return
    with torch.no_grad():  # a beam's score is that of its text read at once
        best = model.generate(
            prompt,
            **GREEDY,
            **how,
            past_key_values=LatentCache(model.config, bits=bits),
            return_dict_in_generate=True,
            output_scores=True,
        )
        logits = model(best.sequences, past_key_values=LatentCache(model.config, bits=bits)).logits.log_softmax(-1)
    scores = logits[:, 5:-1].gather(-1, best.sequences[:, 6:, None]).sum((1, 2)) / 20
    torch.testing.assert_close(best.sequences_scores, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_generate_makes_one_by_name(bits):
    model = tiny_model("v3")
    prompt = tiny_tokens(model.config, 2, 6)
    chosen = dict(cache_implementation="quantized", cache_config={"nbits": bits}, return_dict_in_generate=True)
    result = model.generate(prompt, **GREEDY, **chosen)
    assert type(result.past_key_values) is LatentCache
    assert result.past_key_values.nbytes == 2 * 25 * LAYERS * BYTES[bits]
    plain = model.generate(prompt, **GREEDY, past_key_values=LatentCache(model.config, bits=bits))
    assert torch.equal(result.sequences, plain)


@pytest.mark.parametrize("options", [None, {"nbits": 4}, {"backend": "quanto", "nbits": 8}], ids=str)
def test_generate_leaves_other_quantised_caches_to_transformers(options, monkeypatch):
    model = tiny_model("v3")
    made = []
    monkeypatch.setattr(
        "transformers.generation.utils.QuantizedCache", lambda **given: made.append(given) or LatentCache()
    )
    model.generate(tiny_tokens(model.config, 1, 6), **GREEDY, cache_implementation="quantized", cache_config=options)
    assert len(made) == 1


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_steps_compile_into_one_graph_that_serves_every_length(bits):
    model = tiny_model("v3", n_routed_experts=None, num_hidden_layers=1, first_k_dense_replace=1)
    tokens, logits, graphs = tiny_tokens(model.config, 2, 13), [], []
    torch._dynamo.reset()
    backend = lambda graph, inputs: graphs.append(1) or graph.forward  # noqa: E731
    for forward in (model.forward, torch.compile(model.forward, backend=backend, fullgraph=True)):
        cache = LatentCache(model.config, bits=bits)
        model(tokens[:, :8], past_key_values=cache)
        logits.append(
            torch.cat([forward(token, past_key_values=cache).logits for token in tokens[:, 8:].split(1, 1)], 1)
        )
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert len(graphs) <= 2  # one for the first length, one for all
