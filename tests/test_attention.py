"""Latent attention: both forms give the textbook result, whatever has become of `kv_b_proj`; and GQA against repeated heads."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.parametrizations import weight_norm
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from modeling_deepseek import LatentCache
from modeling_deepseek.attention import DeepseekLatentAttention, DeepseekMultiHeadAttention
from modeling_deepseek.rope import DeepseekRotaryEmbedding
from tiny import randomize, tiny_config, tiny_model, tiny_tokens

HIDDEN, HEADS, RANK, NOPE, ROPE, VALUE = 48, 4, 28, 16, 8, 10  # of the tiny configs
MODES = pytest.mark.parametrize("mode", ["expanded", "absorbed"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def built(mode: str = "auto", implementation: str = "sdpa", family: str = "v3", **overrides) -> nn.Module:
    """A lone attention module in eval mode; equal sizes give equal weights."""
    config = tiny_config(family, **(dict(mla_mode=mode) if family != "llm" else {}), **overrides)
    config._attn_implementation = implementation
    attention = (DeepseekMultiHeadAttention if family == "llm" else DeepseekLatentAttention)(config, 0).eval()
    randomize(attention)
    return attention


def with_mode(attention: nn.Module, mode: str) -> nn.Module:
    """`attention` itself, its config forced to `mode`."""
    attention.config.mla_mode = mode
    return attention


def positions(attention: nn.Module, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return DeepseekRotaryEmbedding(attention.config)(x, torch.arange(start, start + x.shape[1])[None])


def mask_of(attention: nn.Module, x: torch.Tensor, padding: torch.Tensor | None, cache=None):
    """What the model hands to its attention modules for `x`."""
    return create_causal_mask(
        config=attention.config, inputs_embeds=x, attention_mask=padding, past_key_values=cache, position_ids=None
    )


def attend(attention: nn.Module, x: torch.Tensor, padding: torch.Tensor | None = None, chunks=None) -> torch.Tensor:
    """Outputs for `x` `[B, S, d]`, without a cache or, by `chunks`, through one."""
    if chunks is None:
        return attention(x, positions(attention, x), mask_of(attention, x, padding))[0]
    cache, outputs, start = LatentCache(attention.config), [], 0
    for chunk in x.split(chunks, dim=1):
        seen = None if padding is None else padding[:, : start + chunk.shape[1]]
        mask = mask_of(attention, chunk, seen, cache)
        outputs.append(attention(chunk, positions(attention, chunk, start), mask, cache)[0])
        start += chunk.shape[1]
    return torch.cat(outputs, dim=1)


def gradients(attention: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the input and of all parameters that are trained."""
    leaves = {"x": x.clone().requires_grad_()} | {n: p for n, p in attention.named_parameters() if p.requires_grad}
    output = attend(attention, leaves["x"])
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


def padding_of(x: torch.Tensor) -> torch.Tensor:
    """Row 1 begins with two padded tokens."""
    padding = torch.ones(x.shape[:2], dtype=torch.long)
    padding[1, :2] = 0
    return padding


def textbook(attention: DeepseekLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """The equations of the DeepSeek-V2 paper in fp64, token by token and head by head, from the official tensors."""
    weights = {name.removesuffix(".weight"): tensor.double() for name, tensor in attention.state_dict().items()}
    x, length, outputs = x.double(), x.shape[0], []

    def norm(vector, name):
        return weights[name] * vector / (vector.square().mean() + 1e-6).sqrt()

    def rotated(vector, position):
        pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
        inv_freq = DeepseekRotaryEmbedding(attention.config).inv_freq.double()
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(inv_freq), position * inv_freq)).flatten()

    latents, keys = [], []
    for position in range(length):
        compressed = weights["kv_a_proj_with_mqa"] @ x[position]
        latents.append(norm(compressed[:RANK], "kv_a_layernorm"))
        keys.append(rotated(compressed[RANK:], position))
    up = weights["kv_b_proj"].view(HEADS, NOPE + VALUE, RANK)
    for position in range(length):
        if "q_proj" in weights:
            queries = weights["q_proj"] @ x[position]
        else:
            queries = weights["q_b_proj"] @ norm(weights["q_a_proj"] @ x[position], "q_a_layernorm")
        heads = []
        for head, query in enumerate(queries.view(HEADS, NOPE + ROPE)):
            query = torch.cat((query[:NOPE], rotated(query[NOPE:], position)))
            seen = range(position + 1)
            scores = torch.stack([query @ torch.cat((up[head, :NOPE] @ latents[j], keys[j])) for j in seen])
            probs = (scores * attention.scaling).softmax(dim=0)
            heads.append(sum(prob * up[head, NOPE:] @ latents[j] for prob, j in zip(probs, seen, strict=True)))
        outputs.append(weights["o_proj"] @ torch.cat(heads))
    return torch.stack(outputs)


