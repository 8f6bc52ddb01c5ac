"""LoRA adapters: which modules each target reaches in each family, and that adapters train, travel and merge."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as NativeV2
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeV3

from absent import without
from modeling_deepseek import DeepseekV2ForSequenceClassification
from modeling_deepseek.adapters import save_per_expert
from modeling_deepseek.lora import lora_targets
from tiny import tiny_config, tiny_model, tiny_tokens

FAMILIES = ("llm", "moe16b", "v2", "v3")
IDS = torch.arange(3, 20)[None]

MHA = ("q_proj", "k_proj", "v_proj", "o_proj")
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = {"llm": 2, "moe16b": 3, "v2": 3, "v3": 3}


def paths(family: str, *kinds: str) -> set[str]:
    """What adapters of `kinds` ("attention", "dense", "shared", "experts", "router") sit on: layer 0 of MoE models is dense."""
    found = set()
    for layer in range(LAYERS[family]):
        dense = family == "llm" or layer == 0
        if "attention" in kinds:
            found |= {f"{layer}.self_attn.{name}" for name in (MLA if family in ("v2", "v3") else MHA)}
        if "dense" in kinds and dense:
            found |= {f"{layer}.mlp.{name}" for name in MLP}
        if "shared" in kinds and not dense:
            found |= {f"{layer}.mlp.shared_experts.{name}" for name in MLP}
        if "experts" in kinds and not dense:
            found |= {f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
        if "router" in kinds and not dense:
            found |= {f"{layer}.mlp.gate.weight"}
    return found


def adapted(model) -> set[str]:
    """Where the adapters of `model` are, as in `paths`."""
    found = set()
    for path, module in model.named_modules():
        if getattr(module, "lora_A", None):
            path = re.sub(r".*layers\.", "", path).replace(".base_layer", "")
            found.add(".".join(filter(None, (path, getattr(module, "parameter_name", None)))))
    return found


def adapt(family: str, **options):
    return get_peft_model(tiny_model(family), LoraConfig(r=4, **options))


TARGETS = {
    "attention": (lora_targets("attention"), ("attention",), dict(llm=8, moe16b=12, v2=15, v3=15)),
    "mlp": (lora_targets("mlp"), ("dense", "shared"), dict(llm=6, moe16b=9, v2=9, v3=9)),
    "experts": (lora_targets("experts"), ("experts",), dict(moe16b=4, v2=4, v3=4)),
    "all": (lora_targets("all"), ("attention", "dense", "shared", "experts"), dict(llm=14, moe16b=25, v2=28, v3=28)),
    "none given": ({}, ("attention",), dict(llm=8, moe16b=12, v2=15, v3=15)),
    "all-linear": (
        {"target_modules": "all-linear"},
        ("attention", "dense", "shared", "experts"),
        dict(llm=14, moe16b=25, v2=28, v3=28),
    ),
    "three names": (
        {"target_modules": list(MLP)},
        ("dense", "shared", "experts"),
        dict(llm=6, moe16b=13, v2=13, v3=13),
    ),
    "shared": ({"target_modules": [f"shared_experts.{name}" for name in MLP]}, ("shared",), dict(moe16b=6, v2=6, v3=6)),
    "dense": ({"target_modules": [f"mlp.{name}" for name in MLP]}, ("dense",), dict(llm=6, moe16b=3, v2=3, v3=3)),
    "routed": ({"target_modules": [f"experts.{name}" for name in MLP]}, ("experts",), dict(moe16b=4, v2=4, v3=4)),
    "router": ({"target_modules": ["gate"]}, ("router",), dict(moe16b=2, v2=2, v3=2)),
    "router by regex": ({"target_modules": r".*\.gate"}, ("router",), dict(moe16b=2, v2=2, v3=2)),
    "router and more by regex": (
        {"target_modules": r".*\.(gate|mlp\.\w+_proj)"},
        ("router", "dense"),
        dict(moe16b=5, v2=5, v3=5),
    ),
    "parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ("experts",),
        dict(moe16b=4, v2=4, v3=4),
    ),
}
REACHED = [(name, family) for name, (_, _, numbers) in TARGETS.items() for family in numbers]


@pytest.mark.parametrize(("name", "family"), REACHED)
def test_a_target_reaches_what_it_names(name, family):
    options, kinds, numbers = TARGETS[name]
    found = adapted(adapt(family, **options))
    assert found == paths(family, *kinds)
    assert len(found) == numbers[family]


def test_one_name_reaches_one_projection():
    assert adapted(adapt("v3", target_modules=["o_proj"])) == {f"{layer}.self_attn.o_proj" for layer in range(3)}
    down = adapted(adapt("v3", target_modules=["down_proj"]))
    assert down == {path for path in paths("v3", "dense", "shared", "experts") if path.endswith(".down_proj")}


def test_the_head_is_reached_when_it_is_named():
    model = adapt("v3", target_modules=["lm_head", "o_proj"])
    assert len(adapted(model)) == 4
    assert "base_model.model.lm_head" in {path for path, module in model.named_modules() if hasattr(module, "lora_A")}


def test_layers_to_transform_and_exclude_modules_hold_for_experts_too():
    some = adapt("v3", target_modules=list(MLP), layers_to_transform=[2])
    assert adapted(some) == {path for path in paths("v3", "shared", "experts") if path.startswith("2.")}
    some = adapt("v3", target_modules=list(MLP), exclude_modules=r".*\.experts\..*")
    assert adapted(some) == paths("v3", "dense", "shared")
    some = adapt("v3", target_modules="all-linear", exclude_modules=r".*layers\.1\.mlp\.experts\..*")
    assert adapted(some) == {
        path for path in paths("v3", "attention", "dense", "shared", "experts") if not path.startswith("1.mlp.experts")
    }


def test_mtp_layers_are_reached_like_the_others():
    model = get_peft_model(tiny_model("v3", num_nextn_predict_layers=1), LoraConfig(target_modules="all-linear"))
    mtp = {path for path in adapted(model) if path.startswith("3.")}
    assert mtp == {
        path.replace("2.", "3.", 1) for path in paths("v3", "attention", "shared", "experts") if path[0] == "2"
    } | {"3.eh_proj"}


def test_ranks_of_experts():
    model = adapt("v3", target_modules=list(MLP), rank_pattern={"experts.down_proj": 6}, lora_alpha=12)
    ranks = {
        module.parameter_name: (module.r, module.scaling)
        for module in model.modules()
        if hasattr(module, "parameter_name")
    }
    # two factors of rank 4 each, side by side
    assert ranks == {
        "gate_up_proj": ({"default": 8}, {"default": 3.0}),
        "down_proj": ({"default": 6}, {"default": 2.0}),
    }


def test_a_fresh_adapter_changes_nothing_and_a_random_one_does():
    for family in FAMILIES:
        base = tiny_model(family)(IDS).logits
        assert torch.equal(adapt(family, **lora_targets("all")).eval()(IDS).logits, base)
        assert not torch.allclose(
            adapt(family, **lora_targets("all"), init_lora_weights=False).eval()(IDS).logits, base
        )


@pytest.mark.parametrize(
    "options",
    [
        lora_targets("all"),
        lora_targets("all") | dict(use_rslora=True),
        lora_targets("attention") | dict(use_dora=True),
        lora_targets("mlp") | dict(use_dora=True, lora_dropout=0.1),
        dict(target_modules=["gate"]),
    ],
    ids=["LoRA", "rsLoRA", "DoRA on attention", "DoRA on MLPs", "router"],
)
@pytest.mark.parametrize("family", ["moe16b", "v3"])
def test_adapters_learn_and_the_base_stays_bit_identical(family, options):
    model = adapt(family, **options).train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    ids = tiny_tokens(model.config, batch=4, length=16)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if ".lora_" not in name} == set()
    learned = {re.sub(r"\.lora_B.*", "", name) for name in changed if ".lora_B." in name}
    assert len(learned) == len(adapted(model))


IMPOSSIBLE = {
    "no module": (
        "v3",
        dict(target_modules=["o_proj", "nope"]),
        r"no module of this DeepseekV3.* is named 'nope'.*lora_targets",
    ),
    "not of the family": (
        "v3",
        dict(target_modules=["q_proj", "o_proj"]),
        r"is named 'q_proj'\. It has .*q_a_proj, q_b_proj",
    ),
    "no router": ("llm", dict(target_modules=["gate"]), r"is named 'gate'\. It has down_proj, gate_proj, k_proj"),
    "no experts": ("llm", lora_targets("experts"), r"no module of this DeepseekForCausalLM is named '.*experts"),
    "no parameter": (
        "llm",
        dict(target_parameters=["experts.down_proj"]),
        r"no parameter of this .* is named 'experts\.down",
    ),
    "half a parameter": (
        "v3",
        dict(target_parameters=["experts.gate_proj"]),
        r"named 'experts\.gate_proj'\. .*gate_up_proj",
    ),
    "gate without up": (
        "v3",
        dict(target_modules=["gate_proj"]),
        r"gate_proj of the routed .* and not up_proj.*'mlp\.gate_proj'",
    ),
    "up without gate": (
        "v2",
        dict(target_modules=r".*\.(up|down)_proj"),
        r"up_proj of the routed .* not gate_proj.*Name both",
    ),
    "dropout": (
        "v3",
        lora_targets("all") | dict(lora_dropout=0.1),
        r"lora_dropout=0\.1 works on linear layers.*set it to 0\.0",
    ),
    "initialisation": (
        "v2",
        lora_targets("experts") | dict(init_lora_weights="pissa"),
        r"init_lora_weights='pissa' works on linear .*set it to True",
    ),
    "ranks of one weight": (
        "v3",
        lora_targets("experts") | dict(rank_pattern={"gate_proj": 2, "up_proj": 4}),
        r"says \[2, 4\] for gate_proj and up_proj",
    ),
    "DoRA": (
        "v2",
        lora_targets("experts") | dict(use_dora=True),
        r"use_dora=True works on linear .*lora_targets\('mlp'\)",
    ),
}


@pytest.mark.parametrize(("family", "options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_done_is_an_error_that_names_the_way_out(family, options, message):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert not adapted(model)


@pytest.mark.parametrize("excluded", [["experts"], ["mlp.experts"], ["gate_up_proj", "down_proj"], r".*experts"])
def test_routed_experts_are_excluded_by_any_of_their_names(excluded):
    found = adapted(adapt("v3", target_modules="all-linear", exclude_modules=excluded))
    assert found and not any(".experts" in name for name in found)


@pytest.mark.parametrize("excluded", [None, ["o_proj"], r".*o_proj"])
def test_heads_of_tasks_are_no_targets_of_all_linear(excluded):
    model = DeepseekV2ForSequenceClassification(tiny_config("v2"))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=excluded))
    assert not any(".score.lora" in name for name, _ in model.named_parameters())
    found = adapted(model)
    assert any("q_b_proj" in name for name in found)
    assert any("o_proj" in name for name in found) == (excluded is None)


@pytest.mark.parametrize(
    "options", [dict(use_rslora=True), dict(rank_pattern={"up_proj": 8}, alpha_pattern={"up_proj": 4})]
)
def test_scale_of_pairs_is_that_of_single_projections(options):
    model = adapt("v3", lora_alpha=16, **lora_targets("all"), **options)
    wrapped = {name: m for name, m in model.named_modules() if hasattr(m, "scaling") and "layers.1.mlp" in name}
    shared = next(m for name, m in wrapped.items() if name.endswith("shared_experts.up_proj"))
    pair = next(m for m in wrapped.values() if getattr(m, "parameter_name", None) == "gate_up_proj")
    assert pair.scaling["default"] == pytest.approx(shared.scaling["default"])
    assert pair.r["default"] == 2 * shared.r["default"]


def test_one_projection_of_a_pair_is_no_half_where_nothing_is_fused():
    assert adapted(adapt("llm", target_modules=["gate_proj"])) == {"0.mlp.gate_proj", "1.mlp.gate_proj"}
    found = adapted(adapt("v3", target_modules=["mlp.gate_proj", "shared_experts.gate_proj"]))
    assert found == {"0.mlp.gate_proj", "1.mlp.shared_experts.gate_proj", "2.mlp.shared_experts.gate_proj"}


def test_another_preset_is_an_error():
    with pytest.raises(ValueError, match=r"preset is one of 'attention', 'mlp', 'experts', 'all'; got 'router'"):
        lora_targets("router")


def native(family: str):
    """Transformers' own model with the weights of the tiny one."""
    ours = tiny_model(family)
    model = {"v2": NativeV2, "v3": NativeV3}[family].from_pretrained(
        None, config=native_config(ours.config), state_dict=ours.state_dict()
    )
    return model.eval()


