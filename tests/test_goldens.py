"""Tiny checkpoints in official layouts against the outputs of DeepSeek's own code (tests/goldens/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_deepseek import DeepseekForCausalLM

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = {"e_v2": 5e-4}
CASES = ["a_v3_fp32", "b3_v3_fp8_576", "d_v2lite", "e_v2", "f_moe16b", "g_llm_gqa"]
MLA = ["a_v3_fp32", "b3_v3_fp8_576", "d_v2lite", "e_v2"]
MODES = [pytest.param(case, mode, id=f"{case}-{mode}") for case in MLA for mode in ("auto", "absorbed", "expanded")]
MODES += [pytest.param(case, None, id=case) for case in CASES if case not in MLA]


class Case:
    def __init__(self, name: str):
        self.folder, self.tolerance = GOLDENS / name, TOLERANCE.get(name, 2e-4)
        # DeepSeek-LLM says model_type llama on the Hub: Auto would give it transformers' own class
        auto = DeepseekForCausalLM if name.startswith("g_") else AutoModelForCausalLM
        self.model = auto.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.golden = load_file(self.folder / "golden" / "golden.safetensors")

    def close(self, ours: torch.Tensor, key: str) -> None:
        torch.testing.assert_close(ours, self.golden[key].view_as(ours), atol=self.tolerance, rtol=0)


@pytest.fixture(scope="module")
def cases():
    loaded = {}

    def case(name: str, mode: str | None = "auto") -> Case:
        found = loaded[name] if name in loaded else loaded.setdefault(name, Case(name))
        if name in MLA:
            found.model.config.mla_mode = mode or "auto"
        return found

    return case


@pytest.mark.parametrize(("name", "mode"), MODES)
@torch.no_grad()
def test_logits_equal_the_official_ones(cases, name, mode):
    case = cases(name, mode)
    for ids, logits in (("input_ids", "logits"), ("short_ids", "short_logits")):
        case.close(case.model(case.golden[ids]).logits, logits)
    case.close(case.model(case.golden["long_ids"]).logits[:, -32:], "long_logits_last32")


@pytest.mark.parametrize(("name", "mode"), MODES)
@torch.no_grad()
def test_one_token_at_a_time_gives_the_same_logits(cases, name, mode):
    case = cases(name, mode)
    cache, steps = None, []
    for token in case.golden["input_ids"].split(1, dim=1):
        output = case.model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    case.close(torch.cat(steps, dim=1), "logits")
    if name in MLA:
        case.close(cache.layers[0].keys, "cache_ckv.0")
        case.close(cache.layers[0].values, "cache_kpe.0")


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_greedy_generation_is_the_official_one(cases, name, mode):
    case = cases(name, mode)
    for ids, greedy in (("input_ids", "greedy"), ("short_ids", "short_greedy")):
        prompt, expected = case.golden[ids], case.golden[greedy]
        tokens = case.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(tokens[:, -16:], expected[:, -16:])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_layer_and_router_agrees(cases, name):
    case = cases(name)
    routed = {}
    for index, layer in enumerate(case.model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _, __, output, index=index: routed.setdefault(index, output))
    output = case.model(case.golden["input_ids"], output_hidden_states=True)
    states = {f"layer_out.{index}": state for index, state in enumerate(output.hidden_states[1:-1])}
    states["last_hidden_postnorm"] = output.hidden_states[-1]
    recorded = [key for key in states if key in case.golden]
    assert len(recorded) >= case.model.config.num_hidden_layers - 1
    for key in recorded:
        case.close(states[key], key)
    for index in (int(key.split(".")[1]) for key in case.golden if key.startswith("router_idx.")):
        _, gates, experts = routed.pop(index)
        order = experts.argsort(dim=-1)
        assert torch.equal(experts.gather(1, order), case.golden[f"router_idx.{index}"].view_as(experts).long())
        case.close(gates.gather(1, order), f"router_weight.{index}")
    assert not routed or name == "f_moe16b"


@pytest.mark.parametrize("name", ["a_v3_fp32", "b3_v3_fp8_576"])
@torch.no_grad()
def test_mtp_logits_agree(cases, name):
    case = cases(name)
    (logits,) = case.model(case.golden["input_ids"], output_mtp_logits=True).mtp_logits
    case.close(logits, "mtp_logits")


@pytest.mark.parametrize("name", [case for case in CASES if case != "b3_v3_fp8_576"])
def test_a_saved_model_has_exactly_the_official_tensors(cases, name, tmp_path):
    case = cases(name)
    case.model.save_pretrained(tmp_path)
    ours, official = load_file(tmp_path / "model.safetensors"), load_file(case.folder / "model.safetensors")
    assert ours.keys() == official.keys()
    for key, tensor in official.items():
        assert torch.equal(ours[key], tensor.float()), key


# The official inference demo's names (its sharded dimension behind them) for ours.
DEMO = {
    "embed": ("embed_tokens", 0), "head": ("lm_head", 0), "norm": ("norm", None), "attn_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None), "wq_a": ("q_a_proj", None), "q_norm": ("q_a_layernorm", None),
    "wq_b": ("q_b_proj", 0), "wkv_a": ("kv_a_proj_with_mqa", None), "kv_norm": ("kv_a_layernorm", None),
    "wkv_b": ("kv_b_proj", 0), "wo": ("o_proj", 1), "gate": ("gate", None), "w1": ("gate_proj", 0), "w2": ("down_proj", 1),
    "w3": ("up_proj", 0), "attn": ("self_attn", None), "ffn": ("mlp", None),
}  # fmt: skip


def from_demo(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of all ranks under their Hub names; routed experts lie whole on one rank each."""
    tensors = {}
    for key in sorted(set().union(*ranks)):
        parts = [rank[key] for rank in ranks if key in rank]
        *path, module, kind = key.split(".")
        name, dim = DEMO[module]
        whole = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim=dim)
        kind = "e_score_correction_bias" if kind == "bias" else kind
        name = ".".join([*(DEMO.get(part, (part,))[0] for part in path), name, kind])
        tensors[name if module == "head" else f"model.{name}"] = whole
    return tensors


@pytest.mark.parametrize("ranks", [1, 2])
@torch.no_grad()
def test_the_demo_layout_holds_the_same_model(cases, ranks):
    case = cases("a_v3_fp32")
    folder = GOLDENS / "h_inference_demo" / f"mp{ranks}"
    tensors = from_demo([load_file(folder / f"model{rank}-mp{ranks}.safetensors") for rank in range(ranks)])
    model = type(case.model).from_pretrained(None, config=case.model.config, state_dict=tensors)
    assert len(model.model.layers) == model.config.num_hidden_layers  # the demo has no MTP layer
    case.close(model.eval()(case.golden["input_ids"]).logits, "logits")


def test_unknown_fields_of_an_official_config_survive(cases, tmp_path):
    case = cases("a_v3_fp32")
    case.model.config.save_pretrained(tmp_path)
    saved, official = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, case.folder))
    assert {key: saved[key] for key in ("aux_loss_alpha", "ep_size", "seq_aux")} == {
        key: official[key] for key in ("aux_loss_alpha", "ep_size", "seq_aux")
    }
