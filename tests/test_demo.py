"""`to_demo` and `from_demo`: the official script's files, and the same bits there and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.checkpoint import layer_index
from modeling_deepseek.conversion.demo import demo_config, demo_name, from_demo, to_demo
from modeling_deepseek.conversion.family import read_family
from modeling_deepseek.conversion.folder import CheckpointFolder
from modeling_deepseek.conversion.quantization import to_fp8
from modeling_deepseek.conversion.verify import verify
from modeling_deepseek.conversion.weights import hub_name
from modeling_deepseek.fp8 import quantize

GOLDENS = Path(__file__).parent / "goldens"
V3, FP8, DEMO = GOLDENS / "a_v3_fp32", GOLDENS / "b3_v3_fp8_576", GOLDENS / "h_inference_demo"
WIDE = dict(
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)  # of which two ranks get whole blocks


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def without_mtp(tensors, main):
    return {name: tensor for name, tensor in tensors.items() if layer_index(name) < main}


@pytest.fixture(scope="module")
def wide_fp8(tmp_path_factory):
    """Golden a's architecture in FP8, wide enough to be sharded in whole blocks."""
    folder = tmp_path_factory.mktemp("wide")
    fields = json.loads((V3 / "config.json").read_text()) | WIDE
    DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(fields)).bfloat16().save_pretrained(folder / "bf16")
    to_fp8(folder / "bf16", folder / "fp8", max_shard_size="1MB")
    return folder / "fp8"


@pytest.mark.parametrize("mp", [1, 2])
def test_ranks_are_those_of_the_official_script(tmp_path, mp):
    to_demo(V3, tmp_path / "out", mp)
    files = [f"model{rank}-mp{mp}.safetensors" for rank in range(mp)]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    for file in files:
        assert_same_bits(load_file(tmp_path / "out" / file), load_file(DEMO / f"mp{mp}" / file))


def test_config_is_that_of_the_demo(tmp_path):
    to_demo(V3, tmp_path / "out", 1)
    ours, official = (json.loads((folder / "config_demo.json").read_text()) for folder in (tmp_path / "out", DEMO))
    assert ours == official
    assert not (tmp_path / "out" / "config.json").exists()


def test_fp8_ranks_have_the_names_and_dtypes_of_the_official_script(tmp_path):
    to_demo(FP8, tmp_path / "out", 1)
    official = json.loads((DEMO / "fp8_b2_mp1_keys.json").read_text())
    (ours,) = CheckpointFolder(tmp_path / "out", index=False).shards.values()
    assert {name: header.dtype for name, header in ours.items()} == {
        name: dtype for name, (dtype, _) in official.items()
    }
    assert json.loads((tmp_path / "out" / "config_demo.json").read_text())["dtype"] == "fp8"


@pytest.mark.parametrize("mp", [1, 2])
def test_the_official_ranks_give_the_checkpoint_back(tmp_path, mp):
    from_demo(DEMO / f"mp{mp}", tmp_path / "out", V3 / "config.json", max_shard_size="100KB", jobs=2)
    assert_same_bits(tensors_of(tmp_path / "out"), without_mtp(tensors_of(V3), 3))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((V3 / "config.json").read_text()) | {"num_nextn_predict_layers": 0}


@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize(
    ("case", "mp"), [("a_v3_fp32", 1), ("a_v3_fp32", 4), ("d_v2lite", 1), ("e_v2", 2), ("wide fp8", 1), ("wide fp8", 2)]
)
def test_there_and_back_are_the_same_bits(tmp_path, wide_fp8, case, mp, with_mtp):
    source = wide_fp8 if case == "wide fp8" else GOLDENS / case
    to_demo(source, tmp_path / "demo", mp, with_mtp)
    from_demo(tmp_path / "demo", tmp_path / "out", source / "config.json")
    assert not (tmp_path / "out" / "config_demo.json").exists()
    expected = tensors_of(source)
    main = read_family(source).num_hidden_layers
    assert_same_bits(tensors_of(tmp_path / "out"), expected if with_mtp else without_mtp(expected, main))
    ours, fields = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    if with_mtp:
        assert ours == fields


