"""`inspect`: counts, cache and memory of the released sizes, and what a folder lacks, from headers alone."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling_deepseek
from hub_server import Blob, HubServer, Repo
from modeling_deepseek.conversion.cli import main
from modeling_deepseek.conversion.demo import to_demo
from modeling_deepseek.conversion.family import causal_lm_class, expected_shapes, read_family
from modeling_deepseek.conversion.inspection import cache_elements, count_parameters, inspect, report
from sparse import sparse_checkpoint
from test_parameters import (
    CACHE_ELEMENTS,
    PARAMETERS,
    RELEASES,
    V3_MTP_STORED,
    V3_MTP_UNIQUE,
    V3_STORED,
    V3_TENSORS,
)

GOLDENS = Path(__file__).parent / "goldens"
CASES = ["a_v3_fp32", "b3_v3_fp8_576", "d_v2lite", "e_v2", "f_moe16b", "g_llm_gqa"]
# 10^9 parameters, with the head only and with embedding and head
ACTIVE = {
    "LLM-7B": (6.49, 6.91),
    "LLM-67B": (66.59, 67.43),
    "MoE-16B": (2.62, 2.83),
    "V2-Lite": (2.45, 2.66),
    "V2": (20.85, 21.38),
    "V3": (36.63, 37.55),
}
SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


def release_config(name):
    prefix, fields = RELEASES[name]
    return getattr(modeling_deepseek, f"{prefix}Config")(**fields)


@cache
def released(name):
    config = release_config(name)
    return count_parameters(config, expected_shapes(config))


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """A folder with the headers of V3 in FP8: 642 GiB by the sizes of its files, which are holes."""
    folder = tmp_path_factory.mktemp("v3")
    sparse_checkpoint(folder, {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, fp8=True)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """A function that writes golden b3, an FP8 checkpoint with an MTP layer, with its tensors changed."""

    def write(drop=(), **tensors):
        config, weights = GOLDENS / "b3_v3_fp8_576" / "config.json", GOLDENS / "b3_v3_fp8_576" / "model.safetensors"
        (tmp_path / "config.json").write_bytes(config.read_bytes())
        kept = {name: tensor for name, tensor in load_file(weights).items() if name not in drop}
        save_file(kept | tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("name", RELEASES)
def test_total_parameters(name):
    assert released(name).main == PARAMETERS[name]


@pytest.mark.parametrize("name", RELEASES)
def test_active_parameters(name):
    counts = released(name)
    assert (round(counts.active_head_only / 1e9, 2), round(counts.active_with_embedding / 1e9, 2)) == ACTIVE[name]


def test_mtp_parameters_of_v3():
    counts = released("V3")
    assert (counts.mtp_unique, counts.mtp_stored) == (V3_MTP_UNIQUE, V3_MTP_STORED)


def test_tied_head_counts_once():
    tied, untied = (
        modeling_deepseek.DeepseekConfig(**RELEASES["LLM-7B"][1], tie_word_embeddings=tied) for tied in (True, False)
    )
    assert "lm_head.weight" not in expected_shapes(tied)
    counts = count_parameters(tied, expected_shapes(tied))
    assert counts.active_head_only == counts.active_with_embedding == counts.main
    assert count_parameters(untied, expected_shapes(untied)).main - counts.main == 102400 * 4096


@pytest.mark.parametrize("name", RELEASES)
def test_cache_elements_per_token(name):
    assert next(iter(cache_elements(release_config(name)).values())) == CACHE_ELEMENTS[name]


def test_cache_of_other_attention_with_the_same_heads():
    assert cache_elements(release_config("V2"))["MHA, 128 heads"] == 1_966_080
    assert cache_elements(release_config("LLM-67B"))["MHA, 64 heads"] == 8 * CACHE_ELEMENTS["LLM-67B"]
    assert cache_elements(release_config("LLM-7B"))["GQA, 8 key/value heads"] == CACHE_ELEMENTS["LLM-7B"] // 4


@pytest.mark.parametrize("case", CASES)
def test_official_layout_has_exactly_the_expected_tensors(case):
    stored = load_file(GOLDENS / case / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    assert expected_shapes(read_family(GOLDENS / case)) == shapes
    found = inspect(GOLDENS / case)
    assert (found.missing, found.extra, found.misshapen) == ([], [], [])


@pytest.mark.parametrize("case", CASES)
def test_golden_loads_with_the_class_of_its_family(case):
    assert causal_lm_class(read_family(GOLDENS / case)).config_class is type(read_family(GOLDENS / case))


def test_v3_in_fp8_from_its_headers(v3):
    found = inspect(v3)
    assert (found.stored_main, found.stored_mtp) == (PARAMETERS["V3"], V3_MTP_STORED)
    assert found.stored_main + found.stored_mtp == V3_STORED
    assert found.tensors - found.scales == V3_TENSORS
    assert found.file_bytes == sum(file.stat().st_size for file in v3.glob("*.safetensors")) > 680e9
    assert (found.missing, found.extra, found.misshapen) == ([], [], [])


def test_fp8_coverage_of_v3(v3):
    found = inspect(v3)
    assert found.dtypes["F8_E4M3"].tensors == found.scales == 45_808
    unquantized = found.dtypes["BF16"].elements + 59 * 256  # router biases, in fp32 like the scales
    assert found.fp8_coverage == 1 - unquantized / V3_STORED


def test_memory_is_weights_as_loaded_and_cache(v3):
    found = inspect(v3, context=32768, batch=4)
    biases = 59 * 256
    unique = PARAMETERS["V3"] + V3_MTP_UNIQUE
    assert found.dequantized_weight_bytes == 2 * unique + 2 * biases
    copies = 2 * (V3_MTP_STORED - V3_MTP_UNIQUE)
    assert found.weight_bytes == sum(share.nbytes for share in found.dtypes.values()) - copies
    cache = CACHE_ELEMENTS["V3"] * 2 * 32768 * 4 / 2**30
    assert f" + {cache:.2f} GiB = {found.weight_bytes / 2**30 + cache:.2f} GiB" in report(found)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.experts.5.down_proj.weight_scale_inv",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
        "model.layers.2.eh_proj.weight",
    ],
)
def test_missing_tensor_is_named(tiny, name):
    assert inspect(tiny(drop=[name])).missing == [name]


def test_tensors_that_the_config_does_not_have_are_named(tiny):
    names = ["model.layers.1.mlp.experts.6.up_proj.weight", "model.norm.weight_scale_inv"]
    assert inspect(tiny(**{name: torch.ones(1) for name in names})).extra == names


def test_misshapen_tensor_and_scales_are_named(tiny):
    found = inspect(tiny(**{"model.norm.weight": torch.ones(3), SCALE: torch.ones(2, 2)}))
    assert sorted(found.misshapen) == [
        f"{SCALE}: (2, 2), by the config (1, 1)",
        "model.norm.weight: (3,), by the config (128,)",
    ]


def test_report_names_eight_tensors_and_counts_the_rest(tiny):
    scales = [SCALE.replace(".3.", f".{expert}.").replace("up", kind) for expert in range(6) for kind in ("up", "down")]
    lines = report(inspect(tiny(drop=scales))).splitlines()
    named = lines[lines.index("missing: 12") + 1 :]
    assert len(named) == 9 and named[-1] == "  and 4 more"
    assert {line.strip() for line in named[:8]} < set(scales)


def test_mtp_layers_that_the_config_turned_off_are_extra(tiny):
    folder = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    found = inspect(folder)
    assert found.parameters.mtp_stored == 0
    assert found.extra and all(name.startswith("model.layers.2.") for name in found.extra)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "config.json: model_type 'qwen2'.*expected one of 'deepseek'.*'llama'"),
        (
            {"model_type": "deepseek_v3", "n_group": 7},
            "config.json: n_routed_experts 256 is not divisible by n_group 7",
        ),
        ({"model_type": "deepseek_v3", "hidden_size": "x"}, "config.json: .*hidden_size.*expected int"),
        ({"model_type": "deepseek", "quantization_config": {"quant_method": "awq"}}, "quant_method 'fp8'"),
    ],
)
def test_config_of_no_such_model_is_an_error(tiny, fields, message):
    folder = tiny()
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        inspect(folder)


@pytest.mark.parametrize("argument", ["context", "batch"])
def test_size_below_one_is_an_error(argument):
    with pytest.raises(ValueError, match=f"{argument} is 0: expected at least 1"):
        inspect(GOLDENS / "e_v2", **{argument: 0})


def test_truncated_file_is_named(tiny):
    file = tiny() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        inspect(file.parent)


def test_model_on_the_hub_is_read_without_its_weights(tmp_path):
    case = GOLDENS / "b3_v3_fp8_576"
    with HubServer() as hub:
        repo = hub.repos["user/tiny"] = Repo()
        weights = Blob((case / "model.safetensors").read_bytes(), is_lfs=True)
        repo.commit(
            "main", "model", {"config.json": Blob((case / "config.json").read_bytes()), "model.safetensors": weights}
        )
        done = run_client(hub, tmp_path, "user/tiny")
    assert done.stdout.splitlines()[1:] == report(inspect(case)).splitlines()[1:]
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == []


def test_name_of_neither_a_folder_nor_a_model_is_an_error(tmp_path):
    with HubServer() as hub:
        done = run_client(hub, tmp_path, "user/absent")
    assert done.returncode == 2
    assert done.stderr.startswith("deepseek-convert: error: user/absent is no folder here, and on the Hub: ")


def run_client(hub, home, source):
    """`deepseek-convert inspect` in a process of its own: the client reads its endpoint when it is imported."""
    script = "import sys; from modeling_deepseek.conversion.cli import main; sys.exit(main())"
    environment = hub.environment(home) | {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-P", "-c", script, "inspect", source]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)


def test_command_prints_the_report(capsys):
    assert main(["inspect", str(GOLDENS / "e_v2"), "--context", "100", "--batch", "3"]) == 0
    out = capsys.readouterr().out
    assert out == report(inspect(GOLDENS / "e_v2", context=100, batch=3)) + "\n"
    assert "memory for 3 x 100 tokens" in out


def test_command_reports_a_bad_folder(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"deepseek-convert: error: {tmp_path} has no config.json")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_the_demo_tell_what_their_headers_know(tmp_path, capsys, ranks):
    folder, whole = GOLDENS / "h_inference_demo" / f"mp{ranks}", inspect(GOLDENS / "a_v3_fp32")
    found = inspect(folder)
    assert (found.ranks, found.stored_main, found.stored_mtp) == (ranks, whole.stored_main, 0)
    assert found.file_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    to_demo(GOLDENS / "b3_v3_fp8_576", tmp_path / "fp8", 1, with_mtp=True)
    quantised, whole = inspect(tmp_path / "fp8"), inspect(GOLDENS / "b3_v3_fp8_576")
    for name in ("stored_main", "stored_mtp", "tensors", "scales", "fp8_coverage"):
        assert getattr(quantised, name) == getattr(whole, name), name
    assert main(["inspect", str(folder)]) == 0
    assert f"the inference demo's layout, {ranks} rank" in capsys.readouterr().out


def test_ranks_beside_a_config_are_inspected_as_a_whole(tmp_path):
    to_demo(GOLDENS / "b3_v3_fp8_576", tmp_path / "demo", 1, with_mtp=True)
    (tmp_path / "demo" / "config.json").write_bytes((GOLDENS / "b3_v3_fp8_576" / "config.json").read_bytes())
    found, whole = inspect(tmp_path / "demo"), inspect(GOLDENS / "b3_v3_fp8_576")
    assert not found.missing + found.extra + found.misshapen
    assert (found.parameters, found.dtypes) == (whole.parameters, whole.dtypes)
