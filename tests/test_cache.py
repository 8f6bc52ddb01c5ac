"""LatentCache against a cache that concatenates: what it holds, where it grows, and that nobody sees the difference."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from modeling_deepseek import LatentCache
from modeling_deepseek.cache import LatentLayer
from tiny import tiny_config, tiny_model, tiny_tokens

RANK, ROPE, LAYERS = 28, 8, 3  # of tiny_config("v3")


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"], autouse=True)
def side_by_side(request, monkeypatch) -> bool:
    """How latents and rope keys lie: each on its own, as on a CPU, or one behind the other, as on a GPU."""
    monkeypatch.setattr(LatentLayer, "_side_by_side", lambda layer: request.param and len(layer.parts) == 2)
    return request.param


def latents(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, length, RANK, dtype=dtype), torch.randn(batch, 1, length, ROPE, dtype=dtype)


def filled(*lengths: int, batch: int = 2) -> tuple[LatentCache, DynamicCache]:
    """Ours and the one that concatenates, after the same updates of all layers."""
    caches = LatentCache(tiny_config("v3")), DynamicCache()
    for length in lengths:
        append(caches, length, batch)
    return caches


def append(caches, length: int, batch: int = 2) -> None:
    for layer in range(LAYERS):
        new = latents(length, batch)
        for cache in caches:
            cache.update(*new, layer)


def assert_same(ours: LatentCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def addresses(cache: LatentCache) -> list[int]:
    return [states.data_ptr() for layer in cache.layers for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 70), (2, 500)])
def test_it_holds_rank_plus_rope_elements_per_token_and_layer(batch, tokens, dtype):
    cache = LatentCache(tiny_config("v3"))
    for layer in range(LAYERS):
        cache.update(*latents(tokens, batch, dtype), layer)
    assert cache.nbytes == batch * tokens * LAYERS * (RANK + ROPE) * dtype.itemsize
    assert cache.get_seq_length() == tokens


@pytest.mark.parametrize(
    ("release", "layers", "elements"), [("V2-Lite", 27, 15_552), ("V2", 60, 34_560), ("V3", 61, 35_136)]
)
def test_a_token_of_a_release_takes_its_published_number_of_elements(release, layers, elements):
    config = tiny_config("v3", num_hidden_layers=layers, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config)
    for layer in range(layers):
        cache.update(torch.zeros(1, 1, 1, 512), torch.zeros(1, 1, 1, 64), layer)
    assert cache.nbytes == elements * 4


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_stores_nothing_but_latents_in_it(family, batch):
    model = tiny_model(family)
    cache = model(tiny_tokens(model.config, batch, 11), use_cache=True).past_key_values
    assert type(cache) is LatentCache
    assert cache.nbytes == batch * 11 * LAYERS * (RANK + ROPE) * 4
    assert sum(p.numel() for layer in cache.layers for p in (layer.keys, layer.values)) * 4 == cache.nbytes


def test_the_stored_latent_is_normed_and_the_stored_key_is_rotated():
    model = tiny_model("v3", "Model")
    attention, x = model.layers[0].self_attn, torch.randn(1, 7, 48)
    cos, sin = model.rotary_emb(x, torch.arange(7)[None])
    cache = LatentCache(model.config)
    attention(x, (cos, sin), None, cache)
    latent, k_rope = attention.kv_a_proj_with_mqa(x).split((RANK, ROPE), dim=-1)
    torch.testing.assert_close(cache.layers[0].keys[:, 0], attention.kv_a_layernorm(latent))
    torch.testing.assert_close(cache.layers[0].values[:, 0], attention.rotate(k_rope, cos, sin))


@pytest.mark.parametrize(
    "lengths", [(1,) * 150, (5, 1, 1, 64, 200, 1), (300, 1, 1)], ids=["150 x 1", "mixed", "300+1+1"]
)
def test_appended_tokens_equal_concatenated_ones(lengths):
    assert_same(*filled(*lengths))


@torch.no_grad()
def test_tokens_are_appended_in_place_between_growths():
    cache, _ = filled(10)
    before = addresses(cache)
    for _ in range(64):
        append([cache], 1)
        assert addresses(cache) == before


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lengths", [(5,), (64, 1), (100, 40, 7)], ids=str)
def test_buffers_have_whole_pages_and_the_layout_of_their_device(batch, lengths, side_by_side):
    cache, _ = filled(*lengths, batch=batch)
    for operation in (
        lambda: None,
        lambda: cache.reorder_cache(torch.arange(batch)),
        lambda: append([cache], 300, batch),
    ):
        operation()
        for layer in cache.layers:
            latent, k_rope = layer.keys, layer.values
            width = RANK + ROPE if side_by_side else RANK
            assert latent.stride()[2:] == (width, 1)
            assert latent.stride(0) % (64 * width) == 0
            behind = k_rope.data_ptr() == latent.data_ptr() + RANK * latent.element_size()
            assert behind == side_by_side
            assert not side_by_side or k_rope.stride() == latent.stride()


@torch.no_grad()
def test_the_number_of_growths_is_logarithmic():
    layer, places = LatentLayer(RANK, ROPE), []
    for _ in range(5000):
        layer.update(torch.zeros(1, 1, 1, RANK), torch.zeros(1, 1, 1, ROPE))
        places.append(layer.keys.data_ptr())
    growths = sum(here != there for here, there in zip(places, places[1:], strict=False))
    assert 1 <= growths < 30


def test_returned_tokens_stay_as_they_were_while_others_follow():
    cache, _ = filled(3)
    kept = [states.clone() for states in cache.update(*latents(1), 0)]
    seen = cache.layers[0].keys, cache.layers[0].values
    append([cache], 1)
    assert all(torch.equal(view, states) for view, states in zip(seen, kept, strict=True))


@pytest.mark.parametrize("removed", [0, -1, -4, -9, -10, -99])
def test_crop_drops_the_last_tokens(removed):
    ours, theirs = filled(6, 4)
    ours.crop(removed)
    if -10 < removed < 0:
        theirs.crop(removed)
    assert ours.get_seq_length() == max(0, 10 + removed)
    if removed > -10:
        append((ours, theirs), 2)
        assert_same(ours, theirs)


@pytest.mark.parametrize(("length", "left"), [(4, 4), (10, 10), (11, 10)])
def test_crop_by_a_positive_number_keeps_that_many(length, left):
    ours, _ = filled(10)
    kept = ours.layers[0].keys[:, :, :left].clone()
    ours.crop(length)
    assert torch.equal(ours.layers[0].keys, kept)
    assert ours.layers[0].values.shape[-2] == left


ROW_OPERATIONS = {
    "reorder_cache": torch.tensor([1, 1, 0]),
    "batch_repeat_interleave": 2,
    "batch_select_indices": torch.tensor([2, 0]),
    "batch_select_indices by mask": torch.tensor([True, False, True]),
    "batch_select_indices from the end": torch.tensor([-1, 0]),
}


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
@pytest.mark.parametrize("length", [5, 100])
def test_operations_on_rows_equal_those_of_a_concatenating_cache(operation, length):
    caches = filled(length, batch=3)
    for cache in caches:
        getattr(cache, operation.split()[0])(ROW_OPERATIONS[operation])
    assert_same(*caches)
    append(caches, 3, batch=caches[1].layers[0].keys.shape[0])
    assert_same(*caches)


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
def test_operations_on_rows_of_an_empty_cache_do_nothing(operation):
    cache = LatentCache(tiny_config("v3"))
    getattr(cache, operation.split()[0])(ROW_OPERATIONS[operation])
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_a_mixed_life_equals_that_of_a_concatenating_cache():
    caches = filled(40)
    for step in range(60):
        append(caches, 1 + step % 3)
        for cache in caches:
            if step % 7 == 6:
                cache.crop(-2)
            if step % 5 == 4:
                cache.reorder_cache(torch.tensor([1, 0]))
    assert_same(*caches)


@pytest.mark.parametrize("batch", [2, 5])
def test_reset_forgets_everything_and_takes_any_batch(batch):
    ours, _ = filled(30)
    ours.reset()
    assert (ours.get_seq_length(), ours.nbytes) == (0, 0)
    theirs = DynamicCache()
    append((ours, theirs), 4, batch)
    assert_same(ours, theirs)


def test_keys_and_values_are_the_latents_and_the_rope_keys():
    cache, _ = filled(3, 4)
    assert cache.layers[1].keys.shape == (2, 1, 7, RANK)
    assert cache.layers[1].values.shape == (2, 1, 7, ROPE)
    keys, values, *_ = list(cache)[1]
    assert torch.equal(keys, cache.layers[1].keys)
    assert torch.equal(values, cache.layers[1].values)


def test_an_untouched_layer_has_no_keys():
    layer = LatentCache(tiny_config("v3")).layers[0]
    assert layer.keys is None
    assert layer.values is None
    assert not layer.is_initialized


@pytest.mark.parametrize("edit", [lambda x: x[..., :-3, :], lambda x: torch.cat((x, x), dim=-2), lambda x: x[:1]])
def test_keys_and_values_can_be_assigned_one_after_the_other(edit):
    ours, theirs = filled(5, 5)
    for cache in (ours, theirs):
        for layer in cache.layers:
            layer.keys = edit(layer.keys)
            layer.values = edit(layer.values)
    assert_same(ours, theirs)
    append((ours, theirs), 2, batch=ours.layers[0].keys.shape[0])
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("rank", "rope", "heads", "message"),
    [
        (27, ROPE, 1, "latent of width 28.* width 27"),
        (RANK, 6, 1, "rope key of width 8.* width 6"),
        (RANK, ROPE, 4, "stores 4"),
    ],
    ids=["latent", "rope key", "heads"],
)
def test_a_cache_built_for_another_config_refuses_the_tokens(rank, rope, heads, message):
    cache = LatentCache(tiny_config("v3"))
    with pytest.raises(ValueError, match=message):
        cache.update(torch.zeros(1, heads, 3, rank), torch.zeros(1, heads, 3, rope), 0)
    assert cache.nbytes == 0


def test_a_model_refuses_the_cache_of_another_one():
    model, other = tiny_model("v3"), LatentCache(tiny_config("v3", kv_lora_rank=20))
    with pytest.raises(ValueError, match="width 20.*width 28"):
        model(tiny_tokens(model.config), past_key_values=other)


def test_a_model_refuses_the_cache_of_one_with_fewer_layers():
    model, other = tiny_model("v3"), LatentCache(tiny_config("v3", num_hidden_layers=2))
    with pytest.raises(ValueError, match="2 layers"):
        model(tiny_tokens(model.config), past_key_values=other)


@pytest.mark.parametrize(("batch", "rank"), [(3, RANK), (2, RANK + 1)], ids=["batch", "width"])
def test_tokens_that_do_not_fit_those_held_are_refused(batch, rank):
    cache = LatentCache()
    cache.update(*latents(4), 0)
    with pytest.raises(ValueError, match=rf"\(2, 1\) \+ \(tokens, 28\), got \({batch}, 1, 1, {rank}\)"):
        cache.update(torch.zeros(batch, 1, 1, rank), torch.zeros(batch, 1, 1, ROPE), 0)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("family", ["llm", "moe16b"])
def test_a_config_without_latents_is_refused(family):
    with pytest.raises(ValueError, match="no kv_lora_rank: use transformers' DynamicCache"):
        LatentCache(tiny_config(family))


@pytest.mark.parametrize("config", [None, "v3"])
def test_it_is_a_dynamic_cache_with_or_without_a_config(config):
    cache = LatentCache(config and tiny_config(config))
    assert isinstance(cache, DynamicCache)
    append([cache], 5)
    assert (len(cache.layers), cache.get_seq_length()) == (LAYERS, 5)
    assert cache.get_mask_sizes(2, 0) == (7, 0)
    assert cache.is_croppable
    assert not cache.is_compileable


def gradients_of_two_calls(mode: str, trainable: str, cached: bool) -> dict[str, torch.Tensor]:
    model = tiny_model("v3", mla_mode=mode)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    tokens = tiny_tokens(model.config, 2, 9)
    cache = LatentCache(model.config)
    if cached:
        chunks = (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])
        logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    else:
        logits = model(tokens).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("trainable", ["", "q_b_proj", "kv_b_proj"], ids=["all", "q_b_proj", "kv_b_proj"])
def test_gradients_through_cached_calls_equal_those_of_one_call(mode, trainable):
    expected = gradients_of_two_calls("expanded", trainable, cached=False)
    result = gradients_of_two_calls(mode, trainable, cached=True)
    assert expected
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(result[name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("dropped", [0, 2])
def test_steps_without_gradients_leave_the_graph_of_earlier_ones_alone(dropped):
    cache, (latent, k_rope) = LatentCache(), latents(5)
    latent.requires_grad_()
    held, _ = cache.update(latent, k_rope, 0)
    loss = held.square().sum()
    with torch.no_grad():
        cache.crop(-dropped)
        for _ in range(3):  # the first one or two fit in the place of what was dropped
            cache.update(*latents(1), 0)
    loss.backward()
    torch.testing.assert_close(latent.grad, 2 * latent)
    assert cache.get_seq_length() == 8 - dropped
    assert torch.equal(cache.layers[0].keys[:, :, : 5 - dropped], latent[:, :, : 5 - dropped])
    assert not cache.layers[0].keys.requires_grad


def test_steps_without_gradients_are_in_place_again_after_one_with_them():
    cache = LatentCache()
    cache.update(*(states.requires_grad_() for states in latents(5)), 0)
    with torch.no_grad():
        cache.update(*latents(1), 0)
        before = addresses(cache)
        cache.update(*latents(1), 0)
    assert addresses(cache) == before


def test_a_cache_filled_in_inference_mode_can_be_continued_outside_it():
    with torch.inference_mode():
        cache, reference = filled(5)
    with torch.no_grad():
        append((cache, reference), 3)
    assert_same(cache, reference)


def test_a_deep_copy_goes_its_own_way():
    ours, theirs = filled(5)
    twin = copy.deepcopy(ours)
    append([twin], 3)
    assert_same(ours, theirs)
    assert twin.get_seq_length() == 8
    assert not set(addresses(ours)) & set(addresses(twin))


def test_offloaded_layers_come_back_as_they_were():
    ours, theirs = filled(70, 1)
    for layer in ours.layers:
        layer.offload()
        assert layer.keys.device.type == "cpu"
        layer.prefetch()
    assert_same(ours, theirs)
    append((ours, theirs), 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
def test_steps_with_it_equal_a_model_without_cache(family, mode):
    model = tiny_model(family, mla_mode=mode)
    tokens = tiny_tokens(model.config, 2, 12)
    cache = LatentCache(model.config)
    with torch.no_grad():
        steps = [model(chunk, past_key_values=cache).logits for chunk in tokens.split((7, 1, 1, 3), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_cache_of_another_number_of_layers_is_an_error_before_anything_is_written(layers):
    model = tiny_model("v3")  # three layers
    cache = LatentCache(tiny_config("v3", num_hidden_layers=layers))
    with pytest.raises(ValueError, match=f"built for {layers} layers, and the model has 3"):
        model(torch.arange(5, 9)[None], past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("devices", "dtypes", "bits", "expected"),
    [
        ("gpu", ("bfloat16", "bfloat16"), None, True),
        ("gpu", ("float32", "bfloat16"), None, False),
        ("gpu", ("bfloat16", "bfloat16"), 8, False),
        ("cpu", ("bfloat16", "bfloat16"), None, False),
    ],
)
def test_only_a_gpu_has_them_side_by_side_and_only_in_one_dtype(devices, dtypes, bits, expected, monkeypatch):
    monkeypatch.undo()
    (layer,) = LatentCache(tiny_config("v3", num_hidden_layers=1), bits=bits).layers
    layer._buffers = [SimpleNamespace(is_cuda=devices == "gpu", dtype=dtype) for dtype in dtypes]
    assert layer._side_by_side() == expected


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1], ids=["keys", "values"])
def test_one_part_may_be_assigned_between_two_updates(first):
    ours, theirs = filled(5)
    for cache in (ours, theirs):
        for layer in cache.layers:
            name = ("keys", "values")[first]
            setattr(layer, name, 2 * getattr(layer, name))
    append([ours, theirs], 1)
    assert_same(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[True, False, True], [-1, 0], [1]], ids=str)
def test_rows_are_selected_as_tensors_select_them(rows):
    ours, theirs = filled(5, batch=3)
    kept = [(layer.keys[torch.tensor(rows)], layer.values[torch.tensor(rows)]) for layer in theirs.layers]
    ours.batch_select_indices(torch.tensor(rows))
    for layer, (keys, values) in zip(ours.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@torch.no_grad()
def test_rows_that_could_not_be_moved_stay_as_they_were(monkeypatch):
    ours, theirs = filled(5, batch=3)
    copies = []

    def interrupted(target, source):
        copies.append(1)
        if len(copies) == 2:  # the rope keys of the first layer
            raise KeyboardInterrupt
        return copy_(target, source)

    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.reorder_cache(torch.tensor([1, 0, 2]))
    monkeypatch.undo()
    assert_same(ours, theirs)


@torch.no_grad()
def test_what_autocast_left_in_two_dtypes_is_kept_and_saved(tmp_path, side_by_side):
    model, ids = tiny_model("v3"), tiny_tokens(tiny_config("v3"), length=9)
    cache = LatentCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=cache)
    cache.save(tmp_path / "prefix")
    again = LatentCache.load(tmp_path / "prefix", model.config)
    for layer, other in zip(again.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values.float())
    with torch.autocast("cpu", torch.bfloat16):
        steps = [model(ids[:, :1], past_key_values=each).logits for each in (again, cache)]
    assert torch.equal(*steps)


@torch.no_grad()
def test_what_was_saved_is_loaded_and_goes_on(tmp_path):
    ours, theirs = filled(70, 3)
    ours.save(tmp_path / "prefix")
    again = LatentCache.load(tmp_path / "prefix", tiny_config("v3"))
    assert_same(again, theirs)
    append([again, theirs], 80)
    assert_same(again, theirs)
