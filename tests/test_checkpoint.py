"""What a checkpoint folder must hold, and what happens where it does not."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek import DeepseekV3ForCausalLM
from modeling_deepseek.checkpoint import check_experts, layer_index

OFFICIAL = Path(__file__).parent / "goldens" / "a_v3_fp32"
MTP = 3  # the MTP layer's index: the golden has 3 main layers
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"


def folder_with(path: Path, tensors: dict, **config) -> Path:
    """A copy of the golden folder with other tensors and config fields."""
    path.mkdir(exist_ok=True)
    stored = json.loads((OFFICIAL / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stored | config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def tensors():
    return load_file(OFFICIAL / "model.safetensors")


@pytest.fixture
def warnings(monkeypatch):
    """Messages that transformers' loggers give at warning level while loading."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers.modeling_utils", "modeling_deepseek.checkpoint")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def test_layer_index_reads_names_with_and_without_prefix():
    keys = ("model.layers.61.enorm.weight", "layers.4.mlp.gate.weight", "lm_head.weight")
    assert [layer_index(key) for key in keys] == [61, 4, -1]


def test_a_missing_backbone_tensor_is_named_in_a_warning(tmp_path, tensors, warnings):
    del tensors["model.layers.1.input_layernorm.weight"]
    _, info = DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors), output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.input_layernorm.weight"}
    assert any("model.layers.1.input_layernorm.weight" in message for message in warnings)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.kv_b_proj.weight"])
def test_a_misshapen_tensor_is_an_error_that_names_it(tmp_path, tensors, name):
    tensors[name] = torch.ones(7)
    with pytest.raises(RuntimeError, match=rf"{name}: \(7,\) in the checkpoint"):
        DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors))


def test_a_missing_expert_is_an_error_that_names_it(tmp_path, tensors):
    del tensors[EXPERT]
    with pytest.raises(ValueError, match=f"{EXPERT} is missing"):
        DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors))


def test_a_misshapen_expert_is_an_error_that_names_it(tmp_path, tensors):
    tensors[EXPERT] = torch.ones(5, 6)
    with pytest.raises(ValueError, match=rf"{EXPERT} is \(5, 6\)"):
        DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors))


def test_more_experts_than_the_config_says_are_an_error(tmp_path, tensors):
    with pytest.raises(ValueError, match="exceeds n_routed_experts 8"):
        DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors, n_routed_experts=8))


def test_a_check_of_v3s_46_thousand_tensors_takes_headers_only():
    class V3:
        n_routed_experts, hidden_size, moe_intermediate_size = 256, 7168, 2048

    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight": (7168, 2048)
        if kind == "down"
        else (2048, 7168)
        for layer in range(3, 62)
        for expert in range(256)
        for kind in ("gate", "up", "down")
    }
    check_experts(V3, 62, shapes)


def test_mtp_layers_that_are_claimed_and_not_there_are_switched_off_with_one_warning(tmp_path, tensors, warnings):
    kept = {key: tensor for key, tensor in tensors.items() if layer_index(key) != MTP}
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, kept), output_loading_info=True)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == MTP
    assert not info["missing_keys"]
    assert len([message for message in warnings if "num_nextn_predict_layers" in message]) == 1


@pytest.mark.parametrize("lost", ["enorm.weight", "mlp.gate.e_score_correction_bias", "self_attn.o_proj.weight"])
def test_mtp_layers_that_are_there_in_part_are_an_error_that_names_what_is_missing(tmp_path, tensors, lost):
    del tensors[f"model.layers.{MTP}.{lost}"]
    folder = folder_with(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"in part; missing: model.layers.{MTP}.{lost}.*num_nextn_predict_layers=0"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
    assert DeepseekV3ForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0).num_parameters() > 0


def test_an_mtp_layer_behind_one_that_is_missing_is_an_error(tmp_path, tensors):
    moved = {key.replace(f"layers.{MTP}.", f"layers.{MTP + 1}."): tensor for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=f"missing: model.layers.{MTP}.eh_proj.weight"):
        DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, moved, num_nextn_predict_layers=2))


def test_of_two_claimed_mtp_layers_the_one_that_is_there_is_kept(tmp_path, tensors):
    model = DeepseekV3ForCausalLM.from_pretrained(folder_with(tmp_path, tensors, num_nextn_predict_layers=2))
    assert model.config.num_nextn_predict_layers == 1
    assert len(model.model.layers) == MTP + 1


def test_mtp_layers_that_the_user_does_not_want_are_dropped_without_a_word(warnings):
    ids = torch.arange(12)[None]
    with_mtp = DeepseekV3ForCausalLM.from_pretrained(OFFICIAL)
    without = DeepseekV3ForCausalLM.from_pretrained(OFFICIAL, num_nextn_predict_layers=0)
    assert len(without.model.layers) == MTP
    assert not warnings
    assert torch.equal(with_mtp(ids).logits, without(ids).logits)


def test_a_truncated_file_is_named(tmp_path, tensors):
    file = folder_with(tmp_path, tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path, tensors):
    shutil.copy(OFFICIAL / "config.json", tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="model-00001-of-00001.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_config_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, DeepseekV3ForCausalLM.from_pretrained):
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            load(tmp_path)


def test_only_whole_mtp_layers_may_be_turned_off_in_silence(tmp_path, tensors):
    tensors["model.layers.7.mlp.gate.weight"] = torch.zeros(2)  # of no layer that was ever there
    tensors["model.layers.1.extra.weight"] = torch.zeros(2)
    folder = folder_with(tmp_path, tensors)
    _, info = DeepseekV3ForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.7.mlp.gate.weight", "model.layers.1.extra.weight"}


def test_a_tensor_in_two_shards_is_named(tmp_path, tensors):
    folder, name = folder_with(tmp_path, tensors), "model.norm.weight"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors.pop(name) + 1}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map | {name: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="00002-of-00002.safetensors holds model.norm.weight, which another file holds too"
    ):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def test_an_index_that_promises_more_than_there_is_is_an_error(tmp_path, tensors):
    name = "model.norm.weight"
    folder = folder_with(tmp_path, tensors)
    (folder / "model.safetensors").unlink()
    del tensors[name]
    half = len(tensors) // 2
    shards = {"a.safetensors": dict(list(tensors.items())[:half]), "b.safetensors": dict(list(tensors.items())[half:])}
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, part in shards.items() for key in part} | {name: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="puts model.norm.weight into b.safetensors, which does not hold it"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