@pytest.fixture(scope="module")
def small_blocks(tmp_path_factory):
    """Golden b3 with blocks of 4 x 2 and scales in ue8m0."""
    folder = tmp_path_factory.mktemp("small_blocks")
    tensors = load_file(FP8 / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        weight, scale = quantize(tensors[name].float(), (4, 2), "ue8m0")
        tensors |= {name: weight, f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((FP8 / "config.json").read_text())
    fields["quantization_config"] |= {"weight_block_size": [4, 2], "scale_fmt": "ue8m0"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("mp", [1, 2])
def test_blocks_of_another_size_go_there_and_back(tmp_path, small_blocks, mp):
    to_demo(small_blocks, tmp_path / "demo", mp, with_mtp=True)
    from_demo(tmp_path / "demo", tmp_path / "out", small_blocks / "config.json")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(small_blocks))
    ours, fields = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", small_blocks))
    assert ours == fields
    for pair in ((small_blocks, tmp_path / "demo"), (tmp_path / "demo", small_blocks)):
        assert verify(*pair).agrees


def test_scales_are_said_to_be_powers_of_two_where_the_demos_config_does(tmp_path, wide_fp8):
    source = shutil.copytree(wide_fp8, tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").write_text(json.dumps(fields))
    to_demo(source, tmp_path / "demo", 2)
    plain = {name: value for name, value in fields.items() if name != "quantization_config"}
    (tmp_path / "bf16.json").write_text(json.dumps(plain))
    from_demo(tmp_path / "demo", tmp_path / "out", tmp_path / "bf16.json")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found == fields["quantization_config"]


def test_scales_are_sharded_with_their_weights(tmp_path, wide_fp8):
    to_demo(wide_fp8, tmp_path / "out", 2)
    weights = tensors_of(wide_fp8)
    for rank, (name, dim) in ((0, ("wo", 1)), (1, ("wq_b", 0)), (1, ("wo", 1))):
        part = load_file(tmp_path / "out" / f"model{rank}-mp2.safetensors")
        hub = {"wo": "o_proj", "wq_b": "q_b_proj"}[name]
        for kind, hub_kind in (("weight", "weight"), ("scale", "weight_scale_inv")):
            whole = weights[f"model.layers.0.self_attn.{hub}.{hub_kind}"].float()
            assert torch.equal(part[f"layers.0.attn.{name}.{kind}"].float(), whole.chunk(2, dim)[rank]), (name, kind)


@pytest.mark.parametrize("case", ["a_v3_fp32", "b3_v3_fp8_576", "d_v2lite", "e_v2"])
def test_every_name_has_one_in_the_demo_that_leads_back(case):
    folder = CheckpointFolder(GOLDENS / case)
    demo = {name: demo_name(name, folder) for name in folder.tensors}
    assert len({name for name, _ in demo.values()}) == len(demo)
    assert {name: hub_name(other) for name, (other, _) in demo.items()} == {n: (n, dim) for n, (_, dim) in demo.items()}


def test_yarn_is_off_where_the_config_has_none():
    fields = json.loads((V3 / "config.json").read_text()) | {"rope_scaling": None}
    config = demo_config(DeepseekV3Config.from_dict(fields), fields, fp8=False)
    assert (config["original_seq_len"], config["rope_factor"], config["mscale"]) == (10240, 1.0, 1.0)


@pytest.mark.parametrize(
    ("source", "mp", "message"),
    [
        (V3, 0, "mp is 0; expected the number of ranks"),
        (V3, 3, "mp is 3, which does not divide num_attention_heads 4"),
        (GOLDENS / "d_v2lite", 2, "mp is 2, which does not divide num_attention_heads 3"),
        (FP8, 2, r"mlp\..*mp 2 does not divide its 128 in blocks of 128"),
        (GOLDENS / "f_moe16b", 1, "model_type is 'deepseek'; the demo runs deepseek_v2 and deepseek_v3 only"),
    ],
)
def test_what_the_demo_cannot_have_is_refused(tmp_path, source, mp, message):
    with pytest.raises(ValueError, match=message):
        to_demo(source, tmp_path / "out", mp)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed(tmp_path):
    """A copy of a folder with tensors added to a file."""

    def write(source, file, **tensors):
        shutil.copytree(source, tmp_path / "changed")
        stored = load_file(tmp_path / "changed" / file) | tensors
        save_file({name: x for name, x in stored.items() if x is not None}, tmp_path / "changed" / file)
        return tmp_path / "changed"

    return write


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.indexer.wk.weight", "model.layers.0.self_attn.o_proj.bias"])
def test_tensor_without_a_name_in_the_demo_is_named(tmp_path, changed, name):
    with pytest.raises(ValueError, match=rf"{name} has no name in the demo layout"):
        to_demo(changed(V3, "model.safetensors", **{name: torch.ones(1)}), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_bad_scales_are_refused_on_both_ways(tmp_path, changed, wide_fp8):
    to_demo(wide_fp8, tmp_path / "demo", 2)
    scale = torch.zeros(1, 2)
    source = changed(tmp_path / "demo", "model1-mp2.safetensors", **{"layers.0.ffn.w1.scale": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"model1-mp2\.safetensors: .*gate_proj.weight_scale_inv holds 0\.0"):
        from_demo(source, tmp_path / "out", wide_fp8 / "config.json")
    shutil.rmtree(source)
    weight, _ = quantize(torch.randn(128, 128))
    name = "model.layers.0.mlp.up_proj.weight"
    source = changed(FP8, "model.safetensors", **{name: weight, f"{name}_scale_inv": scale[:, :1]})
    with pytest.raises(ValueError, match=rf"{name}_scale_inv holds 0\.0"):
        to_demo(source, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.attn.wo.weight": None}, r"lacks model\.layers\.0\.self_attn\.o_proj\.weight"),
        (
            {"layers.0.attn.wo.weight": torch.ones(48, 41)},
            r"o_proj\.weight is \(48, 41\), by .* \(48, 40\)",
        ),
        ({"layers.0.extra.weight": torch.ones(1)}, r"holds model\.layers\.0\.extra\.weight, which .* has no place for"),
    ],
)
def test_ranks_that_are_not_the_configs_are_refused(tmp_path, changed, tensors, message):
    with pytest.raises(ValueError, match=message):
        from_demo(changed(DEMO / "mp1", "model0-mp1.safetensors", **tensors), tmp_path / "out", V3 / "config.json")
    assert not (tmp_path / "out").exists()


def test_missing_rank_and_hub_layout_are_refused(tmp_path):
    shutil.copytree(DEMO / "mp2", tmp_path / "half")
    (tmp_path / "half" / "model1-mp2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected the demo layout .*model1-mp2\.safetensors"):
        from_demo(tmp_path / "half", tmp_path / "out", V3 / "config.json")
    with pytest.raises(ValueError, match="has the Hub layout; expected files of ranks"):
        from_demo(V3, tmp_path / "out", V3 / "config.json")


def test_config_must_be_the_hubs(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for file, message in (
        (DEMO / "config_demo.json", "not the demo's config"),
        (tmp_path / "broken.json", "not valid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            from_demo(DEMO / "mp1", tmp_path / "out", file)


LOSSES = {
    "a missing tensor": (
        lambda t, c: t.pop("model.layers.1.self_attn.o_proj.weight"),
        "lacks model.layers.1.self_attn.o_proj.weight",
    ),
    "an expert too many": (
        lambda t, c: t.update(
            {"model.layers.1.mlp.experts.99.up_proj.weight": t["model.layers.1.mlp.experts.0.up_proj.weight"]}
        ),
        "holds model.layers.1.mlp.experts.99.up_proj.weight",
    ),
    "a layer too many": (lambda t, c: c.update(num_hidden_layers=1), "lacks model.layers.1.eh_proj.weight"),
    "a tied head": (
        lambda t, c: (t.pop("lm_head.weight"), c.update(tie_word_embeddings=True)),
        "tie_word_embeddings is true",
    ),
}


@pytest.mark.parametrize(("change", "message"), LOSSES.values(), ids=LOSSES)
def test_a_checkpoint_of_which_something_would_be_lost_is_refused(tmp_path, change, message):
    source = shutil.copytree(V3, tmp_path / "source")
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        to_demo(source, tmp_path / "out", mp=1)
    assert not (tmp_path / "out").exists()