@MODES
@IMPLEMENTATIONS
@pytest.mark.parametrize("q_lora_rank", [32, None], ids=["q latent", "no q latent"])
def test_it_equals_the_equations_of_the_paper(mode, implementation, q_lora_rank):
    attention = built(mode, implementation, q_lora_rank=q_lora_rank)
    x = torch.randn(1, 6, HIDDEN)
    torch.testing.assert_close(attend(attention, x)[0].double(), textbook(attention, x[0]), rtol=0, atol=2e-5)


@MODES
def test_it_equals_the_equations_of_the_paper_to_fp64(mode):
    attention, x = built(mode, "eager").double(), torch.randn(1, 6, HIDDEN, dtype=torch.double)
    torch.testing.assert_close(attend(attention, x)[0], textbook(attention, x[0]), rtol=0, atol=1e-6)
    other = with_mode(copy.deepcopy(attention), "expanded")
    torch.testing.assert_close(attend(attention, x), attend(other, x), rtol=0, atol=1e-10)


def test_the_norms_of_the_latents_keep_their_own_epsilon():
    attention = built(rms_norm_eps=0.5)
    assert attention.q_a_layernorm.variance_epsilon == attention.kv_a_layernorm.variance_epsilon == 1e-6


def test_attention_bias_reaches_the_projections_that_have_one_officially():
    names = {name for name, _ in built(attention_bias=True).named_parameters() if name.endswith("bias")}
    assert names == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}


