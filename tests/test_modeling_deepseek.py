"""The models as wholes: inputs, logits to keep, compilation, adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import modeling_deepseek
from modeling_deepseek.modeling_deepseek import kept_states
from tiny import tiny_model, tiny_tokens

IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize("given", [{}, {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 17, 48)}])
def test_exactly_one_of_ids_and_embeddings_is_asked_for(given):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model("v3")(**given)


@pytest.mark.parametrize(
    "keep", [0, 3, torch.tensor([1, 4]), torch.tensor([[1, 4]]), torch.arange(17)[None] % 2 == 0], ids=str
)
@torch.no_grad()
def test_logits_are_computed_where_they_are_kept(keep):
    model = tiny_model("v3")
    torch.testing.assert_close(model(IDS, logits_to_keep=keep).logits, kept_states(model(IDS).logits, keep))


def test_indices_may_differ_from_row_to_row():
    states = torch.arange(24.0).view(2, 4, 3)
    kept = kept_states(states, torch.tensor([[0, 3], [2, 1]]))
    assert torch.equal(kept, torch.stack((states[0, [0, 3]], states[1, [2, 1]])))


@pytest.mark.parametrize("family", ["llm", "v3"])
@torch.no_grad()
def test_a_step_with_the_default_cache_is_one_graph(family):
    model = tiny_model(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    cache = compiled(IDS, use_cache=True).past_key_values
    step = compiled(IDS[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step, model(torch.cat((IDS, IDS[:, :1]), dim=1)).logits[:, -1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["auto", "absorbed"])
@torch.no_grad()
def test_every_row_of_a_batch_may_have_an_adapter_of_its_own(mode):
    adapters = LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("v3", mla_mode=mode), adapters, adapter_name="one")
    model.add_adapter("two", adapters)
    model.eval()
    ids = tiny_tokens(model.config, 2, 60)
    mixed = model.generate(
        input_ids=ids, adapter_names=["one", "two"], max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    for row, name in enumerate(("one", "two")):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[row : row + 1], max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(mixed[row], alone[0])


def test_all_classes_of_all_families_are_exported():
    suffixes = (
        "Config PreTrainedModel Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering"
    )
    for prefix in ("Deepseek", "DeepseekV2", "DeepseekV3"):
        for suffix in suffixes.split():
            assert prefix + suffix in modeling_deepseek.__all__
            assert hasattr(modeling_deepseek, prefix + suffix)
