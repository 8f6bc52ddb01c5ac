"""Rotary positions: golden YaRN numbers, both mscales, and rotations against fp64 arithmetic."""

import math

import pytest
import torch

from modeling_deepseek.attention import DeepseekLatentAttention
from modeling_deepseek.rope import (
    DeepseekRotaryEmbedding,
    attention_softmax_scale,
    rotate_halves,
    rotate_interleaved,
    rotation_tables,
    yarn_attention_factor,
    yarn_mscale,
)
from tiny import tiny_config, tiny_model, tiny_tokens

YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1
)
ROTATIONS = pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])


def tables(rotate, cos, sin):
    """What `rotate` takes, of cos and sin of every pair."""
    return rotation_tables(cos, sin, interleaved=rotate is rotate_interleaved)


def released_config(**mscales):
    """Head sizes, positions and YaRN of V2 and V3."""
    sizes = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, max_position_embeddings=163840)
    return tiny_config("v3", **sizes, rope_scaling=None, rope_parameters=YARN | mscales)


def rotated_in_complex(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The textbook: pairs are complex numbers, multiplied by `e^(i * angle)`; all in fp64."""
    pairs = x.double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack((turned.real, turned.imag), dim=-1 if interleaved else -2).flatten(-2)


@pytest.mark.parametrize(
    ("pair", "golden"),
    [(10, 0.05623413), (11, 0.03900693), (16, 0.0055), (22, 0.00017783), (23, 0.00003334), (31, 0.00000333)],
)
def test_yarn_frequencies_are_the_released_ones(pair, golden):
    inv_freq = DeepseekRotaryEmbedding(released_config()).inv_freq
    assert inv_freq.shape == (32,)
    assert inv_freq[pair].item() == pytest.approx(golden, abs=6e-9)


@pytest.mark.parametrize("pair", range(11))
def test_yarn_leaves_fast_pairs_alone(pair):
    inv_freq = DeepseekRotaryEmbedding(released_config()).inv_freq
    assert inv_freq[pair].item() == pytest.approx(10000 ** (-pair / 32), rel=1e-6)


@pytest.mark.parametrize(
    ("mscale", "golden", "scale"),
    [(0.707, 1.260804, 0.114721), (1.0, 1.368888, 0.135234)],
    ids=["V2: 0.707", "V2.5, V3: 1.0"],
)
def test_both_released_mscales_give_their_softmax_scale(mscale, golden, scale):
    config = released_config(mscale=mscale, mscale_all_dim=mscale)
    assert yarn_mscale(40, mscale) == pytest.approx(golden, abs=5e-7)
    assert attention_softmax_scale(config.rope_parameters, 192) == pytest.approx(scale, abs=5e-7)
    assert DeepseekLatentAttention(config, 0).scaling == pytest.approx(scale, abs=5e-7)
    assert DeepseekRotaryEmbedding(config).attention_scaling == 1.0


@pytest.mark.parametrize("rope_parameters", [dict(rope_type="default"), YARN, YARN | dict(mscale=0.707)])
def test_the_softmax_scale_is_plain_without_mscale_all_dim(rope_parameters):
    assert attention_softmax_scale(rope_parameters, 192) == 192**-0.5 == pytest.approx(0.0721688, abs=5e-8)


def test_mscale_is_one_without_stretching():
    assert yarn_mscale(1, 0.707) == yarn_mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("mscales", "expected"),
    [
        (dict(mscale=0.707, mscale_all_dim=0.707), 1.0),
        (dict(mscale=1.0, mscale_all_dim=0.707), 1.368888 / 1.260804),
        (dict(mscale=0.707), 1.260804),
        (dict(mscale=0.707, mscale_all_dim=0), 1.260804),
        (dict(mscale_all_dim=0.707), 1.368888 / 1.260804),
        (dict(mscale=None, mscale_all_dim=None), 1.368888),
        ({}, 1.368888),
        (dict(mscale=0.707, mscale_all_dim=1.0, attention_factor=1.5), 1.5),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) or "neither" if isinstance(value, dict) else "",
)
def test_cos_and_sin_carry_the_ratio_of_the_mscales(mscales, expected):
    rope = DeepseekRotaryEmbedding(released_config(**mscales))
    assert yarn_attention_factor(rope.config.rope_parameters) == pytest.approx(expected, rel=1e-6)
    cos, sin = rope(torch.zeros(1), torch.tensor([[0, 7]]))
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, expected))


def test_without_scaling_the_frequencies_are_powers_of_theta():
    config = tiny_config("llm", rope_parameters=dict(rope_type="default", rope_theta=5e5), head_dim=32)
    expected = torch.tensor([5e5 ** (-pair / 16) for pair in range(16)])
    torch.testing.assert_close(DeepseekRotaryEmbedding(config).inv_freq, expected)


def test_positions_of_every_row_are_its_own():
    rope = DeepseekRotaryEmbedding(released_config())
    positions = torch.tensor([[0, 1, 2], [5, 0, 100000]])
    cos, sin = rope(torch.zeros(1), positions)
    angles = positions[..., None].double() * rope.inv_freq.double()
    factor = rope.attention_scaling
    expected = rotation_tables(angles.cos() * factor, angles.sin() * factor, interleaved=True)
    torch.testing.assert_close(cos.double(), expected[0], rtol=0, atol=1e-2)  # fp32 angles of 1e5 radians
    torch.testing.assert_close(sin[0].double(), expected[1][0], rtol=0, atol=1e-6)


def test_tables_are_fp32_in_a_bf16_model():
    rope = DeepseekRotaryEmbedding(released_config())
    cos, sin = rope(torch.zeros(1, dtype=torch.bfloat16), torch.arange(9)[None])
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1, 9, 64)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_casting_the_model_does_not_round_the_frequencies(cast):
    rope = DeepseekRotaryEmbedding(released_config())
    positions = torch.tensor([[4000]])
    expected = rope(torch.zeros(1), positions)
    torch.testing.assert_close(cast(rope)(torch.zeros(1), positions), expected, rtol=0, atol=0)


def test_frequencies_are_fp32_after_building_a_model_in_bf16():
    model = tiny_model("v3", "Model")
    built = type(model)._from_config(model.config, dtype=torch.bfloat16)
    torch.testing.assert_close(built.rotary_emb.inv_freq, model.rotary_emb.inv_freq, rtol=0, atol=0)


@ROTATIONS
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 7, 64)], ids=str)
def test_rotation_is_complex_multiplication(rotate, shape):
    x, angles = torch.randn(shape), torch.randn(shape[-2], shape[-1] // 2, dtype=torch.double) * 10
    expected = rotated_in_complex(x, angles, interleaved=rotate is rotate_interleaved)
    rotated = rotate(x, *tables(rotate, angles.cos().float(), angles.sin().float()))
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=1e-6)


@ROTATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_rotated_in_fp32_and_rounded_once(rotate, dtype):
    x, angles = torch.randn(4, 512, 64).to(dtype), torch.rand(512, 32, dtype=torch.double) * 100
    rotated = rotate(x, *tables(rotate, angles.cos().float(), angles.sin().float()))
    exact = rotated_in_complex(x, angles, interleaved=rotate is rotate_interleaved)
    assert rotated.dtype == dtype
    assert (rotated == exact.to(dtype)).float().mean() > 0.999  # the rest lies between two neighbours


@ROTATIONS
def test_fp64_input_is_rotated_in_fp64(rotate):
    x, angles = torch.randn(5, 8, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    expected = rotated_in_complex(x, angles, interleaved=rotate is rotate_interleaved)
    torch.testing.assert_close(rotate(x, *tables(rotate, angles.cos(), angles.sin())), expected, rtol=0, atol=1e-12)


@ROTATIONS
def test_scores_depend_on_the_distance_alone(rotate):
    rope = DeepseekRotaryEmbedding(released_config(mscale=1.0, mscale_all_dim=1.0))
    query, key = torch.randn(2, 1, 64)
    scores = []
    for start in (0, 1000):
        halves = [table[..., ::2] for table in rope(query, torch.tensor([[start, start + 13]]))]
        cos, sin = tables(rotate, halves[0], -halves[1])
        scores.append(rotate(query, cos[0, 1], sin[0, 1]) @ rotate(key, cos[0, 0], sin[0, 0]).T)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3)


def test_the_two_pairings_differ_by_a_permutation():
    x, cos, sin = torch.randn(3, 8), *torch.randn(2, 4)
    order = torch.arange(8).view(2, 4).T.flatten()  # halves -> neighbours: 0 4 1 5 ...
    neighbours, halves = (tables(rotate, cos, sin) for rotate in (rotate_interleaved, rotate_halves))
    expected = rotate_halves(x, *halves)
    torch.testing.assert_close(rotate_interleaved(x[:, order], *neighbours), expected[:, order])
    assert not torch.allclose(rotate_interleaved(x, *neighbours), expected, atol=1e-2)


@pytest.mark.parametrize(("interleaved", "rotate"), [(True, rotate_interleaved), (False, rotate_halves)])
def test_rope_interleave_chooses_the_pairing(interleaved, rotate):
    assert DeepseekLatentAttention(tiny_config("v3", rope_interleave=interleaved), 0).rotate is rotate


@pytest.mark.parametrize("family", ["llm", "moe16b", "v2", "v3"])
def test_a_model_sees_distances_between_the_positions_it_is_given(family):
    model = tiny_model(family, "Model")
    tokens, positions = tiny_tokens(model.config, 1, 6), torch.arange(6)[None]
    plain, shifted, stretched = (
        model(tokens, attention_mask=torch.ones_like(tokens), position_ids=ids).last_hidden_state
        for ids in (positions, positions + 11, positions * 3)
    )
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-3)
    assert (stretched - plain).abs().max() > 1e-2


def test_mscale_follows_the_paper():
    assert yarn_mscale(40, 0.707) == pytest.approx(0.0707 * math.log(40) + 1)
