"""Absorbed attention: the form that is used, its reference and plain expanded attention are one function."""

from typing import NamedTuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_deepseek import ops, plain_attention
from modeling_deepseek.ops import attend_latents
from modeling_deepseek.plain_attention import (
    absorbed_attention,
    absorbed_attention_in_blocks,
    absorbed_attention_reference,
    blocked_causal_attention,
)


class Sizes(NamedTuple):
    """B, S queries, T keys, H heads, latent rank c, head sizes n, r, v."""

    batch: int = 2
    queries: int = 3
    keys: int = 7
    heads: int = 4
    rank: int = 20
    nope: int = 12
    rope: int = 8
    value: int = 10

    def __str__(self) -> str:
        return "B{}S{}T{}H{}c{}n{}r{}v{}".format(*self)


TINY = Sizes()
SIZES = pytest.mark.parametrize(
    "sizes",
    [TINY, TINY._replace(queries=1), TINY._replace(batch=1, queries=7), TINY._replace(heads=1, value=33)],
    ids=str,
)
FORMS = pytest.mark.parametrize("form", [absorbed_attention, absorbed_attention_reference])


def inputs(sizes: Sizes, dtype: torch.dtype = torch.double) -> list[torch.Tensor]:
    """q_nope, q_rope, latent, k_rope, w_uk, w_uv."""
    batch, queries, keys, heads, rank, nope, rope, value = sizes
    shapes = (
        (batch, heads, queries, nope),
        (batch, heads, queries, rope),
        (batch, keys, rank),
        (batch, keys, rope),
        (heads, nope, rank),
        (heads, value, rank),
    )
    tensors = [torch.randn(shape, dtype=torch.double) for shape in shapes]
    tensors[4] /= nope**0.5
    tensors[5] /= rank**0.5
    return [tensor.to(dtype) for tensor in tensors]


def expanded_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, scaling, visible=None):
    """Multi-head attention over the keys and values that the latents stand for, one head at a time."""
    outputs, weights = [], []
    for head in range(q_nope.shape[1]):
        key = torch.cat((latent @ w_uk[head].T, k_rope), dim=-1)
        value = latent @ w_uv[head].T
        query = torch.cat((q_nope[:, head], q_rope[:, head]), dim=-1)
        scores = query @ key.transpose(1, 2) * scaling
        if visible is not None:
            scores = scores.masked_fill(~visible.expand(-1, q_nope.shape[1], -1, -1)[:, head], float("-inf"))
        weights.append(scores.softmax(dim=-1))
        outputs.append(weights[-1] @ value)
    return torch.stack(outputs, dim=1), torch.stack(weights, dim=1)


def causal(sizes: Sizes) -> torch.Tensor:
    return torch.ones(sizes.queries, sizes.keys, dtype=torch.bool).tril(sizes.keys - sizes.queries)[None, None]


def gradients(form, tensors, *args, **kwargs) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, _ = form(*leaves, *args, **kwargs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weight).sum(), leaves)


@FORMS
@SIZES
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "causal"])
def test_it_equals_expanded_attention_in_fp64(form, sizes, masked):
    tensors, mask = inputs(sizes), causal(sizes) if masked else None
    output, probs = form(*tensors, 0.3, mask)
    expected, weights = expanded_attention(*tensors, 0.3, mask)
    assert output.dtype == probs.dtype == torch.double
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(probs, weights, rtol=0, atol=1e-10)


