"""LoRA on weights that bitsandbytes keeps in 4 bits: what is quantised, and that adapters learn beside it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from modeling_deepseek.lora import lora_targets
from modeling_deepseek.training import RouterBiasCallback
from tiny import tiny_config, tiny_model, tiny_tokens

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("v3", num_nextn_predict_layers=1).save_pretrained(folder)
    return folder


def quantised(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def test_linear_layers_are_quantised_but_experts_router_and_head(folder):
    model, plain = quantised(folder), AutoModelForCausalLM.from_pretrained(folder)
    packed = {name for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    linear = {f"{name}.weight" for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert packed == linear - {"lm_head.weight"}
    assert not any(part in name for name in packed for part in (".experts.", ".gate.", "norm", "embed"))
    for name, weight in plain.state_dict().items():
        assert name in packed or torch.equal(model.state_dict()[name], weight), name
    assert all(router.e_score_correction_bias.dtype == torch.float32 for router in routers(model))


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def test_a_cached_step_gives_what_a_full_pass_gives(tmp_path):
    """In widths that bitsandbytes can pack, which it does on CPUs with AVX512_BF16."""
    sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, kv_lora_rank=64, q_lora_rank=64)
    heads = dict(qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16)
    tiny_model("v3", **sizes, **heads).save_pretrained(tmp_path)
    model, ids = quantised(tmp_path), tiny_tokens(tiny_config("v3"))
    with torch.no_grad():
        whole, past = model(ids).logits, model(ids[:, :8], use_cache=True).past_key_values
        step = model(ids[:, 8:], past_key_values=past).logits  # reads kv_b_proj as a matrix
    torch.testing.assert_close(step, whole[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention and shared experts", "all"])
def test_adapters_learn_on_a_base_that_stays(folder, targets, tmp_path):
    base = prepare_model_for_kbit_training(quantised(folder))
    names = r".*\.(self_attn|shared_experts)\.\w+_proj(_with_mqa)?"
    model = get_peft_model(
        base, LoraConfig(r=4, **(lora_targets("all") if targets == "all" else dict(target_modules=names)))
    )
    before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=[RouterBiasCallback(0.01)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    for name, weight in model.named_parameters():
        assert name not in before or torch.equal(weight, before[name]), name
    learned = [name for name, weight in model.named_parameters() if "lora_B" in name and weight.abs().sum() > 0]
    for part in ("kv_b_proj", "shared_experts.down_proj", *(["mlp.experts"] if targets == "all" else [])):
        assert any(part in name for name in learned)
