"""Kernels of others: what stands in for them here computes what their documentation says."""

import functools
import sys
from types import ModuleType

import pytest
import torch

from modeling_deepseek import hub_kernels, ops
from modeling_deepseek.cache import LatentLayer
from modeling_deepseek.ops import attend_latents
from modeling_deepseek.plain_attention import absorbed_attention_reference
from modeling_deepseek.triton_mla import AVAILABLE, mla_decode
from test_triton_mla import DEVICE, absorbed_inputs, causal
from tiny import tiny_model, tiny_tokens

if not AVAILABLE:
    pytest.skip("Triton has no release for this machine", allow_module_level=True)


def test_flash_attention_3_gets_what_it_wants(monkeypatch):
    """By its documented arguments; what stands in for it here computes what its documentation says."""
    asked, decoded = [], []
    monkeypatch.setattr(ops, "mla_decode", lambda *args: decoded.append(1) or mla_decode(*args))

    def flash(q, k_cache, v_cache, qv, softmax_scale):
        asked.append((tuple(q.shape), tuple(k_cache.shape), tuple(v_cache.shape), tuple(qv.shape)))
        scores = torch.einsum("bshr,btr->bhst", q, k_cache[:, :, 0]) + torch.einsum(
            "bshc,btc->bhst", qv, v_cache[:, :, 0]
        )
        return torch.einsum("bhst,btc->bshc", (scores * softmax_scale).softmax(-1), v_cache[:, :, 0])

    monkeypatch.setattr(hub_kernels, "_flash_attention_3", lambda: flash)
    tensors = absorbed_inputs(queries=1)
    expected = absorbed_attention_reference(*tensors, 0.2)[0]
    monkeypatch.setattr(ops, "MLA_DECODE", "fa3")
    torch.testing.assert_close(attend_latents(*tensors, 0.2, weights=False)[0], expected, rtol=0, atol=2e-5)
    assert asked == [((2, 1, 4, 8), (2, 30, 1, 8), (2, 30, 1, 20), (2, 1, 4, 20))]
    attend_latents(*tensors, 0.2, causal(1, 30), weights=False)  # a mask: Triton
    attend_latents(*absorbed_inputs(queries=2), 0.2, weights=False)
    assert len(asked) == 1
    assert len(decoded) == 2


def test_flash_attention_3_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "MLA_DECODE", "fa3")
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: False)
    with pytest.raises(ImportError, match="kernels"):
        attend_latents(*absorbed_inputs(queries=1), 0.2, weights=False)


class PagedAttention:
    """What stands in for FlashInfer's `BatchMLAPagedAttentionWrapper`: it computes what its documentation says."""

    made = []

    def __init__(self, float_workspace_buffer):
        assert float_workspace_buffer.nbytes == 128 * 2**20
        self.plans = []
        self.made.append(self)

    def plan(self, *, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, **planned):
        assert (num_heads, head_dim_ckv, head_dim_kpe, page_size, causal) == (4, 20, 8, 1, False)
        assert all(
            planned[name].dtype == torch.int32 for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
        )
        self.plans.append(planned)

    def run(self, *, q_nope, q_pe, ckv_cache, kpe_cache):
        planned, found = self.plans[-1], []
        assert (q_nope.dtype, ckv_cache.dtype) == (planned["q_data_type"], planned["kv_data_type"])
        for row, end in enumerate(planned["qo_indptr"][1:].tolist()):
            pages = planned["kv_indices"][planned["kv_indptr"][row] : planned["kv_indptr"][row + 1]]
            assert len(pages) == planned["kv_len_arr"][row]
            latent, k_rope = ckv_cache[pages, 0], kpe_cache[pages, 0]
            scores = q_nope[end - 1] @ latent.T + q_pe[end - 1] @ k_rope.T
            found.append((scores * planned["sm_scale"]).softmax(-1) @ latent)
        return torch.stack(found)


