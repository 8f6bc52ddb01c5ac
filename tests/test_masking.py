"""Packed documents and dense forms of every mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from modeling_deepseek import LatentCache
from modeling_deepseek.masking import dense_mask, document_starts, packed_causal_mask
from tiny import tiny_config

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("positions", "past", "starts"),
    [
        ([0, 1, 2, 3], 0, None),
        ([4, 5, 6], 4, None),
        ([7, 8, 9], 0, None),  # an offset is not a document
        ([0, 1, 0, 1, 2], 0, [0, 0, 2, 2, 2]),
        ([0, 1, 2], 6, [6, 6, 6]),
        ([3, 4, 0, 1], 5, [2, 2, 7, 7]),  # goes on with a document that began at slot 2
    ],
)
def test_a_token_sees_its_own_document_only(positions, past, starts):
    found = document_starts(torch.tensor([positions]), past)
    assert (None if found is None else found.tolist()) == (None if starts is None else [starts])


@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_a_batch_are_packed_each_in_its_own_way(held, implementation):
    config = tiny_config("v3")
    config._attn_implementation = implementation
    cache = LatentCache(config)
    if held:
        for layer in range(config.num_hidden_layers):
            cache.update(
                torch.zeros(2, 1, held, config.kv_lora_rank), torch.zeros(2, 1, held, config.qk_rope_head_dim), layer
            )
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]]) + torch.tensor([[held, held, held, 0], [held, 0, 0, 0]])
    mask = packed_causal_mask(config, torch.zeros(2, 4, 8), None, positions, cache)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    for row, documents in enumerate(([0] * held + [0, 0, 0, 1], [0] * held + [0, 1, 1, 1])):
        ids = torch.tensor(documents)
        expected = (ids[None, :] == ids[:, None]).tril()[held:]
        assert torch.equal(allowed[row, 0], expected)


def test_an_attention_mask_switches_the_search_for_documents_off():
    config = tiny_config("v3")
    config._attn_implementation = "eager"
    mask = packed_causal_mask(
        config, torch.zeros(1, 4, 8), torch.ones(1, 4), torch.tensor([[0, 1, 0, 1]]), LatentCache(config)
    )
    assert torch.equal(mask[0, 0] == 0, CAUSAL[:4, :4])


def test_no_mask_means_causal_for_many_queries_and_everything_for_one():
    assert dense_mask(None, 1, 1, 5, torch.device("cpu")) is None
    assert torch.equal(dense_mask(None, 1, 2, 5, torch.device("cpu"))[0, 0], CAUSAL[3:])


def test_without_a_mask_sdpa_means_that_queries_are_the_first_keys():
    assert torch.equal(dense_mask(None, 1, 2, 5, torch.device("cpu"), from_start=True)[0, 0], CAUSAL[:2])


def test_a_padding_mask_joins_the_causal_one():
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    expected = CAUSAL & padding.bool()
    assert torch.equal(dense_mask(padding, 1, 5, 5, torch.device("cpu"))[0, 0], expected)


def test_a_block_mask_is_written_out():
    block = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 5, 5, device="cpu")
    assert torch.equal(dense_mask(block, 1, 5, 5, torch.device("cpu"))[0, 0], CAUSAL)


@pytest.mark.parametrize(("rows", "held"), [(2, 0), (1, 3)])
def test_packed_rows_that_flash_attention_would_mix_up_are_an_error(rows, held):
    config = tiny_config("v3")
    config._attn_implementation = "flash_attention_2"
    cache = LatentCache(config)
    if held:
        cache.update(
            torch.zeros(rows, 1, held, config.kv_lora_rank), torch.zeros(rows, 1, held, config.qk_rope_head_dim), 0
        )
    with pytest.raises(ValueError, match=f"{rows} rows on {held} cached tokens"):
        packed_causal_mask(config, torch.zeros(rows, 4, 8), None, torch.tensor([[0, 1, 0, 1]]), cache)
