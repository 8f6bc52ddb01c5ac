"""`to_bf16` and `to_fp8`: the official cast by its sha256, other shapes against plain references, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek.conversion.folder import CheckpointFolder
from modeling_deepseek.conversion.quantization import to_bf16, to_fp8
from modeling_deepseek.fp8 import dequantize, quantize

GOLDENS = Path(__file__).parent / "goldens"
FP8, FP32 = GOLDENS / "b3_v3_fp8_576", GOLDENS / "a_v3_fp32"
W, S = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"
SIZES = st.integers(1, 700)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def digest(tensor):
    return hashlib.sha256(bits(tensor).numpy().tobytes()).hexdigest()


def random_weight(rows, columns, seed):
    """bf16 values of many magnitudes, block by block, with zero blocks among them."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(-40, 20, (-(-rows // 128), -(-columns // 128)), generator=generator)
    grid = torch.where(grid == 19, -1000, grid).float().exp2().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (torch.randn(rows, columns, generator=generator) * grid[:rows, :columns]).bfloat16()


def plain_quantize(weight, ue8m0):
    """Block after block, element after element of the definition."""
    quantised, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = weight[row : row + 128, column : column + 128].float()
            scale = block.abs().max() / 448 if block.any() else torch.tensor(1.0)
            power = torch.tensor(2.0) ** -100
            while ue8m0 and power < scale:
                power *= 2
            scales.append(power if ue8m0 else scale)
            quantised[row : row + 128, column : column + 128] = (block / scales[-1]).to(torch.float8_e4m3fn)
    return quantised, torch.stack(scales).view(-(-weight.shape[0] // 128), -1)


@pytest.fixture
def copy(tmp_path):
    """A folder with a config, whose one weight tests replace."""
    (tmp_path / "source").mkdir()
    shutil.copy(FP8 / "config.json", tmp_path / "source")

    def write(**tensors):
        save_file(tensors, tmp_path / "source" / "model.safetensors")
        return tmp_path / "source"

    return write


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "100KB"}, {"max_shard_size": "100KB", "jobs": 2}])
def test_bf16_of_fp8_is_the_official_cast_tensor_by_tensor(tmp_path, arguments):
    to_bf16(FP8, tmp_path / "out", **arguments)
    official = json.loads((FP8 / "golden" / "fp8_cast_bf16_sha256.json").read_text())
    folder = CheckpointFolder(tmp_path / "out")
    names = {"BF16": "bfloat16", "F32": "float32"}
    ours = {name: [names[h.dtype], list(h.shape), digest(folder.read(name))] for name, h in folder.tensors.items()}
    assert ours == official


def test_config_of_bf16_says_so_and_keeps_the_rest(tmp_path):
    to_bf16(FP8, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (FP8, tmp_path / "out"))
    assert after == {key: value for key, value in before.items() if key != "quantization_config"}
    assert after["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("spelling", [["torch_dtype"], ["dtype"], ["dtype", "torch_dtype"], []])
def test_dtype_is_bf16_in_every_spelling_that_the_config_has(tmp_path, copy, spelling):
    source = copy(**{W: torch.ones(3, 3).to(torch.float8_e4m3fn), S: torch.ones(1, 1)})
    (source / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **dict.fromkeys(spelling, "float32")}))
    to_bf16(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "deepseek_v3", **dict.fromkeys(spelling or ["dtype"], "bfloat16")}