@IMPLEMENTATIONS
@pytest.mark.parametrize("padded", [False, True], ids=["all seen", "left-padded"])
@pytest.mark.parametrize("chunks", [None, (9,), (4, 1, 1, 3), (1,) * 9], ids=["no cache", "9", "4+1+1+3", "9x1"])
def test_both_forms_agree_under_the_masks_of_the_model(implementation, padded, chunks):
    attention, x = built(implementation=implementation), torch.randn(2, 9, HIDDEN)
    padding = padding_of(x) if padded else None
    expanded = attend(with_mode(attention, "expanded"), x, padding, chunks)
    absorbed = attend(with_mode(attention, "absorbed"), x, padding, chunks)
    seen = slice(None) if padding is None else padding.bool()
    torch.testing.assert_close(absorbed[seen], expanded[seen], rtol=0, atol=2e-5)
    torch.testing.assert_close(expanded[seen], attend(attention, x, padding)[seen], rtol=0, atol=2e-5)
    assert absorbed.isfinite().all()


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@IMPLEMENTATIONS
def test_both_forms_agree_under_a_mask_of_the_user(implementation, kind, heads):
    attention, x = built(implementation=implementation), torch.randn(2, 7, HIDDEN)
    mask = torch.rand(2, heads, 7, 7) > 0.4
    mask |= torch.eye(7, dtype=torch.bool)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    results = [with_mode(attention, mode)(x, positions(attention, x), mask)[0] for mode in ("expanded", "absorbed")]
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("past", "new"), [(0, 9), (6, 3), (8, 1)], ids=["9", "6+3", "8+1"])
@pytest.mark.parametrize("kind", ["padding", "block"])
def test_the_absorbed_form_reads_padding_masks_and_block_masks(kind, past, new):
    attention, x = built("absorbed"), torch.randn(2, past + new, HIDDEN)
    padding = padding_of(x)
    expected = attend(with_mode(attention, "expanded"), x, padding)[:, past:]
    with_mode(attention, "absorbed")

    def seen(batch, head, query, key):
        return (key <= query + past) & padding[batch, key].bool()

    cache, before, after = LatentCache(attention.config), x[:, :past], x[:, past:]
    if past:
        attention(before, positions(attention, before), mask_of(attention, before, padding[:, :past]), cache)
    mask = padding if kind == "padding" else create_block_mask(seen, 2, None, new, past + new, device="cpu")
    result = attention(after, positions(attention, after, past), mask, cache)[0]
    rows = padding[:, past:].bool()
    torch.testing.assert_close(result[rows], expected[rows], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_forms_agree_within_rounding(dtype):
    attention, x = built(), torch.randn(2, 9, HIDDEN)
    expected = attend(attention, x)
    attention, x = attention.to(dtype), x.to(dtype)
    for mode in ("expanded", "absorbed"):
        result = attend(with_mode(attention, mode), x, chunks=(6, 1, 1, 1))
        assert result.dtype == dtype
        assert (result.float() - expected).std() < 0.02 * expected.std()


@MODES
def test_autocast_stays_within_bf16_rounding(mode):
    attention, x = built(mode), torch.randn(2, 9, HIDDEN)
    expected = attend(attention, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attend(attention, x, chunks=(6, 1, 1, 1))
    assert (result.float() - expected).std() < 0.02 * expected.std()


def test_gradients_of_both_forms_agree():
    attention, x = built(), torch.randn(2, 6, HIDDEN)
    expected = gradients(with_mode(attention, "expanded"), x)
    result = gradients(with_mode(attention, "absorbed"), x)
    assert len(expected) == 8
    assert_gradients_close(result, expected)


def assert_gradients_close(result: dict, expected: dict) -> None:
    assert result.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(result[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=name)


class LoraLike(nn.Module):
    """A linear layer plus a low-rank one, as adapters are."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight  # adapters show the frozen weight alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


class Int8Linear(nn.Module):
    """Rows of 8-bit numbers with a scale each, dequantised at every call."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.weight * self.scale).to(x.dtype))


def lora_like(attention):
    attention.kv_b_proj = LoraLike(attention.kv_b_proj)


def peft_lora(attention, **options):
    options = dict(r=4, lora_alpha=8, target_modules=["kv_b_proj"], init_lora_weights=False) | options
    inject_adapter_in_model(LoraConfig(**options), attention)


def affine(attention):
    bias = torch.randn(attention.kv_b_proj.out_features)  # LoRA with `lora_bias`
    attention.kv_b_proj.register_forward_hook(lambda module, args, output: output + bias)


def quantised(attention):
    attention.kv_b_proj = Int8Linear(attention.kv_b_proj)


def forward_hook(attention):
    attention.kv_b_proj.register_forward_hook(lambda module, args, output: output * 1.5)


def forward_pre_hook(attention):
    attention.kv_b_proj.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def replaced_forward(attention):
    plain = attention.kv_b_proj.forward
    attention.kv_b_proj.forward = lambda x: plain(x) * 0.5  # as offloading and tensor parallelism do


def parametrised(attention):
    weight_norm(attention.kv_b_proj)
    attention.kv_b_proj.parametrizations.weight.original0.data.mul_(1.5)


WRAPPERS = {
    "LoRA-like": lora_like,
    "peft LoRA": peft_lora,
    "peft rsLoRA": lambda attention: peft_lora(attention, use_rslora=True),
    "peft DoRA": lambda attention: peft_lora(attention, use_dora=True),
    "affine": affine,
    "quantised": quantised,
    "forward hook": forward_hook,
    "forward pre-hook": forward_pre_hook,
    "replaced forward": replaced_forward,
    "parametrised": parametrised,
}
WRAPPED = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def wrapped(wrap) -> DeepseekLatentAttention:
    attention = built()
    torch.manual_seed(1)
    wrap(attention)
    return attention


@WRAPPED
@pytest.mark.parametrize("chunks", [None, (6, 1, 1, 1)], ids=["no cache", "6+1+1+1"])
def test_both_forms_agree_when_kv_b_proj_is(wrap, chunks):
    attention, x = wrapped(wrap), torch.randn(2, 9, HIDDEN)
    results = [attend(with_mode(attention, mode), x, chunks=chunks) for mode in ("expanded", "absorbed", "auto")]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=5e-5)
    if wrap is not quantised:
        assert (results[0] - attend(built(), x)).abs().max() > 1e-2


@WRAPPED
def test_gradients_of_both_forms_agree_when_kv_b_proj_is(wrap):
    attention, x = wrapped(wrap), torch.randn(2, 6, HIDDEN)
    expected = gradients(with_mode(attention, "expanded"), x)
    assert_gradients_close(gradients(with_mode(attention, "absorbed"), x), expected)
    assert wrap is quantised or any("kv_b_proj" in name for name in expected)


def test_both_forms_of_a_whole_model_agree_with_an_adapter_and_after_merging_it():
    model = tiny_model("v3")
    tokens = tiny_tokens(model.config)
    plain = model(tokens).logits
    config = LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model.model)
    logits = [with_mode(model, mode)(tokens).logits for mode in ("expanded", "absorbed")]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-4)
    assert (logits[0] - plain).abs().max() > 1e-2
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    torch.testing.assert_close(with_mode(model, "absorbed")(tokens).logits, logits[0], rtol=0, atol=2e-4)


