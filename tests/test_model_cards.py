"""The model cards: metadata that the Hub takes, snippets that run, tables that are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_deepseek as plugin
from absent import without
from tiny import tiny_model

CARDS = {path.stem: path for path in sorted((Path(__file__).resolve().parent.parent / "model_cards").glob("*.md"))}
FAMILIES = {"deepseek_moe_16b": "moe16b", "deepseek_v2": "v2", "deepseek_v3": "v3"}  # names in tiny.py

# What the snippets load, and the tests replace by a tiny folder.
MODEL_IDS = {
    "deepseek_llm": "deepseek-ai/deepseek-llm-7b-base",
    "deepseek_moe_16b": "deepseek-ai/deepseek-moe-16b-base",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3",
}


def family_model(card):
    """A tiny model of the card's family, in the class that its official folders name."""
    special = dict(vocab_size=258, bos_token_id=256, eos_token_id=257, pad_token_id=None)
    if card != "deepseek_llm":
        return tiny_model(FAMILIES[card], **special)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**special, **sizes, num_key_value_heads=2))


def save_tokenizer(folder):
    """A byte-level tokenizer under the class name that the official folders give theirs."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```$", CARDS[card].read_text(encoding="utf-8"), re.M | re.S)


def table(card):
    """The rows of the card's table of sizes, each a dict from column to text."""
    lines = CARDS[card].read_text(encoding="utf-8").partition("## Sizes\n\n")[2].partition("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny folder per card, as these classes save it (LLM: as transformers does), with a tokenizer."""
    root = tmp_path_factory.mktemp("cards")
    for card in CARDS:
        family_model(card).save_pretrained(root / card)
        save_tokenizer(root / card)
    return root


def run_snippets(card, folder):
    """Execute the card's snippets in order with `folder` for the official id; returns their namespace."""
    namespace = {}
    for snippet in snippets(card):
        exec(compile(snippet.replace(f'"{MODEL_IDS[card]}"', repr(str(folder))), f"{card}.md", "exec"), namespace)
    return namespace


def test_every_family_has_its_card_and_its_snippet():
    assert set(CARDS) == set(MODEL_IDS)
    for card, model_id in MODEL_IDS.items():
        assert f'"{model_id}"' in "".join(snippets(card))
        assert model_id in ModelCard.load(CARDS[card]).data.base_model


@pytest.mark.parametrize("card", CARDS)
def test_metadata_is_what_the_hub_expects(card):
    data = ModelCard.load(CARDS[card]).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "other"
    assert data.license_name == "deepseek"
    assert re.fullmatch(r"https://github\.com/deepseek-ai/[\w-]+/blob/(main|HEAD)/LICENSE-MODEL", data.license_link)
    assert "custom_code" in data.tags
    assert len(set(data.base_model)) == len(data.base_model)
    for repo_id in data.base_model:
        validate_repo_id(repo_id)


@pytest.mark.parametrize("card", CARDS)
def test_snippet_runs_on_an_official_folder_whose_own_code_is_dead(card, folders, tmp_path, monkeypatch, capsys):
    official = tmp_path / "official"
    official.mkdir()
    for path in (folders / card).iterdir():
        dead = path.suffix == ".py"
        (official / path.name).write_bytes(b"raise RuntimeError('dead code')\n" if dead else path.read_bytes())
    monkeypatch.chdir(tmp_path)
    namespace = run_snippets(card, official)
    assert type(namespace["model"]).__module__.startswith("modeling_deepseek.")
    assert namespace["output"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
    assert "An attention function can be described as" in capsys.readouterr().out


def test_last_snippet_runs_without_the_package_on_folders_that_carry_the_code(folders, tmp_path):
    saved = tmp_path / "deepseek-llm-7b-base"  # what the first snippet of that card leaves behind
    plugin.DeepseekForCausalLM.from_pretrained(folders / "deepseek_llm").save_pretrained(saved)
    save_tokenizer(saved)
    script = without("modeling_deepseek")
    for card in CARDS:
        snippet = re.sub(r"^import modeling_deepseek\b.*$", "", snippets(card)[-1], flags=re.M)
        snippet = snippet.replace(f'"{MODEL_IDS[card]}"', repr(str(folders / card)))
        script += f"\n{snippet}\nprint('CLASS', type(model).__module__, type(model).__name__)\n"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    classes = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("CLASS")]
    assert all(module.startswith("transformers_modules.") for module, _ in classes)
    assert [name for _, name in classes] == [
        "DeepseekForCausalLM",
        "DeepseekForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
    ]


CONFIG_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "heads": "num_attention_heads",
    "key/value heads": "num_key_value_heads",
    "MLP width": "intermediate_size",
    "vocabulary": "vocab_size",
    "query rank": "q_lora_rank",
    "latent rank": "kv_lora_rank",
    "routed experts": "n_routed_experts",
    "active experts": "num_experts_per_tok",
    "shared experts": "n_shared_experts",
    "groups": "n_group",
    "active groups": "topk_group",
    "expert width": "moe_intermediate_size",
    "dense layers": "first_k_dense_replace",
}
PREFIXES = {
    "deepseek_llm": "Deepseek",
    "deepseek_moe_16b": "Deepseek",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}


@pytest.mark.parametrize(
    ("card", "row"), [pytest.param(card, row, id=row["release"]) for card in CARDS for row in table(card)]
)
def test_row_of_the_table_of_sizes_describes_one_model(card, row):
    numbers = {column: None if text == "none" else int(text.replace(",", "")) for column, text in list(row.items())[1:]}
    fields = {CONFIG_FIELDS[column]: value for column, value in numbers.items() if column in CONFIG_FIELDS}
    config = getattr(plugin, f"{PREFIXES[card]}Config")(**fields)
    with torch.device("meta"):
        model = getattr(plugin, f"{PREFIXES[card]}ForCausalLM")(config)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(tensor.numel() for tensor in [*model.parameters(), *biases]) == numbers["parameters"]
    if "latent rank" in numbers:
        per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        per_layer = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert config.num_hidden_layers * per_layer == numbers["cache elements per token"]