@pytest.fixture
def flashinfer(monkeypatch):
    module = ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = PagedAttention
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(PagedAttention, "made", [])
    monkeypatch.setattr(hub_kernels, "_planned", functools.cache(hub_kernels._Planned))
    monkeypatch.setattr(ops, "MLA_DECODE", "flashinfer")
    return PagedAttention.made


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spare", [0, 9, "other", "strided", "wider", "side by side", "one token"], ids=str)
def test_flashinfer_gets_what_it_wants(spare, batch, flashinfer):
    """The cache as it lies, where both buffers have as many rows; else a copy. A plan serves every layer of a step."""
    for keys in (*range(2, 20), 30, 30, 31):
        tensors = [tensor[:batch] if index < 4 else tensor for index, tensor in enumerate(absorbed_inputs(queries=1))]
        held = [torch.randn(batch, keys + (spare if type(spare) is int else 9), width) for width in (20, 8)]
        if spare == "other":
            held[0] = torch.randn(batch, keys + 3, 20)
        if spare == "strided":
            held[1] = torch.randn(batch, keys + 9, 16)[..., ::2]
        if spare == "wider":
            held[1] = torch.randn(batch, keys + 9, 11)[..., 3:]
        if spare == "one token":
            held[0] = torch.randn(batch, 1, 20).expand(-1, keys, -1)
        if spare == "side by side":
            held = torch.randn(batch, keys + 9, 28, device=DEVICE).split((20, 8), dim=-1)
        tensors[2:4] = (buffer[:, :keys].to(DEVICE) for buffer in held)
        expected = absorbed_attention_reference(*tensors, 0.2)[0]
        torch.testing.assert_close(attend_latents(*tensors, 0.2, weights=False)[0], expected, rtol=0, atol=2e-5)
    (made,) = flashinfer
    assert len(made.plans) == 20


def test_flashinfer_decodes_the_tokens_that_triton_decodes(flashinfer, monkeypatch):
    model = tiny_model("v3", attn_implementation="sdpa", kv_lora_rank=20, qk_rope_head_dim=8).to(DEVICE)
    ids, generated = tiny_tokens(model.config, length=6).to(DEVICE), []
    for way in ("flashinfer", "torch"):
        monkeypatch.setattr(ops, "MLA_DECODE", way)
        generated.append(model.generate(ids, max_new_tokens=5, do_sample=False))
    assert torch.equal(*generated)
    assert len(flashinfer[0].plans) == 4  # one per step, for all of its layers


def test_flashinfer_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "MLA_DECODE", "flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer.mla", None)
    with pytest.raises(ImportError, match="flashinfer-python: install it"):
        attend_latents(*absorbed_inputs(queries=1), 0.2, weights=False)


class Paged:
    """What stands in for FlashMLA: it computes what its documentation says, and counts."""

    def __init__(self):
        self.plans, self.seen = 0, []

    def get_mla_metadata(self, cache_seqlens, heads_per_key, key_heads):
        assert key_heads == 1
        self.plans += 1
        return (cache_seqlens, heads_per_key), None

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale
    ):
        assert tile_scheduler_metadata == (cache_seqlens, q.shape[2])
        assert k_cache.shape[1:] == (64, 1, q.shape[-1])
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        self.seen.append(k_cache)
        found = []
        for query, pages, length in zip(q, block_table, cache_seqlens, strict=True):
            keys = k_cache[pages].flatten(0, 2)[:length]
            scores = torch.einsum("shd,td->sht", query, keys) * softmax_scale
            found.append(scores.softmax(-1) @ keys[:, :head_dim_v])
        return torch.stack(found), None


@pytest.fixture
def flashmla(monkeypatch):
    module = Paged()
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    monkeypatch.setattr(ops, "MLA_DECODE", "flashmla")
    hub_kernels._flashmla_plan.cache_clear()
    yield module
    hub_kernels._flashmla_plan.cache_clear()