@FORMS
@SIZES
def test_its_gradients_equal_those_of_expanded_attention_in_fp64(form, sizes):
    tensors, mask = inputs(sizes), causal(sizes)
    expected = gradients(expanded_attention, tensors, 0.3, mask)
    for ours, theirs in zip(gradients(form, tensors, 0.3, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@FORMS
@SIZES
def test_it_equals_expanded_attention_in_fp32(form, sizes):
    tensors, mask = inputs(sizes, torch.float32), causal(sizes)
    output, probs = form(*tensors, 0.3, mask)
    expected, weights = expanded_attention(*(tensor.double() for tensor in tensors), 0.3, mask)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(probs.double(), weights, rtol=0, atol=1e-6)


@SIZES
def test_its_gradients_equal_those_of_the_reference_in_fp32(sizes):
    tensors, mask = inputs(sizes, torch.float32), causal(sizes)
    expected = gradients(absorbed_attention_reference, tensors, 0.3, mask)
    for ours, theirs in zip(gradients(absorbed_attention, tensors, 0.3, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@FORMS
@SIZES
def test_bf16_stays_within_its_rounding_of_fp32(form, sizes):
    tensors, mask = inputs(sizes, torch.bfloat16), causal(sizes)
    output, probs = form(*tensors, 0.3, mask)
    expected, weights = absorbed_attention_reference(*(tensor.float() for tensor in tensors), 0.3, mask)
    assert output.dtype == probs.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(probs.float(), weights, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("fast", [True, False], ids=["native products", "products in fp32 blocks"])
def test_fp32_does_not_depend_on_how_the_processor_multiplies_bf16(fast, block, monkeypatch):
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda device, dtype: fast)
    monkeypatch.setattr(plain_attention, "UPCAST_BLOCK", block)
    tensors, mask = inputs(TINY, torch.float32), causal(TINY)
    for ours, theirs in zip(
        absorbed_attention(*tensors, 0.3, mask), expanded_attention(*tensors, 0.3, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    expected = gradients(expanded_attention, tensors, 0.3, mask)
    for ours, theirs in zip(gradients(absorbed_attention, tensors, 0.3, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_fp32_blocks_round_once_at_the_end(dtype, monkeypatch):
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda device, dtype: False)
    monkeypatch.setattr(plain_attention, "UPCAST_BLOCK", 3)
    tensors, mask = inputs(TINY, dtype), causal(TINY)
    output, probs = absorbed_attention(*tensors, 0.3, mask)
    expected, weights = absorbed_attention_reference(*(tensor.float() for tensor in tensors), 0.3, mask)
    torch.testing.assert_close(output, expected.to(dtype))
    torch.testing.assert_close(probs, weights.to(dtype))


@pytest.mark.parametrize("sizes", [Sizes(1, 2, 9, 128, 512, 128, 64, 128)], ids=str)
def test_the_geometry_of_v3_equals_expanded_attention(sizes):
    tensors, mask = inputs(sizes, torch.float32), causal(sizes)
    output, probs = absorbed_attention(*tensors, 192**-0.5, mask)
    expected, weights = expanded_attention(*tensors, 192**-0.5, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(probs, weights, rtol=0, atol=1e-5)


@FORMS
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=lambda s: f"B{s[0]}H{s[1]}")
@pytest.mark.parametrize("floor", [float("-inf"), torch.finfo(torch.float32).min], ids=["-inf", "min"])
def test_a_boolean_mask_and_its_additive_form_mean_the_same(form, shape, floor):
    tensors = inputs(TINY, torch.float32)
    mask = torch.rand(*shape, TINY.queries, TINY.keys) > 0.4
    mask[..., 0] = True
    additive = torch.zeros(mask.shape).masked_fill(~mask, floor)
    expected, weights = expanded_attention(*tensors, 0.3, mask.expand(TINY.batch, -1, -1, -1))
    for given in (mask, additive):
        output, probs = form(*tensors, 0.3, given)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(probs, weights)


@FORMS
def test_an_additive_mask_shifts_the_scores(form):
    tensors, bias = inputs(TINY), torch.randn(1, 4, TINY.queries, TINY.keys, dtype=torch.double)
    _, plain = form(*tensors, 0.3)
    _, shifted = form(*tensors, 0.3, bias)
    torch.testing.assert_close(shifted, (plain.log() + bias).softmax(dim=-1), rtol=0, atol=1e-6)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive min", "additive -inf"])
def test_rows_that_see_nothing_are_finite_and_leave_the_others_alone(form, kind, dtype):
    tensors = inputs(TINY, dtype)
    mask = torch.ones(2, 1, TINY.queries, TINY.keys, dtype=torch.bool)
    mask[1, :, :2] = False
    given = mask
    if kind != "boolean":
        floor = torch.finfo(dtype).min if "min" in kind else float("-inf")
        given = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, floor)
    output, probs = form(*tensors, 0.3, given)
    assert output.isfinite().all()
    assert probs.isfinite().all()
    expected, _ = form(*tensors, 0.3)
    assert torch.equal(output[0], expected[0])
    assert torch.equal(output[1, :, 2], expected[1, :, 2])
    assert all(gradient.isfinite().all() for gradient in gradients(form, tensors, 0.3, given))


@FORMS
def test_what_the_mask_hides_may_hold_anything(form):
    tensors = inputs(TINY, torch.float32)
    mask = torch.ones(1, 1, 1, TINY.keys, dtype=torch.bool)
    mask[..., -2:] = False
    expected, _ = form(*tensors, 0.3, mask)
    tensors[2][:, -2:], tensors[3][:, -2:] = 1e4, -1e4
    assert torch.equal(form(*tensors, 0.3, mask)[0], expected)


@FORMS
@pytest.mark.parametrize("scaling", [0.0, 0.114721, 3.0])
def test_the_softmax_scale_multiplies_both_parts_of_the_score(form, scaling):
    tensors = inputs(TINY)
    output, probs = form(*tensors, scaling)
    expected, weights = expanded_attention(*tensors, scaling)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probs, weights, rtol=0, atol=1e-6)


@FORMS
def test_inputs_may_be_views_with_any_strides(form):
    tensors = inputs(TINY)
    strided = [torch.stack((tensor, tensor + 1), dim=-1)[..., 0] for tensor in tensors]
    strided[0] = strided[0].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(form(*strided, 0.3)[0], form(*tensors, 0.3)[0])


def test_no_dropout_is_exact_and_dropout_thins_the_weights():
    tensors = inputs(TINY._replace(keys=400), torch.float32)
    exact, kept = absorbed_attention(*tensors, 0.3)
    again, _ = absorbed_attention(*tensors, 0.3, dropout=0.0)
    assert torch.equal(exact, again)
    _, thinned = absorbed_attention(*tensors, 0.3, dropout=0.25)
    survivors = thinned != 0
    assert survivors.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(thinned[survivors], kept[survivors] / 0.75)


MATH, FLASH, EFFICIENT, CUDNN = range(4)  # as PyTorch numbers them


@pytest.mark.parametrize(
    ("as_it_is", "equal", "padded"),
    [
        (EFFICIENT, FLASH, True),  # A100, and H100 where cuDNN is not preferred
        (CUDNN, CUDNN, False),  # H100
        (FLASH, FLASH, False),
        (EFFICIENT, CUDNN, True),
        (EFFICIENT, EFFICIENT, False),  # fp32
        (MATH, MATH, False),
    ],
)
def test_values_are_padded_where_pytorch_chooses_a_faster_kernel_then(as_it_is, equal, padded, monkeypatch):
    asked = []

    def choice(query, key, value, mask, dropout, causal):
        asked.append((query.requires_grad, dropout, causal))
        return equal if query.shape == value.shape else as_it_is

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    arguments = (torch.device("cpu"), torch.bfloat16, 192, 128, True, 0.25)
    assert ops.gpu_wants_padded_values(*arguments) is padded
    assert asked == [(True, 0.25, True)] * (1 if as_it_is in (FLASH, CUDNN) else 2)


def test_pytorch_answers_the_question_for_padded_values():
    """On a CPU, too, it chooses flash attention for equal widths only; and a graph is not broken by it."""

    def run(x):
        return x + ops.gpu_wants_padded_values(x.device, x.dtype, 192, 128, x.requires_grad, 0.0)

    assert ops.gpu_wants_padded_values(torch.device("cpu"), torch.bfloat16, 192, 128, False, 0.0)
    assert not ops.gpu_wants_padded_values(torch.device("cpu"), torch.bfloat16, 192, 192, False, 0.0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which leaves none for other widths
        assert ops.gpu_wants_padded_values(torch.device("cpu"), torch.bfloat16, 192, 128, False, 0.0)
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(2)).eq(1).all()


def attention_in_fp64(query, key, value, scaling, seen):
    scores = (query.double() @ key.double().transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize(
    ("length", "keys", "heads"), [(1, 1, 2), (16, 16, 3), (37, 37, 1), (129, 129, 2), (20, 61, 2), (128, 128, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_queries_equal_all_at_once(length, keys, heads, masked, dtype, monkeypatch):
    """Without a mask query i sees i + 1 keys, however many there are; with one, what it says, left padding for instance."""
    monkeypatch.setattr(plain_attention, "SCORES", 16 * 2 * heads * keys)  # blocks of 16
    query, key, value = (torch.randn(2, heads, n, d) for n, d in ((length, 24), (keys, 24), (keys, 16)))
    seen = torch.ones(length, keys, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if masked:
        seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length).repeat(2, 1, 1, 1)
        seen[1, ..., : keys // 3] = False
    query, key, value = (x.to(dtype) for x in (query, key, value))
    output = blocked_causal_attention(query, key, value, 0.2, seen if masked else None)
    rows = seen.any(-1)[:, 0]  # a query that sees nothing is only finite
    expected = attention_in_fp64(query, key, value, 0.2, seen)
    close = dict(rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(output[rows].double(), expected[rows], **close)
    assert output.shape == (2, length, heads, 16) and output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_blocks_do_not_see_what_a_mask_hides(dtype, number, monkeypatch):
    """Whatever it is; and rows that see nothing are spread evenly over all keys, also in fp16, whose range is small."""
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda *_: True)
    monkeypatch.setattr(plain_attention, "QUERY_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (2 * torch.randn(1, 2, 40, 32, generator=generator).to(dtype) for _ in range(3))
    query[..., 0], key[..., 0] = -8, 8  # all scores are far below 0
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None].clone()
    mask[..., :3] = False
    expected = blocked_causal_attention(query, key, value, 1.0, mask)
    mean = value.float().mean(2)[:, None].expand(1, 3, 2, 32)
    torch.testing.assert_close(expected[:, :3].float(), mean, rtol=2e-2, atol=2e-2)
    assert expected.isfinite().all()
    key[:, :, 0] = number
    torch.testing.assert_close(blocked_causal_attention(query, key, value, 1.0, mask), expected, rtol=0, atol=0)


def test_blocks_do_not_read_what_lies_behind():
    query, key, value = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    key[:, :, 40:] = value[:, :, 40:] = float("nan")
    assert blocked_causal_attention(query, key, value, 0.3).isfinite().all()


@pytest.mark.parametrize("kind", ["all", "causal", "padded", "additive", "nothing"])
@pytest.mark.parametrize("fast", [True, False], ids=["native products", "products in fp32"])
@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_latents_equal_all_at_once(kind, fast, dtype, monkeypatch):
    """Nine blocks, the last of one token; "padded" hides whole blocks from one row, "nothing" all of them."""
    monkeypatch.setattr(plain_attention, "KEY_BLOCK", 8)
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda device, dtype: fast or dtype.itemsize > 2)
    sizes = TINY._replace(keys=65)
    exact = inputs(sizes)
    mask = None if kind == "all" else torch.ones(2, 1, 3, 65, dtype=torch.bool).tril(62)
    if kind in ("padded", "additive"):
        mask[1, ..., :43] = False
    if kind == "nothing":
        mask[1] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected = absorbed_attention_reference(*exact, 0.3, mask)[0]
    output = absorbed_attention_in_blocks(*(x.to(dtype) for x in exact), 0.3, mask)
    assert output.dtype == dtype
    tolerance = {torch.double: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype] * expected.std()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance.item())


@torch.no_grad()
@pytest.mark.parametrize("heads", [16, 128])
def test_128k_cached_tokens(heads):
    """In the geometry of V2 and V3, 128 heads in blocks; one token in the middle outweighs all others."""
    keys = 131_073
    tensors = [x.float() for x in inputs(Sizes(1, 1, 1, heads, 512, 128, 64, 128))]
    tensors[2:4] = torch.randn(1, keys, 512), torch.randn(1, keys, 64)
    tensors[2][:, 70_000] = 4 * torch.einsum("hn,hnc->c", tensors[0][0, :, 0], tensors[4]) / heads**0.5
    output, _ = attend_latents(*tensors, 0.1147, weights=False)
    expected = absorbed_attention_reference(*(x.double() for x in tensors), 0.1147)[0]
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def test_128_heads_of_v3_over_a_long_cache(monkeypatch):
    """Scores are far apart: the largest differs from block to block."""
    tensors = inputs(Sizes(1, 1, 2 * plain_attention.KEY_BLOCK + 1, 128, 512, 128, 64, 128), torch.float32)
    tensors[2][0, ::500] *= 30
    monkeypatch.setattr(ops, "SCORES", 128 * tensors[2].shape[1] - 1)
    output, weights = attend_latents(*tensors, 0.1147, weights=False)
    assert weights is None
    expected = absorbed_attention(*tensors, 0.1147)[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    monkeypatch.setattr(ops, "absorbed_attention_in_blocks", None)
    assert attend_latents(*tensors, 0.1147, weights=True)[1] is not None
    fewer = [x[:, :-1] if i in (2, 3) else x for i, x in enumerate(tensors)]
    assert attend_latents(*fewer, 0.1147, weights=False)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("few", [0, 10**9], ids=["rows first", "tokens first"])
def test_scores_lie_either_way(few, dtype, monkeypatch):
    """With gradients, a mask, several rows of the batch, and latents that are converted a few at a time."""
    monkeypatch.setattr(plain_attention, "FEW_ROWS", few)
    monkeypatch.setattr(plain_attention, "UPCAST_BLOCK", 3)
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda device, dtype: dtype.itemsize > 2)
    exact = inputs(TINY)
    mask = torch.ones(2, 1, TINY.queries, TINY.keys, dtype=torch.bool).tril(TINY.keys - TINY.queries)
    mask[1, ..., :3] = False
    for x in exact:
        x.requires_grad_()
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    expected, weights = absorbed_attention_reference(*exact, 0.3, mask)
    output, own_weights = absorbed_attention(*ours, 0.3, mask)
    tolerance = 2e-5 if dtype == torch.float32 else 0.04
    found = [output, own_weights, *torch.autograd.grad(output.sum(), ours)]
    wanted = [expected, weights, *torch.autograd.grad(expected.sum(), exact)]
    for own, other in zip(found, wanted, strict=True):
        assert (own.double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_16_bits_have_their_softmax_in_fp32(monkeypatch, dtype):
    """4,096 weights of 1 / 4,096: a sum in bf16 ends at 256."""
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda *_: True)
    query, key = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.randn(1, 1, 4096, 8).to(dtype)
    value, mask = torch.ones(1, 1, 4096, 4, dtype=dtype), torch.ones(1, 1, 1, 4096, dtype=torch.bool)
    output = blocked_causal_attention(query, key, value, 1.0, mask)
    torch.testing.assert_close(output, torch.ones(1, 1, 1, 4, dtype=dtype), rtol=4e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_score_of_a_later_key_that_overflows_is_not_heard(monkeypatch, dtype):
    monkeypatch.setattr(plain_attention, "has_fast_gemm", lambda *_: True)
    query, key, value = (torch.rand(1, 2, 17, width).to(dtype) for width in (24, 24, 10))
    expected = blocked_causal_attention(query[:, :, :16], key[:, :, :16], value[:, :, :16], 1.0)
    key[:, :, 16] = torch.finfo(dtype).max
    torch.testing.assert_close(blocked_causal_attention(query, key, value, 1.0)[:, :16], expected, rtol=2e-2, atol=2e-2)


def test_no_queries_get_no_answers():
    empty = torch.randn(1, 2, 0, 8)
    assert blocked_causal_attention(empty, empty, empty, 1.0).shape == (1, 0, 2, 8)
