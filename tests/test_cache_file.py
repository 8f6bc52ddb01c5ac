"""LatentCache.save and load: a later process goes on where this one stopped, and the wrong file is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_deepseek import LatentCache
from tiny import tiny_config, tiny_model, tiny_tokens

ROOT = Path(__file__).resolve().parent.parent
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
PREFIX = 9  # tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("v3", num_nextn_predict_layers=1)


def prompts(model, batch: int = 1) -> torch.Tensor:
    """Prompts `[batch, 13]` with the same prefix."""
    tokens = tiny_tokens(model.config, batch, 13)
    tokens[:, :PREFIX] = tokens[0, :PREFIX].clone()
    return tokens


@torch.no_grad()
def saved(model, path, bits: int | None = None, input_ids: bool = True) -> LatentCache:
    cache, prefix = LatentCache(model.config, bits=bits), prompts(model)[:, :PREFIX]
    model(prefix, past_key_values=cache)
    cache.save(path, prefix if input_ids else None)
    return cache


def edited(path, tensors: dict | None = None, **fields: str) -> None:
    """Replaces tensors (`None` removes one) and metadata of a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    contents = {name: tensor for name, tensor in (load_file(path) | (tensors or {})).items() if tensor is not None}
    save_file({name: tensor.clone() for name, tensor in contents.items()}, path, metadata | fields)


@pytest.mark.parametrize("bits", [None, 8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_loaded_lies_in_memory_as_it_did(dtype, bits, tmp_path):
    model = tiny_model("v3").to(dtype)
    cache = saved(model, tmp_path / "prefix", bits)
    for config in (model.config, None):
        again = LatentCache.load(tmp_path / "prefix", config)
        assert (again.get_seq_length(), again.nbytes, len(again.layers)) == (PREFIX, cache.nbytes, 3)
        for layer, other in zip(again.layers, cache.layers, strict=True):
            assert all(map(torch.equal, layer.stored, other.stored))
            assert layer.keys.dtype == dtype


@pytest.mark.parametrize("bits", [None, 8, 6])
@pytest.mark.parametrize("how", [{}, {"use_mtp": True}], ids=["plain", "mtp"])
def test_generate_goes_on_from_it_as_if_it_had_read_the_prefix(how, bits, model, tmp_path):
    saved(model, tmp_path / "prefix", bits)
    prompt = prompts(model)
    expected = model.generate(prompt, **GREEDY, past_key_values=LatentCache(model.config, bits=bits))
    for _ in range(2):  # the file stays as it is
        cache = LatentCache.load(tmp_path / "prefix", model.config, prompt)
        assert torch.equal(model.generate(prompt, **GREEDY, **how, past_key_values=cache), expected)


@pytest.mark.parametrize("bits", [None, 6])
def test_one_prefix_serves_a_batch(bits, model, tmp_path):
    saved(model, tmp_path / "prefix", bits)
    batch = prompts(model, 3)
    cache = LatentCache.load(tmp_path / "prefix", model.config, batch)
    cache.batch_repeat_interleave(3)
    expected = model.generate(batch, **GREEDY, past_key_values=LatentCache(model.config, bits=bits))
    assert torch.equal(model.generate(batch, **GREEDY, past_key_values=cache), expected)


OTHER_PROCESS = """
import sys
import torch
from modeling_deepseek import DeepseekV3ForCausalLM, LatentCache

folder, prompt = sys.argv[1], torch.tensor([[int(token) for token in sys.argv[2].split()]])
model = DeepseekV3ForCausalLM.from_pretrained(folder)
cache = LatentCache.load(folder + "/prefix.safetensors", model.config, prompt)
result = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, past_key_values=cache)
print(*result[0].tolist())
"""


def test_another_process_goes_on_from_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved(model, tmp_path / "prefix.safetensors", 8)
    prompt = prompts(model)
    expected = model.generate(prompt, **GREEDY, past_key_values=LatentCache(model.config, bits=8))
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), " ".join(map(str, prompt[0].tolist()))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(map(str, expected[0].tolist()))


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Cache\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "with open" in capsys.readouterr().out
    assert LatentCache.load("document.safetensors").bits == 8


def test_another_prompt_is_refused(model, tmp_path):
    saved(model, tmp_path / "prefix")
    prompt = prompts(model, 2)
    prompt[1, 4] += 1
    with pytest.raises(ValueError, match="row 1, token 4"):
        LatentCache.load(tmp_path / "prefix", model.config, prompt)
    with pytest.raises(ValueError, match="9 tokens, and input_ids has 9: pass a prompt that goes on"):
        LatentCache.load(tmp_path / "prefix", model.config, prompt[:, :PREFIX])
    saved(model, tmp_path / "prefix", input_ids=False)
    with pytest.raises(ValueError, match="does not say which tokens"):
        LatentCache.load(tmp_path / "prefix", model.config, prompt)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("v3", dict(kv_lora_rank=20), r"3, \(28, 8\).*3, \(20, 8\)"),
        ("v3", dict(num_hidden_layers=4), r"'deepseek_v3', 3.*'deepseek_v3', 4"),
        ("v2", {}, "'deepseek_v3'.*'deepseek_v2'"),
    ],
    ids=["width", "layers", "family"],
)
def test_the_config_of_another_model_is_refused(family, overrides, message, model, tmp_path):
    saved(model, tmp_path / "prefix")
    with pytest.raises(ValueError, match=message + ".*pass the config"):
        LatentCache.load(tmp_path / "prefix", tiny_config(family, **overrides))


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "damaged"),
    "no safetensors": (lambda path: path.write_bytes(b"latents"), "damaged"),
    "of a model": (lambda path: save_file({"weight": torch.zeros(2)}, path, {"format": "pt"}), "holds no cache"),
    "later version": (lambda path: edited(path, version="2"), "version 2 .* reads 1"),
    "field is no number": (lambda path: edited(path, tokens="many"), "damaged"),
    "other dtype": (lambda path: edited(path, dtype="torch.bananas"), "damaged"),
    "other bits": (lambda path: edited(path, bits="5"), "bits=5"),
    "tensor missing": (lambda path: edited(path, {"layers.1.latent": None}), "layers.1.latent"),
    "fewer tokens": (lambda path: edited(path, {"layers.1.latent": torch.zeros(1, 1, 8, 28)}), r"\(1, 1, 8, 28\)"),
    "tensor of another dtype": (
        lambda path: edited(path, {"layers.2.rope_key": torch.zeros(1, 1, 9, 8).half()}),
        "float16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_right_is_refused(damage, model, tmp_path):
    path = tmp_path / "prefix"
    saved(model, path)
    spoil, message = DAMAGE[damage]
    spoil(path)
    with pytest.raises(ValueError, match=message):
        LatentCache.load(path, model.config)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*LatentCache\.save"):
        LatentCache.load(tmp_path / "nowhere")


def test_what_cannot_be_saved_is_an_error_and_leaves_the_file_alone(model, tmp_path, monkeypatch):
    path = tmp_path / "prefix"
    cache = saved(model, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds no tokens"):
        LatentCache(model.config).save(path)
    with pytest.raises(ValueError, match=r"1 rows of 9 tokens, and input_ids is \(1, 8\)"):
        cache.save(path, torch.zeros(1, 8, dtype=torch.long))

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("modeling_deepseek.cache_file.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
