"""Our classes against transformers' own deepseek_v2 / deepseek_v3: one set of weights, the same numbers and files."""

import json
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel
from transformers.models.deepseek_v2 import configuration_deepseek_v2 as native_config_v2
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native_v2
from transformers.models.deepseek_v3 import configuration_deepseek_v3 as native_config_v3
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native_v3

import modeling_deepseek
from tiny import randomize, tiny_model, tiny_tokens

SEEDS = range(8)
CASES = [(family, seed) for family in ("v2", "v3") for seed in SEEDS]
MLA_MODES = ("auto", "absorbed", "expanded")


class Pair(NamedTuple):
    ours: PreTrainedModel
    native: PreTrainedModel


def random_fields(family: str, seed: int) -> dict:
    """A valid architecture that both implementations promise to compute alike, drawn from `seed`."""
    draw = random.Random(f"{family} {seed}")
    groups, group_size = draw.choice((1, 2, 4)), draw.choice((2, 3, 4))
    topk_group = draw.randint(1, groups)
    heads = draw.choice((1, 2, 3, 4))
    fields = dict(
        vocab_size=draw.choice((61, 96)),
        hidden_size=heads * draw.choice((10, 16)),
        intermediate_size=draw.choice((24, 37)),
        moe_intermediate_size=draw.choice((9, 16)),
        num_hidden_layers=draw.choice((2, 3)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        first_k_dense_replace=draw.choice((0, 1, 1, 3)),
        n_shared_experts=draw.choice((1, 2)),
        n_routed_experts=groups * group_size,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=draw.randint(1, topk_group * group_size),
        routed_scaling_factor=draw.choice((1.0, 2.5, 16.0)),
        q_lora_rank=draw.choice((None, 12, 20)),
        kv_lora_rank=draw.choice((8, 14, 24)),  # native deepseek_v2 cannot rotate behind an odd one
        qk_nope_head_dim=draw.choice((6, 16)),
        qk_rope_head_dim=draw.choice((2, 4, 8)),
        v_head_dim=draw.choice((5, 16)),
        rms_norm_eps=draw.choice((1e-6, 1e-3)),
        attention_bias=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.3,
        max_position_embeddings=512,
        rope_parameters=random_rope(draw),
        attn_implementation=draw.choice(("eager", "sdpa")),
        experts_implementation=draw.choice(("eager", "grouped_mm", "batched_mm")),
        bos_token_id=0,
        eos_token_id=1,
    )
    if family == "v2":
        method = draw.choice(("greedy", "group_limited_greedy"))
        return fields | dict(topk_method=method, mlp_bias=draw.random() < 0.5)
    return fields | dict(norm_topk_prob=draw.random() < 0.7, rope_interleave=draw.random() < 0.7)


def random_rope(draw: random.Random) -> dict:
    theta = draw.choice((100.0, 10000.0))
    if draw.random() < 0.4:
        return dict(rope_type="default", rope_theta=theta)
    yarn = dict(
        rope_type="yarn",
        rope_theta=theta,
        factor=draw.choice((4.0, 40.0)),
        original_max_position_embeddings=draw.choice((8, 64)),
        beta_fast=32.0,
        beta_slow=1.0,
    )
    mscales = draw.choice((None, (1.0, 1.0), (0.707, 0.707), (0.707, 1.0)))
    return yarn if mscales is None else yarn | dict(mscale=mscales[0], mscale_all_dim=mscales[1])


def make_pair(family: str, seed: int, **ours_only) -> Pair:
    """Two models of one random architecture, the native one's weights loaded into ours. Both in eval mode."""
    fields = random_fields(family, seed)
    if family == "v2":
        native = native_v2.DeepseekV2ForCausalLM(native_config_v2.DeepseekV2Config(**fields))
        ours = modeling_deepseek.DeepseekV2ForCausalLM(modeling_deepseek.DeepseekV2Config(**fields, **ours_only))
    else:
        native = native_v3.DeepseekV3ForCausalLM(native_config_v3.DeepseekV3Config(**fields))
        ours = modeling_deepseek.DeepseekV3ForCausalLM(modeling_deepseek.DeepseekV3Config(**fields, **ours_only))
    randomize(native, seed)
    for name, bias in native.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias -= 0.6  # scores + bias below 0: a group mask of 0 instead of -inf would choose masked experts
    ours.load_state_dict(native.state_dict(), strict=True)
    return Pair(ours.eval(), native.eval())


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` times the largest element expected."""
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def padding_mask(side: str, batch: int, length: int, padded: int) -> torch.Tensor:
    """`[batch, length]`, the first row whole, the others with `padded` zeros on the left or on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, slice(0, padded) if side == "left" else slice(length - padded, None)] = 0
    return mask


def test_random_architectures_cover_what_tells_the_families_apart():
    drawn = [random_fields(family, seed) for family, seed in CASES]
    for field in ("q_lora_rank", "attention_bias", "tie_word_embeddings", "first_k_dense_replace", "n_group"):
        assert len({fields[field] for fields in drawn}) > 1, field
    assert {fields["rope_parameters"]["rope_type"] for fields in drawn} == {"default", "yarn"}
    assert {fields.get("topk_method") for fields in drawn} == {"greedy", "group_limited_greedy", None}
    assert any(fields["first_k_dense_replace"] >= fields["num_hidden_layers"] for fields in drawn)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_weights_load_both_ways(family, seed):
    ours, native = make_pair(family, seed)
    randomize(ours, seed + 1)
    native.load_state_dict(ours.state_dict(), strict=True)
    assert ours.state_dict().keys() == native.state_dict().keys()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in native.named_parameters()]
    tokens = tiny_tokens(ours.config)
    with torch.no_grad():
        assert_same(ours(tokens).logits, native(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_under_a_padding_mask(family, seed, side):
    ours, native = make_pair(family, seed)
    tokens, mask = tiny_tokens(ours.config, batch=3, length=12), padding_mask(side, 3, 12, padded=4)
    with torch.no_grad():
        expected = native(tokens, attention_mask=mask).logits
        actual = ours(tokens, attention_mask=mask).logits
    assert_same(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("mla_mode", MLA_MODES)
@pytest.mark.parametrize(("family", "seed"), CASES)
def test_gradients(family, seed, mla_mode):
    ours, native = make_pair(family, seed, mla_mode=mla_mode)
    tokens, mask = tiny_tokens(ours.config, batch=3, length=9), padding_mask("right", 3, 9, padded=3)
    labels = tokens.masked_fill(mask == 0, -100)
    losses = [model.train()(tokens, attention_mask=mask, labels=labels).loss for model in (ours, native)]
    assert_same(*losses)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in native.named_parameters()}
    largest = max(grad.abs().max() for grad in expected.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad,
            expected[name],
            rtol=2e-4,
            atol=2e-6 * largest.item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("mla_mode", MLA_MODES)
@pytest.mark.parametrize(("family", "seed"), CASES)
def test_cached_decode(family, seed, mla_mode):
    """A left-padded prompt, then one, three and one more tokens against the cache."""
    ours, native = make_pair(family, seed, mla_mode=mla_mode)
    tokens, mask = tiny_tokens(ours.config, batch=2, length=12), padding_mask("left", 2, 12, padded=3)
    caches = {"latent": modeling_deepseek.LatentCache(ours.config), "dynamic": DynamicCache(config=ours.config)}
    native_cache, position_ids = DynamicCache(config=native.config), mask.cumsum(-1).sub(1).clamp(min=0)
    for start, end in ((0, 7), (7, 8), (8, 11), (11, 12)):
        step = dict(attention_mask=mask[:, :end], position_ids=position_ids[:, start:end], use_cache=True)
        seen = mask[:, start:end].bool()
        with torch.no_grad():
            expected = native(tokens[:, start:end], past_key_values=native_cache, **step).logits[seen]
            for cache in caches.values():
                assert_same(ours(tokens[:, start:end], past_key_values=cache, **step).logits[seen], expected)
    visible = mask.bool()[:, None]
    for cache in caches.values():
        for held, reference in zip(cache.layers, native_cache.layers, strict=True):
            assert_same(held.keys[visible], reference.keys[visible])
            assert_same(held.values[visible], published_order(native.config, reference.values)[visible])


def published_order(config, rope_keys: torch.Tensor) -> torch.Tensor:
    """Native deepseek_v3 stores the even dimensions before the odd ones; DeepSeek's code and ours keep the pairs."""
    if config.model_type != "deepseek_v3" or not config.rope_interleave:
        return rope_keys
    return torch.stack(rope_keys.chunk(2, dim=-1), dim=-1).flatten(-2)


# --- files ----------------------------------------------------------------------------------------------------------

# A process that does not know this package: what native transformers reads from our folder, and writes.
NATIVE_PROCESS = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
for ours in sorted(root.glob("ours-*")):
    native = root / ours.name.replace("ours", "native")
    model, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.deepseek_v"), type(model)
    model.save_pretrained(native)
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        logits = model(tokens).logits
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    save_file({"logits": logits}, native / "logits.bin", metadata={"problems": json.dumps(problems)})
assert "modeling_deepseek" not in sys.modules
"""
LITE = dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
SAVED = {
    "v2": ("v2", {}),
    "v2_lite_tied": ("v2", LITE | dict(tie_word_embeddings=True)),
    "v3": ("v3", dict(attention_bias=True)),
    "v3_mtp": ("v3", dict(num_nextn_predict_layers=2)),
}


def stored_keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def is_mtp(key: str, config) -> bool:
    parts = key.split(".")
    return parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`ours-NAME` as saved by us, and `native-NAME` with what a process of native transformers made of it."""
    root = tmp_path_factory.mktemp("files")
    for name, (family, overrides) in SAVED.items():
        tiny_model(family, **overrides).save_pretrained(root / f"ours-{name}")
    subprocess.run([sys.executable, "-I", "-c", NATIVE_PROCESS, str(root)], check=True, capture_output=True, text=True)
    return root


@pytest.mark.parametrize("name", SAVED)
def test_native_reads_what_we_save(folders, name):
    family, overrides = SAVED[name]
    ours = tiny_model(family, **overrides)
    found = load_file(folders / f"native-{name}" / "logits.bin")["logits"]
    with safe_open(folders / f"native-{name}" / "logits.bin", framework="pt") as file:
        problems = json.loads(file.metadata()["problems"])
    assert not problems["missing_keys"]
    assert not problems["mismatched_keys"]
    assert all(is_mtp(key, ours.config) for key in problems["unexpected_keys"])
    with torch.no_grad():
        assert_same(found, ours(torch.arange(3, 43).reshape(2, 20)).logits)


@pytest.mark.parametrize("name", SAVED)
def test_we_read_what_native_saves(folders, name):
    family, overrides = SAVED[name]
    ours = tiny_model(family, **overrides)
    loaded, info = type(ours).from_pretrained(folders / f"native-{name}", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_nextn_predict_layers == 0  # native drops MTP layers: never random ones in their place
    expected = {name: tensor for name, tensor in ours.state_dict().items() if not is_mtp(name, ours.config)}
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", SAVED)
def test_keys_on_disk_are_natives(folders, name):
    config = tiny_model(SAVED[name][0], **SAVED[name][1]).config
    ours = {key for key in stored_keys(folders / f"ours-{name}") if not is_mtp(key, config)}
    assert ours == stored_keys(folders / f"native-{name}")


def official_keys(config) -> set[str]:
    """The Hub's tensor names of an architecture, written out from the published layout."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    mtp = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    if config.model_type == "deepseek":
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    else:
        query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        attention = (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        names |= {f"{prefix}.self_attn.{name}.weight" for name in attention}
        names |= {f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        mlps = [f"{prefix}.mlp"]
        if config.n_routed_experts and layer >= config.first_k_dense_replace:
            mlps = [f"{prefix}.mlp.experts.{expert}" for expert in range(config.n_routed_experts)]
            mlps += [f"{prefix}.mlp.shared_experts"]
            names |= {f"{prefix}.mlp.gate.weight"}
            names |= {f"{prefix}.mlp.gate.e_score_correction_bias"} if config.model_type == "deepseek_v3" else set()
        names |= {f"{mlp}.{name}.weight" for mlp in mlps for name in ("gate_proj", "up_proj", "down_proj")}
        if layer >= config.num_hidden_layers:
            names |= {f"{prefix}.{name}.weight" for name in mtp}
    return names


OFFICIAL = {
    "llm": ("llm", {}),
    "moe16b": ("moe16b", {}),
    "v2": ("v2", {}),
    "v2_lite": ("v2", LITE),
    "v3": ("v3", {}),
    "v3_mtp": ("v3", dict(num_nextn_predict_layers=1)),
    "v3_mtp_2": ("v3", dict(num_nextn_predict_layers=2)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_layout_on_disk_is_official(tmp_path, name):
    family, overrides = OFFICIAL[name]
    model = tiny_model(family, **overrides)
    model.save_pretrained(tmp_path)
    stored, config = load_file(tmp_path / "model.safetensors"), model.config
    assert stored.keys() == official_keys(config)
    weights = model.state_dict()
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], weights["model.embed_tokens.weight"])
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], weights["lm_head.weight"])
    if config.n_routed_experts:
        last = f"model.layers.{config.num_hidden_layers - 1}.mlp.experts"
        gate_up = torch.cat([stored[f"{last}.1.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(gate_up, weights[f"{last}.gate_up_proj"][1])
        assert torch.equal(stored[f"{last}.1.down_proj.weight"], weights[f"{last}.down_proj"][1])


@pytest.mark.parametrize("name", OFFICIAL)
def test_saved_and_loaded_again_is_the_same_model(tmp_path, name):
    family, overrides = OFFICIAL[name]
    model = tiny_model(family, **overrides)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_nextn_predict_layers == model.config.num_nextn_predict_layers
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
