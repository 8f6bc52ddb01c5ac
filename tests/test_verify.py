"""`verify`: equal checkpoints are equal across layouts and precisions, and every difference is found and named."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_deepseek.conversion.cli import main
from modeling_deepseek.conversion.demo import to_demo
from modeling_deepseek.conversion.verify import deviation, kind_of, report, verify
from modeling_deepseek.conversion.weights import Weights, hub_name
from modeling_deepseek.fp8 import dequantize

GOLDENS = Path(__file__).parent / "goldens"
V3, FP8, DEMO = GOLDENS / "a_v3_fp32", GOLDENS / "b3_v3_fp8_576", GOLDENS / "h_inference_demo"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def changed(tmp_path):
    """A function that writes a golden with its tensors changed; `None` drops one."""

    def write(case=V3, **tensors):
        folder = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_bytes((case / "config.json").read_bytes())
        kept = load_file(case / "model.safetensors") | tensors
        save_file({name: x for name, x in kept.items() if x is not None}, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def cast(changed):
    """Golden b3 in bf16, its FP8 weights times their scales."""
    stored = load_file(FP8 / "model.safetensors")
    scales = {name: x for name, x in stored.items() if name.endswith("_scale_inv")}
    weights = {scale.removesuffix("_scale_inv"): x for scale, x in scales.items()}
    bf16 = {name: dequantize(stored[name], scale).bfloat16() for name, scale in weights.items()}
    return changed(FP8, **bf16, **dict.fromkeys(scales))


@pytest.fixture
def demo_fp8(tmp_path):
    """A function that writes one FP8 projection, sharded in `dim`, as two folders: Hub layout and demo layout on 2 ranks."""

    def write(hub, demo, dim):
        weight, scale = torch.randn(512, 768).to(torch.float8_e4m3fn), torch.rand(4, 6) + 0.5
        for folder in ("hub", "demo"):
            (tmp_path / folder).mkdir()
        save_file({f"{hub}.weight": weight, f"{hub}.weight_scale_inv": scale}, tmp_path / "hub" / "model.safetensors")
        for rank in range(2):
            parts = {"weight": weight.chunk(2, dim)[rank], "scale": scale.chunk(2, dim)[rank]}
            tensors = {f"{demo}.{kind}": part.contiguous() for kind, part in parts.items()}
            save_file(tensors, tmp_path / "demo" / f"model{rank}-mp2.safetensors")
        return tmp_path / "hub", tmp_path / "demo"

    return write


def sharded(tmp_path, **changes):
    """The demo layout of golden a on 2 ranks with tensors of its second rank changed; `None` drops one."""
    for rank in range(2):
        tensors = load_file(DEMO / "mp2" / f"model{rank}-mp2.safetensors") | (changes if rank else {})
        tensors = {name: x for name, x in tensors.items() if x is not None}
        save_file(tensors, tmp_path / f"model{rank}-mp2.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", ["a_v3_fp32", "b3_v3_fp8_576", "d_v2lite", "f_moe16b", "g_llm_gqa"])
def test_a_checkpoint_agrees_with_itself(case):
    found = verify(GOLDENS / case, GOLDENS / case)
    assert found.agrees
    assert sum(apart.tensors for apart in found.kinds.values()) == len(Weights(GOLDENS / case).shapes)


def test_fp8_agrees_with_its_bf16_cast(cast):
    found = verify(FP8, cast)
    assert found.agrees and not found.only_a
    assert verify(cast, FP8).agrees


def test_fp8_differs_from_another_cast(cast, changed):
    name = "model.layers.0.self_attn.o_proj.weight"
    other = load_file(cast / "model.safetensors")[name].clone()
    other[5, 7] += 0.25
    found = verify(FP8, changed(cast, **{name: other}))
    assert (found.kinds["o_proj"].differing, found.kinds["o_proj"].worst) == (1, name)
    assert found.kinds["o_proj"].absolute == pytest.approx(0.25, rel=0.01)
    assert [kind for kind, apart in found.kinds.items() if apart.differing] == ["o_proj"]


@pytest.mark.parametrize(
    ("demo", "hub", "dim"),
    [
        ("head.weight", "lm_head.weight", 0),
        ("layers.3.attn.wo.scale", "model.layers.3.self_attn.o_proj.weight_scale_inv", 1),
        ("layers.3.ffn.gate.bias", "model.layers.3.mlp.gate.e_score_correction_bias", None),
        ("layers.3.ffn.experts.7.w2.weight", "model.layers.3.mlp.experts.7.down_proj.weight", None),
        ("layers.3.ffn.shared_experts.w2.weight", "model.layers.3.mlp.shared_experts.down_proj.weight", 1),
        ("layers.61.shared_head.head.weight", "model.layers.61.shared_head.head.weight", 0),
    ],
)
def test_hub_name_and_sharded_dimension_of_a_demo_tensor(demo, hub, dim):
    assert hub_name(demo) == (hub, dim)


@pytest.mark.parametrize("ranks", [1, 2])
def test_demo_layout_agrees_with_the_hub_layout(ranks):
    found = verify(V3, DEMO / f"mp{ranks}")
    assert found.agrees and verify(DEMO / f"mp{ranks}", V3).agrees
    assert sum(apart.tensors for apart in found.kinds.values()) == 139


def test_demo_layouts_of_one_and_two_ranks_agree():
    found = verify(DEMO / "mp1", DEMO / "mp2")
    assert found.agrees and found.without_mtp == []


def test_mtp_layers_that_the_demo_does_without_are_listed():
    found = verify(V3, DEMO / "mp1")
    assert len(found.without_mtp) == 68
    assert all(name.startswith("model.layers.3.") for name in found.without_mtp)


def test_mtp_layers_that_the_demo_kept_are_compared(tmp_path):
    to_demo(V3, tmp_path / "demo", mp=2, with_mtp=True)
    found = verify(V3, tmp_path / "demo")
    assert found.agrees and found.without_mtp == []
    assert sum(apart.tensors for apart in found.kinds.values()) == len(Weights(V3).shapes)


def test_tensor_that_an_mtp_layer_of_the_demo_lacks_is_a_difference(tmp_path):
    to_demo(V3, tmp_path / "demo", mp=1, with_mtp=True)
    file = tmp_path / "demo" / "model0-mp1.safetensors"
    tensors = load_file(file)
    del tensors["layers.3.enorm.weight"]
    save_file(tensors, file)
    found = verify(V3, tmp_path / "demo")
    assert (found.only_a, found.without_mtp) == (["model.layers.3.enorm.weight"], [])


def test_mtp_layers_that_a_hub_folder_lacks_are_a_difference(changed):
    mtp = [name for name in Weights(V3).shapes if name.startswith("model.layers.3.")]
    found = verify(V3, changed(**dict.fromkeys(mtp)))
    assert sorted(found.only_a) == sorted(mtp)
    assert not found.agrees


@pytest.mark.parametrize(
    ("hub", "demo", "dim"),
    [
        ("model.layers.0.self_attn.o_proj", "layers.0.attn.wo", 1),
        ("model.layers.0.self_attn.kv_b_proj", "layers.0.attn.wkv_b", 0),
        ("model.layers.1.mlp.shared_experts.down_proj", "layers.1.ffn.shared_experts.w2", 1),
    ],
)
def test_fp8_demo_agrees_with_fp8_hub(demo_fp8, hub, demo, dim):
    a, b = demo_fp8(hub, demo, dim)
    found = verify(a, b)
    assert found.agrees and not found.only_b
    assert sum(apart.tensors for apart in found.kinds.values()) == 1


def test_swapped_shards_differ(demo_fp8):
    hub, demo = demo_fp8("model.layers.0.self_attn.o_proj", "layers.0.attn.wo", 1)
    (demo / "model0-mp2.safetensors").rename(demo / "x")
    (demo / "model1-mp2.safetensors").rename(demo / "model0-mp2.safetensors")
    (demo / "x").rename(demo / "model1-mp2.safetensors")
    assert not verify(hub, demo).agrees


def test_largest_deviations_are_those_of_the_elements_and_of_the_tensor(changed):
    weight = load_file(V3 / "model.safetensors")[UP]
    other = weight.clone()
    other[0, 0] += 2
    other[1, 1] -= 1
    found = verify(V3, changed(**{UP: other})).kinds["experts.up_proj"]
    assert found.absolute == pytest.approx(2, rel=1e-5)
    assert found.relative == pytest.approx(math.sqrt(5) / weight.norm().item(), rel=1e-5)
    assert (found.tensors, found.differing, found.worst) == (48, 1, UP)


def test_tolerance_is_inclusive(changed):
    other = changed(**{"model.norm.weight": load_file(V3 / "model.safetensors")["model.norm.weight"] + 0.5})
    worst = verify(V3, other).kinds["norm"].absolute
    assert verify(V3, other, atol=worst).agrees and not verify(V3, other, atol=worst * 0.99).agrees


def test_tensors_of_only_one_side_are_named(changed):
    found = verify(changed(extra=torch.ones(1)), changed(**{UP: None}), atol=math.inf)
    assert (found.only_a, found.only_b) == (["extra", UP], [])
    assert not found.agrees


def test_another_shape_is_named(changed):
    found = verify(V3, changed(**{"model.norm.weight": torch.ones(3)}), atol=math.inf)
    assert found.misshapen == ["model.norm.weight: (48,) and (3,)"]
    assert not found.agrees


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_one_side_finite_is_infinitely_far(value):
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, value])
    assert deviation(a, b)[0] == deviation(b, a)[0] == math.inf
    assert deviation(b, b.double()) == (0, 0)


def test_deviation_of_a_zero_tensor_is_relative_to_nothing():
    assert deviation(torch.zeros(2), torch.tensor([0.0, 3.0])) == (3, math.inf)


def test_deviation_is_found_in_every_chunk(monkeypatch):
    monkeypatch.setattr("modeling_deepseek.conversion.verify.CHUNK", 4)
    for index in range(10):
        other = torch.ones(2, 5)
        other.view(-1)[index] = 1.5
        assert deviation(torch.ones(2, 5), other) == (0.5, pytest.approx(0.5 / math.sqrt(10)))


def test_bf16_and_fp32_of_the_same_values_agree(changed):
    halved = {name: tensor.bfloat16() for name, tensor in load_file(V3 / "model.safetensors").items()}
    widened = {name: tensor.float() for name, tensor in halved.items()}
    assert verify(changed(**halved), changed(**widened)).agrees


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (UP, "experts.up_proj"),
        ("model.layers.12.self_attn.o_proj.weight", "o_proj"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "gate.e_score_correction_bias"),
        ("model.layers.61.shared_head.norm.weight", "shared_head.norm"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_kind_is_the_name_without_its_place(name, kind):
    assert kind_of(name) == kind


def test_logits_of_equal_models_are_equal():
    assert verify(V3, V3, prompt=[5, 6, 7]).logits == 0


def test_largest_difference_of_logits(changed):
    norm = load_file(V3 / "model.safetensors")["model.norm.weight"]
    doubled, tripled = (changed(**{"model.norm.weight": factor * norm}) for factor in (2, 3))
    largest = verify(V3, doubled, prompt=[5, 6, 7]).logits  # that of the logits themselves
    assert largest > 0.1
    assert verify(tripled, V3, prompt=[5, 6, 7]).logits == pytest.approx(2 * largest, rel=1e-4)


def test_logits_of_an_incomplete_model_are_an_error(changed):
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight: no logits"):
        verify(V3, changed(**{"model.norm.weight": None}), prompt=[1])


@pytest.mark.parametrize("prompt", [[], [128], [-1]])
def test_prompt_outside_the_vocabulary_is_an_error(prompt):
    with pytest.raises(ValueError, match="expected token ids from 0 to 127"):
        verify(V3, V3, prompt=prompt)


def test_logits_over_two_vocabularies_are_an_error(changed):
    other = changed()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(ValueError, match="vocab_size is 128 of .* and 64 of "):
        verify(V3, other, prompt=[1])


@pytest.mark.parametrize("atol", [-1, math.nan])
def test_tolerance_below_zero_is_an_error(atol):
    with pytest.raises(ValueError, match="expected 0 or more"):
        verify(V3, V3, atol=atol)


def test_logits_need_the_hub_layout():
    with pytest.raises(ValueError, match="mp1 has the demo layout; logits need the Hub layout"):
        verify(V3, DEMO / "mp1", prompt=[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": torch.zeros(48)}, r"model\.norm\.weight differs between .*model0-mp2.* and .*model1-mp2"),
        ({"layers.1.ffn.experts.0.w1.weight": torch.ones(16, 48)}, r"experts\.0\..* is in model0-mp2.*, model1-mp2"),
        ({"layers.1.attn.wo.weight": torch.ones(47, 20)}, r"o_proj\.weight is F32 \(48, 20\) .* and F32 \(47, 20\)"),
        ({"layers.1.attn.wo.weight": torch.ones(48, 20).bfloat16()}, r"is F32 \(48, 20\) .* and BF16 \(48, 20\)"),
        ({"layers.1.attn.wo.weight": None}, r"o_proj\.weight is in model0-mp2\.safetensors; expected .*model1-mp2"),
    ],
)
def test_ranks_that_do_not_fit_together_are_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        verify(V3, sharded(tmp_path, **changes))


def test_missing_rank_is_an_error(tmp_path):
    folder = sharded(tmp_path)
    (folder / "model0-mp2.safetensors").unlink()
    with pytest.raises(
        ValueError, match="holds model1-mp2.safetensors; expected .* model0-mp2.safetensors, model1-mp2"
    ):
        verify(V3, folder)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([[math.nan]]), "holds nan"),
        (torch.tensor([[-1.0]]), "holds -1.0"),
        (None, "its scales .* are missing"),
    ],
)
def test_bad_scale_is_an_error(changed, scale, message):
    with pytest.raises(ValueError, match=message):
        verify(FP8, changed(FP8, **{f"{UP}_scale_inv": scale}))


def test_command_exits_with_0_when_equal(capsys):
    assert main(["verify", str(V3), str(DEMO / "mp2")]) == 0
    assert capsys.readouterr().out == report(verify(V3, DEMO / "mp2"), str(V3), str(DEMO / "mp2")) + "\n"


def test_command_exits_with_1_when_not_equal_within_atol(changed, capsys):
    norm = load_file(V3 / "model.safetensors")["model.norm.weight"]
    other = str(changed(**{"model.norm.weight": norm + 0.5}))
    assert main(["verify", str(V3), other]) == 1
    assert main(["verify", str(V3), other, "--atol", "0.6"]) == 0
    assert "model.norm.weight" in capsys.readouterr().out


def test_command_runs_the_models_on_a_prompt(capsys):
    assert main(["verify", str(V3), str(V3), "--logits", "1 2 3"]) == 0
    assert "largest difference of logits in fp32: 0\n" in capsys.readouterr().out


def test_command_reports_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main(["verify", str(V3), str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"deepseek-convert: error: {tmp_path} has no ") and "\n" not in error
