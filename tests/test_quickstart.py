"""The quickstart as a user runs it, and the small model that it loads."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_deepseek import DeepseekV3ForCausalLM
from modeling_deepseek.conversion.quantization import to_fp8
from modeling_deepseek.hub import auto_map_for, code_files

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY, TINY_FP8 = EXAMPLES / "tiny-v3", EXAMPLES / "tiny-v3-fp8"
CONFIG = json.loads((TINY / "config.json").read_text())
LATENT_ELEMENTS = CONFIG["num_hidden_layers"] * (CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"])
FULL_ELEMENTS = (
    CONFIG["num_hidden_layers"]
    * CONFIG["num_attention_heads"]
    * (CONFIG["qk_nope_head_dim"] + CONFIG["qk_rope_head_dim"] + CONFIG["v_head_dim"])
)


@pytest.fixture
def quickstart(tmp_path):
    """Runs the script from another directory, without network and without anybody's caches."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"), PYTHONDONTWRITEBYTECODE="1")
    env |= dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")

    def run(*arguments):
        command = [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=240)

    return run


def bytes_per_token(printed, label):
    return int(re.search(rf"^{label}: +([\d,]+) bytes per token", printed, re.MULTILINE).group(1).replace(",", ""))


def layer_keys(layer):
    """Official names of one layer, without the prefix `model.layers.N.`."""
    keys = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
    keys |= {f"self_attn.{name}.weight" for name in attention.split()}
    blocks = ["mlp"]
    if layer >= CONFIG["first_k_dense_replace"]:
        blocks = ["mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(CONFIG["n_routed_experts"]))]
        keys |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    keys |= {f"{block}.{name}_proj.weight" for block in blocks for name in ("gate", "up", "down")}
    if layer >= CONFIG["num_hidden_layers"]:
        extra = "embed_tokens enorm hnorm eh_proj shared_head.norm shared_head.head"
        keys |= {f"{name}.weight" for name in extra.split()}
    return keys


def test_completes_a_prompt_and_reports_the_cache(quickstart):
    done = quickstart("--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("class Point:\n    def __init__(self, x, y):")
    assert bytes_per_token(done.stdout, "latent cache") == 2 * LATENT_ELEMENTS
    assert bytes_per_token(done.stdout, "full keys and values") == 2 * FULL_ELEMENTS
    assert re.search(r"^speed: +\d+\.\d tokens per second", done.stdout, re.MULTILINE)


def test_compares_speed_with_and_without_mtp_drafts(quickstart):
    done = quickstart("--max-new-tokens", "8", "--mtp")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^without MTP drafts: +\d+\.\d tokens per second$", done.stdout, re.MULTILINE)
    assert re.search(
        r"^with MTP drafts: .* tokens per second, \d\.\d\d times; \d+% accepted$", done.stdout, re.MULTILINE
    )


def test_a_model_without_mtp_layers_cannot_compare(quickstart, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(num_nextn_predict_layers=0)))
    done = quickstart("--model", str(folder), "--mtp")
    assert done.returncode == 2
    assert "has none: leave --mtp out" in done.stderr


def test_dtype_and_prompt_are_the_users(quickstart):
    done = quickstart("--dtype", "float32", "--prompt", "import os", "--max-new-tokens", "4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
    assert bytes_per_token(done.stdout, "latent cache") == 4 * LATENT_ELEMENTS


def test_chat_uses_the_template_of_the_tokenizer(quickstart, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}# {{ m['content'] }}:\n{% endfor %}")
    done = quickstart("--model", str(folder), "--chat", "--prompt", "add two numbers", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# add two numbers:\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat"], "--chat needs a chat template"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--model", "no/such-model"], "--model no/such-model: "),
    ],
    ids=["chat without template", "unknown dtype", "unknown model"],
)
def test_bad_input_is_one_clear_error(quickstart, arguments, message):
    done = quickstart(*arguments)
    assert done.returncode == 2
    assert "quickstart.py: error: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_small_model_has_at_most_8_megabytes():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 8_000_000


def test_small_model_has_the_official_keys():
    layers = range(CONFIG["num_hidden_layers"] + CONFIG["num_nextn_predict_layers"])
    expected = {f"model.layers.{layer}.{key}" for layer in layers for key in layer_keys(layer)}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    with safe_open(TINY / "model.safetensors", framework="pt") as tensors:
        assert set(tensors.keys()) == expected


def test_small_model_names_its_code():
    assert CONFIG["model_type"] == "deepseek_v3"
    assert CONFIG["num_nextn_predict_layers"] == 1
    assert CONFIG["auto_map"] == auto_map_for("deepseek_v3")


def test_small_model_carries_the_code_of_today():
    """`deepseek-convert add-code examples/tiny-v3` brings the folder up to date."""
    expected = {file.name: file.read_text() for file in code_files()}
    assert {file.name: file.read_text() for file in TINY.glob("*.py")} == expected


def test_card_states_fewer_bits_than_the_compressors():
    card = ModelCard.load(TINY / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    bits = [
        float(number) for number in re.findall(r"^\|.*\| (?:\*\*)?(\d\.\d{3})(?:\*\*)? \|$", card.text, re.MULTILINE)
    ]
    model, xz, gzip = bits
    assert 0 < model < xz < gzip


def test_card_states_the_acceptance_of_the_drafts():
    text = ModelCard.load(TINY / "README.md").text
    greedy, sampled = re.search(
        r"accepts (\d+)% of\s+the drafts in greedy decoding, and (\d+)% in sampling", text
    ).groups()
    assert 70 <= int(sampled) <= int(greedy) <= 100


def test_the_small_model_accepts_its_drafts():
    model = DeepseekV3ForCausalLM.from_pretrained(TINY, dtype="float32")
    ids = torch.tensor(AutoTokenizer.from_pretrained(TINY)(inspect.getsource(json.JSONEncoder))["input_ids"])
    prompts = ids[: 8 * 48].view(8, 48)  # a module that was held out
    options = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=48, do_sample=False, eos_token_id=None)
    result = model.generate(prompts, **options, pad_token_id=1, use_mtp=True, return_dict_in_generate=True)
    assert result.mtp_stats.acceptance_rate >= 0.70
    assert torch.equal(result.sequences, model.generate(prompts, **options))


def test_the_small_model_in_fp8_is_what_the_converter_makes_of_it(tmp_path):
    to_fp8(TINY, tmp_path / "fp8")
    expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "fp8", TINY_FP8))
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items()
    )
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del config["auto_map"]  # without the code
    assert json.loads((TINY_FP8 / "config.json").read_text()) == config


@pytest.mark.parametrize("fp8_weights", ["dequantize", "keep"])
def test_the_small_model_in_fp8_predicts_as_well(pretrain, fp8_weights):
    text = inspect.getsource(json.decoder)  # a module that was held out
    ids = torch.tensor(AutoTokenizer.from_pretrained(TINY_FP8)(text)["input_ids"])
    bits = []
    for folder in (TINY, TINY_FP8):
        model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32", fp8_weights=fp8_weights)
        bits.append(pretrain.bits_per_byte(model.eval(), ids, len(text.encode())))
    assert bits[1] / bits[0] == pytest.approx(1, abs=5e-3)
    assert bits[1] != bits[0]
