"""Configs: what they refuse, the two spellings that they read, and what survives a round trip through disk."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig

from modeling_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from modeling_deepseek.rope import DeepseekRotaryEmbedding
from tiny import FAMILIES, tiny_config

YARN = dict(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
LITE_YARN = YARN | dict(mscale=0.707, mscale_all_dim=0.707)
V3_YARN = YARN | dict(mscale=1.0, mscale_all_dim=1.0)

# config.json of official releases, with the fields that our classes do not know
MOE_16B = dict(
    architectures=["DeepseekForCausalLM"],
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    model_type="deepseek",
    aux_loss_alpha=0.001,
    bos_token_id=100000,
    eos_token_id=100001,
    first_k_dense_replace=1,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    moe_layer_freq=1,
    n_routed_experts=64,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_attention_heads=16,
    num_experts_per_tok=6,
    num_hidden_layers=28,
    num_key_value_heads=16,
    pretraining_tp=1,
    rope_scaling=None,
    rope_theta=10000,
    scoring_func="softmax",
    seq_aux=True,
    torch_dtype="bfloat16",
    vocab_size=102400,
)
V2_LITE = MOE_16B | dict(
    architectures=["DeepseekV2ForCausalLM"],
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    model_type="deepseek_v2",
    kv_lora_rank=512,
    max_position_embeddings=163840,
    n_group=1,
    num_hidden_layers=27,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rope_scaling=LITE_YARN | dict(type="yarn"),
    routed_scaling_factor=1.0,
    topk_group=1,
    topk_method="greedy",
    v_head_dim=128,
)
V25 = V2_LITE | dict(
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_group=8,
    n_routed_experts=160,
    num_attention_heads=128,
    num_hidden_layers=60,
    num_key_value_heads=128,
    q_lora_rank=1536,
    rope_scaling=V3_YARN | dict(type="yarn"),
    routed_scaling_factor=16.0,
    topk_group=3,
    topk_method="group_limited_greedy",
)
R1 = V25 | dict(
    architectures=["DeepseekV3ForCausalLM"],
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    model_type="deepseek_v3",
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_nextn_predict_layers=1,
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    topk_group=4,
    topk_method="noaux_tc",
    vocab_size=129280,
)
RELEASES = {"MoE-16B": MOE_16B, "V2-Lite": V2_LITE, "V2.5": V25, "R1": R1}
CLASSES = {"deepseek": DeepseekConfig, "deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}


def write(folder, fields: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def saved(config, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


REFUSED = [
    # family, fields, what the message says of the value, and of what was expected
    ("v3", dict(scoring_func="tanh"), "scoring_func is 'tanh'", "'softmax', 'sigmoid'"),
    ("v3", dict(topk_method="best"), "topk_method is 'best'", "'greedy', 'group_limited_greedy', 'noaux_tc'"),
    ("v2", dict(n_group=3), "n_routed_experts 8", "divisible by n_group 3"),
    ("v3", dict(topk_group=5), "topk_group 5", "between 1 and n_group 4"),
    ("v3", dict(topk_group=0), "topk_group 0", "between 1 and n_group 4"),
    ("v3", dict(num_experts_per_tok=5), "num_experts_per_tok 5", "4 experts that a token can reach"),
    ("v2", dict(num_experts_per_tok=5), "num_experts_per_tok 5", "4 experts that a token can reach"),
    ("moe16b", dict(num_experts_per_tok=9), "num_experts_per_tok 9", "8 experts"),
    ("moe16b", dict(num_experts_per_tok=None), "num_experts_per_tok is None", "at least 1"),
    ("v3", dict(qk_rope_head_dim=7), "qk_rope_head_dim is 7", "even"),
    ("llm", dict(hidden_size=36), "head_dim is 9", "even"),
    ("llm", dict(hidden_size=50), "hidden_size 50", "multiple of num_attention_heads 4"),
    ("llm", dict(num_key_value_heads=3), "num_attention_heads 4", "multiple of num_key_value_heads 3"),
    ("llm", dict(num_key_value_heads=0), "num_key_value_heads", "0"),
    ("llm", dict(num_attention_heads=0), "num_attention_heads", "0"),
    ("v3", dict(num_key_value_heads=2), "num_key_value_heads 2", "num_attention_heads 4"),
    ("v3", dict(v_head_dim=0), "v_head_dim is 0", "at least 1"),
    ("v2", dict(kv_lora_rank=0), "kv_lora_rank is 0", "at least 1"),
    ("v2", dict(q_lora_rank=0), "q_lora_rank is 0", "None"),
    ("v3", dict(mla_mode="fast"), "mla_mode is 'fast'", "'auto', 'absorbed', 'expanded'"),
    ("v3", dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers is -1", "0 or more"),
    ("v3", dict(rope_scaling=dict(type="yarn")), "got None", "`factor`"),
    ("v3", dict(rope_scaling=dict(type="yarn", factor="40")), "got '40'", "`factor`"),
    ("v3", dict(rope_scaling=dict(type="yarnn", factor=40)), "'yarnn'", "'yarn'"),
    ("llm", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "got None", "`factor`"),
]


def spelt(fields: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.parametrize(
    ("family", "fields", "value", "expected"),
    REFUSED,
    ids=[f"{family}-{spelt(fields)}" for family, fields, *_ in REFUSED],
)
def test_an_architecture_that_cannot_be_built_is_refused(family, fields, value, expected):
    with pytest.raises(ValueError) as error:
        tiny_config(family, **fields)
    assert value in str(error.value)
    assert expected in str(error.value)


def test_a_value_spoilt_after_construction_is_refused_before_it_is_written(tmp_path):
    config = tiny_config("v3")
    config.scoring_func = "tanh"
    with pytest.raises(StrictDataclassError, match="scoring_func is 'tanh'"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experts", [4, 3])
def test_a_token_may_visit_every_expert_of_its_groups_and_no_more(experts):
    assert tiny_config("v3", n_routed_experts=experts * 2, n_group=2, topk_group=1, num_experts_per_tok=experts)
    with pytest.raises(ValueError, match=f"exceeds the {experts} experts"):
        tiny_config("v3", n_routed_experts=experts * 2, n_group=2, topk_group=1, num_experts_per_tok=experts + 1)


@pytest.mark.parametrize("family", ["llm", "v2", "v3"])
def test_old_and_new_spelling_mean_the_same(family):
    base = dict(max_position_embeddings=163840)
    old = base | dict(rope_scaling=LITE_YARN | dict(type="yarn"), rope_theta=5e4, torch_dtype="bfloat16")
    new = base | dict(rope_parameters=LITE_YARN | dict(rope_type="yarn", rope_theta=5e4), dtype="bfloat16")
    fields = {name: value for name, value in FAMILIES[family][1].items() if name != "rope_scaling"}
    cls = type(tiny_config(family))
    old, new = cls(**fields | old), cls(**fields | new)
    assert old.dtype == new.dtype == torch.bfloat16
    assert {k: v for k, v in old.rope_parameters.items() if k != "type"} == new.rope_parameters
    ropes = [DeepseekRotaryEmbedding(config) for config in (old, new)]
    torch.testing.assert_close(ropes[0].inv_freq, ropes[1].inv_freq, rtol=0, atol=0)
    assert ropes[0].attention_scaling == ropes[1].attention_scaling
    rest = [{k: v for k, v in c.to_dict().items() if k not in ("rope_parameters", "rope_scaling")} for c in (old, new)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("release", RELEASES)
def test_an_official_config_parses_with_its_values(release, tmp_path):
    fields = RELEASES[release]
    config = AutoConfig.from_pretrained(write(tmp_path, fields), trust_remote_code=False)
    assert type(config) is CLASSES[fields["model_type"]]
    for name in fields.keys() - {"rope_scaling", "rope_theta", "torch_dtype"}:
        assert getattr(config, name) == fields[name], name
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.rope_parameters["rope_type"] == ("yarn" if fields["rope_scaling"] else "default")
    assert config.is_moe_layer(fields["first_k_dense_replace"])
    assert not config.is_moe_layer(fields["first_k_dense_replace"] - 1)


@pytest.mark.parametrize("release", RELEASES)
def test_an_official_config_survives_save_and_load(release, tmp_path):
    fields = RELEASES[release]
    first = CLASSES[fields["model_type"]].from_pretrained(write(tmp_path / "hub", fields))
    written = saved(first, tmp_path / "first")
    second = type(first).from_pretrained(tmp_path / "first")
    assert saved(second, tmp_path / "second") == written
    for name in fields.keys() - {"rope_scaling", "rope_theta", "torch_dtype"}:
        assert written.get(name) == fields[name], name


def test_unknown_fields_survive_save_and_load(tmp_path):
    unknown = dict(seq_aux=True, ep_size=3, index_topk=2048, nested=dict(a=[1, None], b={"c": 0.5}))
    tiny_config("v3", **unknown).save_pretrained(tmp_path)
    written = saved(DeepseekV3Config.from_pretrained(tmp_path), tmp_path / "again")
    assert {name: written[name] for name in unknown} == unknown


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_llama_config_reads_as_dense_and_is_saved_as_deepseek(spelling, tmp_path):
    fields = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, vocab_size=99)
    if spelling == "new":
        LlamaConfig(**fields, num_hidden_layers=3).save_pretrained(tmp_path)
    else:
        old = dict(model_type="llama", rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16")
        write(tmp_path, fields | old | dict(num_hidden_layers=3))
    config = DeepseekConfig.from_pretrained(tmp_path)
    assert not any(map(config.is_moe_layer, range(3)))
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.head_dim, config.rope_parameters["rope_theta"]) == (8, 10000.0)
    assert config.model_type == saved(config, tmp_path / "out")["model_type"] == "deepseek"
    assert DeepseekConfig.from_dict(config.to_dict() | dict(model_type="llama")).model_type == "deepseek"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_names_its_family(family, tmp_path):
    config = tiny_config(family)
    assert saved(config, tmp_path)["model_type"] == type(config).model_type
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


@pytest.mark.parametrize(("dense", "freq", "expected"), [(1, 1, "DMMMMM"), (3, 1, "DDDMMM"), (1, 2, "DDMDMM")])
def test_layers_have_experts_by_absolute_index_and_mtp_layers_always(dense, freq, expected):
    config = tiny_config("v3", num_hidden_layers=5, first_k_dense_replace=dense, moe_layer_freq=freq)
    assert "".join("DM"[config.is_moe_layer(index)] for index in range(6)) == expected


def test_a_config_without_experts_is_dense_in_every_layer():
    assert not any(map(tiny_config("v3", n_routed_experts=None).is_moe_layer, range(6)))


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_the_rotated_size_of_latent_attention_is_its_rope_part(family):
    config = tiny_config(family, head_dim=99, qk_head_dim=99)
    assert (config.head_dim, config.qk_head_dim) == (8, 24)


@pytest.mark.parametrize(
    ("family", "method", "scaled"),
    [
        ("v3", "noaux_tc", True),
        ("v3", "greedy", True),
        ("v2", "noaux_tc", True),
        ("v2", "greedy", False),
        ("moe16b", "greedy", False),
    ],
)
def test_v3_and_its_topk_method_scale_normalised_gates(family, method, scaled):
    assert tiny_config(family, topk_method=method).scales_normalized_gates is scaled