def both(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def parts(held: torch.Tensor, latent: slice = slice(0, 20), k_rope: slice = slice(20, 28)) -> list[torch.Tensor]:
    return [held[..., latent], held[..., k_rope]]


# Of a cache of `[b, n]`: what it holds, and whether FlashMLA can read it where it lies, at batch 1 and 2.
LAYOUTS = {
    "side by side": (lambda b, n: parts(both(b, n, 28)), (True, True)),
    "side by side in a larger one": (lambda b, n: parts(both(b, n + 64, 28)[:, 64:]), (True, False)),
    "two buffers": (lambda b, n: [both(b, n, width) for width in (20, 8)], (False, False)),
    "two of one size": (lambda b, n: [parts(both(b, n, 28))[which] for which in (0, 1)], (False, False)),
    "the other way round": (lambda b, n: parts(both(b, n + 64, 28), slice(8, 28), slice(0, 8)), (False, False)),
    "more beside them": (lambda b, n: parts(both(b, n, 30)), (False, False)),
    "the rope key of another token": (
        lambda b, n: [parts(each)[which] for which, each in enumerate(one_later(both(b, n + 64, 28)))],
        (False, False),
    ),
    "every other latent": (lambda b, n: every_other(both(b, 2 * n, 28), 2, 1), (False, False)),
    "every other rope key": (lambda b, n: every_other(both(b, 2 * n, 28), 1, 2), (False, False)),
    "no whole pages": (lambda b, n: parts(both(b, n + 3, 28)), (True, False)),
    "too short": (lambda b, n: parts(both(b, n - 1, 28)), (False, False)),
    "no whole words": (lambda b, n: parts(both(b * n * 28 + 1)[1:].view(b, n, 28)), (False, False)),
    "one for all": (lambda b, n: parts(both(1, n, 28).expand(b, -1, -1)), (True, False)),
    "one rope key for all": (lambda b, n: one_for_all(both(b, n, 28)), (True, False)),
}


def one_later(held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return held[:, :-1], held[:, 1:]


def every_other(held: torch.Tensor, *steps: int) -> list[torch.Tensor]:
    return [part[:, ::step] for part, step in zip(parts(held), steps, strict=True)]


def one_for_all(held: torch.Tensor) -> list[torch.Tensor]:
    latent, k_rope = parts(held)
    return [latent, k_rope[:1].expand_as(k_rope)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("keys", [1, 63, 65, 130])
def test_flashmla_gets_what_it_wants(keys, batch, layout, flashmla):
    """The cache as it lies, where latents and rope keys share whole pages; else a copy."""
    make, readable = LAYOUTS[layout]
    tensors = [tensor[:batch] if index < 4 else tensor for index, tensor in enumerate(absorbed_inputs(queries=1))]
    held = tensors[2:4] = [states[:, :keys] for states in make(batch, -(-keys // 64) * 64)]
    expected = absorbed_attention_reference(*tensors, 0.2)[0]
    torch.testing.assert_close(attend_latents(*tensors, 0.2, weights=False)[0], expected, rtol=0, atol=2e-5)
    (seen,) = flashmla.seen
    assert (seen.data_ptr() == held[0].data_ptr()) == readable[batch - 1]


def test_flashmla_reads_the_cache_that_a_gpu_has(flashmla, monkeypatch):
    """The tokens that plain attention generates, one plan per step, and no copies."""
    monkeypatch.setattr(LatentLayer, "_side_by_side", lambda layer: True)
    model = tiny_model("v3", attn_implementation="sdpa", kv_lora_rank=20, qk_rope_head_dim=8).to(DEVICE)
    ids, generated = tiny_tokens(model.config, length=60).to(DEVICE), []
    for way in ("flashmla", "torch"):
        monkeypatch.setattr(ops, "MLA_DECODE", way)
        generated.append(model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None))
    assert torch.equal(*generated)
    assert flashmla.plans == 8
    assert len(flashmla.seen) == 8 * model.config.num_hidden_layers
    assert len({pages.data_ptr() for pages in flashmla.seen}) == model.config.num_hidden_layers


def test_flashmla_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "MLA_DECODE", "flashmla")
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    with pytest.raises(ImportError, match="flash_mla: install it"):
        attend_latents(*absorbed_inputs(queries=1), 0.2, weights=False)