def native_config(config):
    native_class = {"deepseek_v2": NativeV2, "deepseek_v3": NativeV3}[config.model_type].config_class
    return native_class(**{key: value for key, value in config.to_dict().items() if key in native_class().to_dict()})


def test_other_models_are_left_alone():
    adapt("v3", target_modules=list(MLP))  # the table is wrapped from here on
    there = adapted(get_peft_model(native("v3"), LoraConfig(target_modules=list(MLP))))
    assert there == paths("v3", "experts")  # PEFT's own reading of these names
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    assert adapted(get_peft_model(LlamaForCausalLM(config), LoraConfig())) == {
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
    }


REMOTE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
folder, adapter, out = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model = load()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert "peft" not in sys.modules  # the model is there first
from peft import LoraConfig, PeftModel, get_peft_model
ids = torch.arange(3, 20)[None]
logits = PeftModel.from_pretrained(model, adapter)(ids).logits
torch.manual_seed(1)
config = LoraConfig(r=3, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
model = get_peft_model(load(), config).eval()
names = sorted(name for name, _ in model.named_parameters() if ".lora_A." in name)
model.save_pretrained(out)
torch.save((logits, names, model(ids).logits), out + "/results.pt")
"""


@pytest.mark.parametrize("family", ["moe16b", "v3"])
def test_adapters_travel_between_the_package_and_remote_code(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    ours = adapt(family, **lora_targets("all"), init_lora_weights=False).eval()
    ours.save_pretrained(tmp_path / "ours")
    script = without("modeling_deepseek") + REMOTE
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("base", "ours", "theirs"))]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, names, theirs = torch.load(tmp_path / "theirs" / "results.pt")
    assert torch.equal(logits, ours(IDS).logits)
    assert len(names) == len(paths(family, "dense", "shared", "experts")) == 13
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "theirs").eval()
    assert sorted(name for name, _ in loaded.named_parameters() if ".lora_A." in name) == names
    assert torch.equal(loaded(IDS).logits, theirs)


@pytest.mark.parametrize("name", ["attention", "mlp", "experts", "all", "all-linear", "three names", "router"])
@pytest.mark.parametrize("family", ["moe16b", "v3"])
def test_a_saved_adapter_loads(family, name, tmp_path):
    model = adapt(family, **TARGETS[name][0], init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert adapted(loaded) == adapted(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert adapted(again) == adapted(model)


@pytest.mark.parametrize("name", ["attention", "all"])
def test_an_adapter_loads_into_the_model_itself(name, tmp_path):
    model = adapt("v3", **TARGETS[name][0], init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    loaded = tiny_model("v3")
    loaded.load_adapter(str(tmp_path))
    assert adapted(loaded) == adapted(model)
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    fresh = tiny_model("v3")
    fresh.add_adapter(LoraConfig(**TARGETS[name][0]))
    assert adapted(fresh) == adapted(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_are_saved_under_official_keys(family, tmp_path):
    model = adapt(family, **lora_targets("all"), init_lora_weights=False).eval()
    logits = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == official_keys(family, tmp_path / "base")
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def official_keys(family: str, folder) -> set[str]:
    tiny_model(family).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_adapters_are_switched_and_swapped(tmp_path):
    wanted = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = adapt("v3", **lora_targets("all"), init_lora_weights=False).eval()
        model.save_pretrained(tmp_path / str(seed))
        wanted[seed] = model(IDS).logits
    model = PeftModel.from_pretrained(tiny_model("v3"), tmp_path / "1").eval()
    model.load_adapter(tmp_path / "2", adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, wanted[2])
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny_model("v3")(IDS).logits)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, wanted[1])
    hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default")
    assert torch.equal(model(IDS).logits, wanted[2])


READ_BY_NATIVE = {"attention": True, "experts": True, "mlp": False, "all": False}


@pytest.mark.parametrize("name", READ_BY_NATIVE)
def test_which_adapters_native_transformers_reads(name, tmp_path):
    """PEFT gives native classes no way to an adapter on dense MLPs and shared experts: merge those."""
    model = adapt("v3", **lora_targets(name), init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(native("v3"), tmp_path).eval()
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-3) == READ_BY_NATIVE[name]


def test_adapters_of_native_transformers_are_read(tmp_path):
    config = LoraConfig(target_modules=[*MLP, "o_proj"], init_lora_weights=False)
    model = get_peft_model(native("v3"), config).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("v3"), tmp_path).eval()
    assert adapted(loaded) == adapted(model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-3)


PER_EXPERT = {"attention": 4, "mlp": 4, "experts": 8, "all": 8, "all-linear": 8, "parameters": 4, "router": 4}


@pytest.mark.parametrize("family", ["moe16b", "v3"])
@pytest.mark.parametrize("name", PER_EXPERT)
def test_an_adapter_for_vllm_has_per_expert_keys_and_the_same_products(name, family, tmp_path):
    """vLLM reads DeepSeek adapters in this form only (`is_3d_moe_weight` is False there), with one rank and one alpha."""
    model = adapt(family, **TARGETS[name][0], init_lora_weights=False, lora_alpha=10).eval()
    save_per_expert(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    modules = {key.removesuffix(".lora_A.weight") for key in written if key.endswith(".lora_A.weight")}
    assert modules == {f"base_model.model.model.layers.{path}" for path in per_expert(paths(family, *TARGETS[name][1]))}
    assert {tensor.shape["lora_B" in key] for key, tensor in written.items()} == {PER_EXPERT[name]}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (PER_EXPERT[name], PER_EXPERT[name], False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["target_parameters"]) == ({}, {}, None)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert adapted(loaded) == adapted(model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def per_expert(adapters: set[str]) -> set[str]:
    found = set()
    for path in adapters:
        owner, _, name = path.rpartition(".")
        if owner.endswith(".experts"):
            names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            found |= {f"{owner}.{expert}.{each}" for expert in range(8) for each in names}
        else:
            found.add(path.removesuffix(".weight"))
    return found


def test_factors_of_one_expert_are_those_that_its_weight_gets(tmp_path):
    model = adapt("v3", **lora_targets("experts"), init_lora_weights=False, use_rslora=True)
    before = tiny_model("v3").model.layers[1].mlp.experts
    save_per_expert(model, tmp_path)
    after = model.merge_and_unload().model.layers[1].mlp.experts
    written = load_file(tmp_path / "adapter_model.safetensors")
    for name in MLP:
        path = f"base_model.model.model.layers.1.mlp.experts.5.{name}"
        delta = written[f"{path}.lora_B.weight"] @ written[f"{path}.lora_A.weight"]
        kind = name.removesuffix("_proj")
        torch.testing.assert_close(delta, after._weight_of(5, kind) - before._weight_of(5, kind), rtol=1e-4, atol=1e-5)


def test_half_adapted_experts_are_written_whole(tmp_path):
    model = adapt("v3", target_parameters=["mlp.experts.down_proj"], init_lora_weights=False).eval()
    save_per_expert(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.2.mlp.experts.7"
    assert written[f"{path}.up_proj.lora_A.weight"].shape == (4, 48)
    assert written[f"{path}.up_proj.lora_B.weight"].shape == (40, 4)
    assert not written[f"{path}.gate_proj.lora_B.weight"].any()
    loaded = PeftModel.from_pretrained(tiny_model("v3"), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_adapters_of_mtp_layers_are_left_out_of_what_vllm_reads(tmp_path, caplog):
    model = get_peft_model(
        tiny_model("v3", num_nextn_predict_layers=1), LoraConfig(target_modules=["eh_proj", "o_proj"])
    )
    save_per_expert(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[4] for key in written} == {"0", "1", "2"}
    assert "2 adapters of MTP layers are not written" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lora_targets("attention") | dict(use_dora=True), r"use_dora=True has no place.*merge_and_unload"),
        (lora_targets("attention") | dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] has no place"),
        (dict(target_modules=["embed_tokens"]), r"model\.embed_tokens is an embedding"),
    ],
    ids=["DoRA", "modules_to_save", "embedding"],
)
def test_what_vllm_does_not_read_is_not_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_per_expert(adapt("v3", **options), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_adapter_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter 'second': it has 'default'"):
        save_per_expert(adapt("v3"), tmp_path, "second")