@torch.no_grad()
def test_bf16_checkpoint_has_the_logits_of_the_fp8_one(tmp_path):
    to_bf16(FP8, tmp_path / "out", max_shard_size="200KB")
    tokens = torch.arange(32)[None]
    ours, expected = (AutoModelForCausalLM.from_pretrained(f, dtype="bfloat16") for f in (tmp_path / "out", FP8))
    assert torch.equal(ours(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("shape", [(0, 5), (300, 0), (0, 0)])
def test_weights_without_elements_go_along(tmp_path, copy, shape):
    weight, scale = quantize(torch.ones(shape))
    to_bf16(copy(**{W: weight, S: scale, "x": torch.ones(2)}), tmp_path / "bf16")
    to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    assert load_file(tmp_path / "bf16" / "model.safetensors")[W].shape == shape
    back = load_file(tmp_path / "fp8" / "model.safetensors")
    assert (back[W].shape, back[S].shape) == (shape, scale.shape)


@given(SIZES, SIZES, st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_fp8_is_that_of_the_definition(rows, columns, ue8m0, seed):
    weight = random_weight(rows, columns, seed)
    quantised, scale = quantize(weight, scale_fmt="ue8m0" if ue8m0 else None)
    expected, expected_scale = plain_quantize(weight, ue8m0)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bits(quantised), bits(expected))


@given(SIZES, SIZES, st.sampled_from([None, "ue8m0"]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_there_and_back_is_within_half_a_step_of_e4m3(rows, columns, scale_fmt, seed):
    weight = random_weight(rows, columns, seed)
    back = dequantize(*quantize(weight, scale_fmt=scale_fmt))
    scale = (
        quantize(weight, scale_fmt=scale_fmt)[1].repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    )
    assert ((back - weight.float()).abs() <= torch.maximum(weight.float().abs() / 16, scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("amax", [448.0, 1.0, 7 * 2.0**-12, 1e-37, 1e-42])
def test_ue8m0_scales_are_the_next_powers_of_two_and_nothing_overflows(amax):
    quantised, scale = quantize(torch.full((1, 1), amax), scale_fmt="ue8m0")
    assert torch.frexp(scale).mantissa.item() == 0.5
    assert max(amax / 448, 2.0**-126) <= scale.item() < 2 * max(amax / 448, 2.0**-126)
    assert quantised.float().isfinite().all()


def test_quantised_are_the_tensors_of_the_official_checkpoint(tmp_path):
    to_bf16(FP8, tmp_path / "bf16")
    to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    ours, official = CheckpointFolder(tmp_path / "fp8"), CheckpointFolder(FP8)
    kinds = [{n: (h.dtype, h.shape) for n, h in folder.tensors.items()} for folder in (ours, official)]
    assert kinds[0] == kinds[1]
    assert json.loads((tmp_path / "fp8" / "config.json").read_text()) == json.loads((FP8 / "config.json").read_text())
    for name, header in ours.tensors.items():
        if header.dtype == "BF16" or name.endswith("bias"):
            assert torch.equal(ours.read(name), official.read(name)), name


@torch.no_grad()
def test_fp8_of_golden_a_loads_with_nearly_its_logits(tmp_path):
    to_fp8(FP32, tmp_path / "fp8", scale_fmt="ue8m0", max_shard_size="100KB")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    golden = load_file(FP32 / "golden" / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    difference = (model(golden["short_ids"]).logits - golden["short_logits"]).abs().mean()
    assert 0 < difference < 0.5 * golden["short_logits"].std()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({W: torch.ones(3, 3)}, "has no FP8 weights"),
        ({W: torch.ones(3, 3).to(torch.float8_e4m3fn)}, rf"{W} is FP8, but its scales {S} are missing"),
        ({W: torch.ones(3, 3).to(torch.float8_e4m3fn), S: torch.ones(2, 2)}, rf"{S} is F32 \(2, 2\)"),
        ({W: torch.ones(3, 3).to(torch.float8_e4m3fn), S: torch.full((1, 1), torch.nan)}, f"{S} holds nan"),
    ],
)
def test_bad_fp8_is_refused_before_anything_is_written(tmp_path, copy, tensors, message):
    with pytest.raises(ValueError, match=message):
        to_bf16(copy(**tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [FP8, "config"])
def test_quantised_checkpoint_is_not_quantised_again(tmp_path, copy, source):
    with pytest.raises(ValueError, match="is quantised already.*to-bf16"):
        to_fp8(copy(**{W: torch.ones(3, 3)}) if source == "config" else source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_quantise_and_unknown_scale_fmt_are_errors(tmp_path):
    save_file({"model.layers.0.mlp.gate.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has none of the weights that FP8 is for"):
        to_fp8(tmp_path, tmp_path.with_name("out"))
    with pytest.raises(ValueError, match="scale_fmt is 'e8m0'; expected 'ue8m0'"):
        to_fp8(FP32, tmp_path.with_name("out"), scale_fmt="e8m0")


def test_checkpoint_without_config_is_refused(tmp_path, copy):
    source = copy(**{W: torch.ones(3, 3).to(torch.float8_e4m3fn), S: torch.ones(1, 1)})
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        to_bf16(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "dtype"), [(torch.inf, torch.float32), (torch.nan, torch.bfloat16)])
def test_weight_that_is_not_finite_is_named_and_leaves_nothing(tmp_path, value, dtype):
    source, last = shutil.copytree(FP32, tmp_path / "source"), "model.layers.3.self_attn.o_proj.weight"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    tensors[last][2, 3] = value
    save_file(tensors, source / "model.safetensors")
    (tmp_path / "empty").mkdir()
    for out in ("out", "empty"):
        with pytest.raises(ValueError, match=rf"model\.safetensors: rows 0 to 47 of {last}: holds {value}"):
            to_fp8(source, tmp_path / out, max_shard_size="20KB")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "empty").iterdir())
