"""The base class: initialisation, switches, and the ways from and to a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.deepseek_v3 import DeepseekV3Config as DeepseekV3NativeConfig

import modeling_deepseek
from absent import without
from modeling_deepseek.hub import AUTO_CLASSES, PREFIXES, auto_map_for, code_files, write_model_card
from tiny import tiny_config, tiny_model

FAMILIES = ["llm", "moe16b", "v2", "v3"]
IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_has_weights_code_auto_map_generation_config_and_card(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == auto_map_for(config["model_type"])
    assert config["architectures"] == [type(model).__name__]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "generation_config.json", "README.md", *(file.name for file in code_files())} <= names


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_again_bit_by_bit(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = torch.arange(3, 20)[None]
torch.save(model(ids).logits, out)
model.generate(ids, max_new_tokens=3, do_sample=False)
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_the_package_loads_the_folder(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "saved")
    script = without("modeling_deepseek", "accelerate", "peft", "triton") + REMOTE
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "logits.pt")]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS).logits)


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_layers_are_saved_with_copies_of_embedding_and_head(depth, tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=depth)
    model.save_pretrained(tmp_path)
    saved, main = load_file(tmp_path / "model.safetensors"), model.config.num_hidden_layers
    for layer in range(main, main + depth):
        assert torch.equal(saved[f"model.layers.{layer}.embed_tokens.weight"], model.model.embed_tokens.weight)
        assert torch.equal(saved[f"model.layers.{layer}.shared_head.head.weight"], model.lm_head.weight)
    again = type(model).from_pretrained(tmp_path)
    assert len(again.model.layers) == main + depth
    for ours, theirs in zip(
        model(IDS, output_mtp_logits=True).mtp_logits, again(IDS, output_mtp_logits=True).mtp_logits, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_decoder_without_head_keeps_its_mtp_layers_too(tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    decoder = modeling_deepseek.DeepseekV3Model.from_pretrained(tmp_path)
    assert len(decoder.layers) == decoder.config.num_hidden_layers + 1
    decoder.save_pretrained(tmp_path / "decoder")
    assert len(modeling_deepseek.DeepseekV3Model.from_pretrained(tmp_path / "decoder").layers) == len(decoder.layers)


def test_a_task_head_leaves_mtp_layers_behind_and_the_config_alone(tmp_path):
    model = tiny_model("v3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    config = tiny_config("v3", num_nextn_predict_layers=1)
    classifier = modeling_deepseek.DeepseekV3ForSequenceClassification(config)
    assert (len(classifier.model.layers), config.num_nextn_predict_layers) == (config.num_hidden_layers, 1)
    loaded = modeling_deepseek.DeepseekV3ForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_a_bf16_model_keeps_its_router_bias_in_fp32(tmp_path):
    tiny_model("v3").save_pretrained(tmp_path)
    model = modeling_deepseek.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {name for name in model.state_dict() if name.endswith("e_score_correction_bias")} != set()
    # one dtype among parameters, which FSDP2 asks for
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_plans_name_only_what_the_model_has(family):
    model = tiny_model(family)
    modules = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    patterns = {pattern.replace("*", str(model.config.num_hidden_layers - 1)) for pattern in model._tp_plan}
    dense = {pattern.replace("*", "0") for pattern in model._tp_plan}
    assert all(a in modules or b in modules for a, b in zip(sorted(patterns), sorted(dense), strict=True))
    assert any("self_attn.o_proj" in pattern for pattern in model._tp_plan)


def test_attention_and_experts_can_be_switched():
    model = tiny_model("v3")
    reference = model(IDS).logits
    for attention, experts in (("eager", "eager"), ("sdpa", "grouped_mm"), ("sdpa", "batched_mm")):
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        assert model.config._attn_implementation == attention
        assert model.config._experts_implementation == experts
        torch.testing.assert_close(model(IDS).logits, reference, atol=1e-4, rtol=1e-4)


def test_auto_map_names_classes_that_exist():
    for model_type, prefix in PREFIXES.items():
        entries = auto_map_for(model_type)
        assert entries.keys() == {"AutoConfig", *AUTO_CLASSES}
        for name in entries.values():
            assert name.split(".")[1].startswith(prefix)
            assert hasattr(modeling_deepseek, name.split(".")[1])


def test_a_model_type_of_somebody_else_is_an_error():
    with pytest.raises(ValueError, match="'llama' is not a DeepSeek family: expected one of 'deepseek'"):
        auto_map_for("llama")


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    write_model_card(tmp_path, "deepseek_v3", "me/model")
    assert (tmp_path / "README.md").read_text().endswith("Mine.")


@pytest.mark.parametrize("card", [b"---\ntags: [\n---\n", b"---\nmodel-index: 3\n---\n", b"\xff\xfe"])
def test_a_card_that_is_no_card_does_not_stop_a_model_from_being_saved(card, tmp_path):
    (tmp_path / "README.md").write_bytes(card)
    tiny_model("v2").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == card
    assert (tmp_path / "model.safetensors").is_file()


def test_code_replaces_a_link_and_is_not_written_through_it(tmp_path):
    (blob := tmp_path / "blob").write_text("official code")
    (folder := tmp_path / "snapshot").mkdir()
    (folder / "attention.py").symlink_to(blob)
    tiny_model("v2").save_pretrained(folder)
    assert blob.read_text() == "official code"
    assert not (folder / "attention.py").is_symlink()


def test_a_config_of_the_native_class_is_an_error():
    native = DeepseekV3NativeConfig(num_hidden_layers=1)
    with pytest.raises(ValueError, match="build the config with the DeepseekV3Config of this package"):
        modeling_deepseek.DeepseekV3ForCausalLM(native)


@pytest.mark.parametrize("file", [path.name for path in code_files()])
def test_shipped_code_is_copied_unchanged(file, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "shipped"
    if not folder.exists():
        tiny_model("v2").save_pretrained(folder)
    assert (folder / file).read_bytes() == (Path(modeling_deepseek.__file__).parent / file).read_bytes()