def lite_geometry(mode: str = "auto") -> DeepseekLatentAttention:
    """V2-Lite's head sizes and ranks; the choice does not depend on the number of heads."""
    sizes = dict(kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    return built(mode, num_attention_heads=2, **sizes)


@pytest.mark.parametrize(
    ("queries", "keys", "absorbed"),
    [
        (1, 2, True),
        (1, 65536, True),
        (5, 4096, True),
        (128, 4224, True),
        (128, 128, False),
        (160, 65536, True),
        (192, 1024, False),
        (192, 8192, True),
        (64, 64, False),
        (256, 4352, False),
        (256, 256, False),
    ],
)
def test_auto_absorbs_few_new_tokens_that_meet_a_cache(queries, keys, absorbed):
    attention = lite_geometry()
    assert attention.use_absorbed(queries, keys, True) is absorbed
    assert attention.use_absorbed(queries, keys, False) is False
    assert attention.train().use_absorbed(queries, keys, True) is False


def test_elsewhere_than_on_a_cpu_auto_stops_at_128_new_tokens():
    attention = lite_geometry().to("meta")
    attention.kv_b_proj = torch.nn.Linear(512, 512, bias=False)
    assert attention.use_absorbed(128, 8192, True) and not attention.use_absorbed(129, 8192, True)


@pytest.mark.parametrize(("keys", "absorbed"), [(100, False), (4096, True)])
def test_auto_counts_what_reading_a_wrapped_kv_b_proj_costs(keys, absorbed):
    attention = lite_geometry()
    forward_hook(attention)
    assert attention.use_absorbed(1, keys, True) is absorbed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("queries", "keys", "cached"), [(1, 4096, True), (256, 256, False)])
@MODES
def test_a_forced_mode_always_holds(mode, queries, keys, cached, training):
    attention = lite_geometry(mode).train(training)
    assert attention.use_absorbed(queries, keys, cached) is (mode == "absorbed")


@pytest.mark.parametrize("queries", [1, 3])
def test_auto_runs_the_form_that_it_chose(queries, monkeypatch):
    attention, x = built(), torch.randn(1, 20 + queries, HIDDEN)
    expected = attend(with_mode(attention, "expanded"), x)
    with_mode(attention, "auto")
    ran = []
    for form in ("expand", "attend_absorbed"):
        plain = getattr(attention, form)
        monkeypatch.setattr(
            attention, form, lambda *args, f=form, p=plain, **kwargs: ran.append(f) or p(*args, **kwargs)
        )
    torch.testing.assert_close(attend(attention, x, chunks=(20, queries)), expected, rtol=0, atol=2e-5)
    chosen = "attend_absorbed" if attention.use_absorbed(queries, 20 + queries, True) else "expand"
    assert ran == ["expand", chosen]


@MODES
@pytest.mark.parametrize(("past", "new"), [(0, 7), (6, 1)], ids=["7", "6+1"])
def test_eager_returns_weights_that_sum_to_one(mode, past, new):
    attention, x = built(mode, "eager"), torch.randn(2, past + new, HIDDEN)
    cache = LatentCache(attention.config)
    if past:
        attention(x[:, :past], positions(attention, x[:, :past]), mask_of(attention, x[:, :past], None), cache)
    new_x = x[:, past:]
    _, weights = attention(new_x, positions(attention, new_x, past), mask_of(attention, new_x, None, cache), cache)
    assert weights.shape == (2, HEADS, new, past + new)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, HEADS, new))
    assert not weights.triu(past + 1).any()


def test_eager_weights_of_both_forms_agree():
    attention, x = built(implementation="eager"), torch.randn(2, 7, HIDDEN)
    mask = mask_of(attention, x, None)
    expanded, absorbed = (
        with_mode(attention, mode)(x, positions(attention, x), mask)[1] for mode in ("expanded", "absorbed")
    )
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-5)


@MODES
def test_sdpa_returns_no_weights(mode):
    attention, x = built(mode), torch.randn(1, 3, HIDDEN)
    assert attention(x, positions(attention, x), None)[1] is None


@MODES
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_output_attentions_of_a_model_has_one_entry_per_layer(family, mode):
    model = tiny_model(family, mla_mode=mode)
    model.set_attn_implementation("eager")
    tokens = tiny_tokens(model.config)
    attentions = model(tokens, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, HEADS, 10, 10)] * 3
    assert all(torch.allclose(weights.sum(dim=-1), torch.ones(2, HEADS, 10)) for weights in attentions)


@MODES
@IMPLEMENTATIONS
def test_dropout_acts_in_training_only(mode, implementation):
    attention, x = built(mode, implementation, attention_dropout=0.5), torch.randn(1, 7, HIDDEN)
    plain = attend(built(mode, implementation), x)
    assert torch.equal(attend(attention, x), plain)
    assert (attend(attention.train(), x) - plain).abs().max() > 1e-2


@IMPLEMENTATIONS
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
def test_grouped_heads_equal_repeated_keys_and_values(implementation, heads):
    attention, x = (
        built(implementation=implementation, family="llm", num_key_value_heads=heads),
        torch.randn(2, 7, HIDDEN),
    )
    cos, sin = (table[0].double()[..., 6:] for table in positions(attention, x))
    weights = {name: tensor.double() for name, tensor in attention.state_dict().items()}

    def projected(name, head, rotate=True):
        states = (x.double() @ weights[f"{name}_proj.weight"].T)[..., head * 12 : head * 12 + 12]
        first, second = states[..., :6], states[..., 6:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1) if rotate else states

    outputs = []
    for head in range(HEADS):
        shared = head // (HEADS // heads)
        scores = projected("q", head) @ projected("k", shared).transpose(1, 2) * attention.scaling
        probs = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(dim=-1)
        outputs.append(probs @ projected("v", shared, rotate=False))
    expected = torch.cat(outputs, dim=-1) @ weights["o_proj.weight"].T
    torch.testing.assert_close(attend(attention, x).double(), expected, rtol=0, atol=2e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("heads", [2, 4], ids=["GQA", "MHA"])
def test_grouped_heads_step_by_step_equal_all_at_once(implementation, heads):
    attention, x = (
        built(implementation=implementation, family="llm", num_key_value_heads=heads),
        torch.randn(2, 7, HIDDEN),
    )
    cache, outputs = DynamicCache(), []
    for start, chunk in zip((0, 4, 5), x.split((4, 1, 2), dim=1), strict=True):
        mask = mask_of(attention, chunk, None, cache)
        outputs.append(attention(chunk, positions(attention, chunk, start), mask, cache)[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), attend(attention, x), rtol=0, atol=1e-5)
    assert cache.layers[0].keys.shape == (2, heads, 7, 12)


def test_a_head_size_of_its_own_is_kept():
    attention = built(family="llm", head_dim=20)
    assert attention.q_proj.weight.shape == (80, HIDDEN)
    assert attention.scaling == 20**-0.5
    assert attend(attention, torch.randn(1, 3, HIDDEN)).shape == (1, 3, HIDDEN)


def test_absorbed_attention_under_static_length_ignores_what_lies_behind():
    attention, x = built("absorbed"), torch.randn(1, 6, HIDDEN)
    expected = attend(attention, x)

    def padded(latent, k_rope, layer_idx):
        return F.pad(latent, (0, 0, 0, 5)), F.pad(k_rope, (0, 0, 0, 5), value=7.0)

    mask = F.pad(torch.ones(6, 6, dtype=torch.bool).tril(), (0, 5))[None, None]
    result = attention(x, positions(attention, x), mask, SimpleNamespace(update=padded))[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("asked", [{}, {"is_causal": False}], ids=str)
def test_a_prefill_without_gradients_is_the_one_with_them(asked):
    model = tiny_model("v3", attn_implementation="sdpa")
    tokens = tiny_tokens(model.config, 2, 19)
    with_gradients = model(tokens, use_cache=False, **asked).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, use_cache=False, **asked).logits, with_gradients, rtol=0, atol=1e-4)


def test_a_bias_of_positions_is_left_to_pytorchs_attention():
    """Blocks of queries know masks only; a bias that were dropped would change what comes out."""
    attention, x = built(), torch.randn(2, 9, 48)
    with torch.no_grad():
        assert attention.blocks_queries(x, None)
        assert not attention.blocks_queries(x, None, position_bias=torch.zeros(1, 4, 9, 9))
