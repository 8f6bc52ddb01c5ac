"""The C kernel in which new tokens meet a cache on a CPU, against its plain twins."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils.flop_counter
from transformers import AutoModelForCausalLM

from modeling_deepseek import DeepseekV2Config, LatentCache, compiler, cpu_mla, ops, scratch
from modeling_deepseek.attention import DeepseekLatentAttention
from modeling_deepseek.fp8 import FP8Linear, quantize
from modeling_deepseek.ops import attend_latents, attend_quantized_latents
from modeling_deepseek.plain_attention import absorbed_attention_quantized, absorbed_attention_reference
from modeling_deepseek.quantized import QuantizedStates

pytestmark = pytest.mark.skipif(
    not (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and cpu_mla.decode_available()),
    reason="needs an x86 CPU with AVX2, and a C compiler with OpenMP",
)

BUILDS = {"as the machine has it": (), "without AVX512_BF16": ("-mno-avx512bf16",), "AVX2": ("-mno-avx512f",)}


@pytest.fixture(params=BUILDS)
def kernel(request, monkeypatch):
    library = cpu_mla._library(*BUILDS[request.param])
    monkeypatch.setattr(cpu_mla, "_library", functools.cache(lambda: library))
    monkeypatch.setattr(ops, "MLA_DECODE", "c")
    return request.param


def inputs(
    batch=2, queries=1, tokens=70, heads=5, rank=128, nope=12, rope=8, value=20, dtype=torch.float32, seed=0
) -> list[torch.Tensor]:
    """q_nope, q_rope, latent, k_rope, w_uk, w_uv, as a model has them: parts of larger ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(batch, queries, heads, nope + rope).transpose(1, 2)
    latent, k_rope = normal(batch, tokens + 9, rank), normal(batch, tokens + 9, rope)
    latent[:, tokens:], k_rope[:, tokens:] = (
        float("nan"),
        float("nan"),
    )  # what a cache has room for, and nobody may read
    latent, k_rope = latent[:, :tokens], k_rope[:, :tokens]
    weight = (normal(heads, nope + value, rank) / nope**0.5).to(dtype)
    return [*query.split((nope, rope), dim=-1), latent, k_rope, *weight.split((nope, value), dim=1)]


def causal(queries: int, tokens: int, hidden: tuple[int, ...] = (0,)) -> torch.Tensor:
    """Causal, with so many first tokens of each row hidden."""
    mask = torch.ones(len(hidden), 1, queries, tokens, dtype=torch.bool).tril(tokens - queries)
    for row, number in enumerate(hidden):
        mask[row, ..., :number] = False
    return mask


def check(tensors, mask=None, scaling=None) -> torch.Tensor:
    """The door's output, which is the kernel's, against the reference in fp64."""
    scaling = scaling or tensors[2].shape[-1] ** -0.5  # scores of order 1
    expected = absorbed_attention_reference(*(x.double() for x in tensors), scaling, mask)[0]
    assert ops.decode_kernel(tuple(tensors), mask) == "c"
    output, weights = attend_latents(*tensors, scaling, mask, weights=False)
    assert weights is None and output.dtype == tensors[0].dtype and output.shape == expected.shape
    tolerance = 1e-2 if output.dtype == torch.bfloat16 else 2e-6
    assert (output.double() - expected).norm() < tolerance * expected.norm()
    assert (output.double() - expected).abs().max() < 4 * tolerance * expected.abs().max()
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 200, 513, 1030])
def test_any_number_of_tokens(kernel, dtype, tokens):
    check(inputs(tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch,queries,heads", [(1, 1, 1), (1, 1, 16), (3, 1, 17), (1, 5, 5), (2, 3, 33), (5, 2, 128), (9, 1, 2)]
)
def test_any_number_of_rows_new_tokens_and_heads(kernel, dtype, batch, queries, heads):
    check(inputs(batch, queries, 150, heads, dtype=dtype), causal(queries, 150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rank,nope,rope,value", [(64, 2, 2, 4), (192, 30, 6, 24), (960, 8, 64, 8), (512, 128, 64, 128)]
)
def test_any_width_that_it_takes(kernel, dtype, rank, nope, rope, value):
    check(inputs(1, 2, 100, 4, rank, nope, rope, value, dtype), causal(2, 100))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_geometry_of_v2_and_v3(kernel, heads, dtype):
    check(inputs(1, 1, 700, heads, 512, 128, 64, 128, dtype))
    check(inputs(2, 3, 300, heads, 512, 128, 64, 128, dtype), causal(3, 300, (7, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [(0, 30), (64, 65), (5, 298)])
def test_padding_is_not_seen(kernel, dtype, hidden):
    """Also where it hides whole blocks, or all tokens but one."""
    tensors, mask = inputs(tokens=300, queries=2, dtype=dtype), causal(2, 300, hidden)
    output = check(tensors, mask)
    for row, number in enumerate(hidden):
        tensors[2][row, :number] = tensors[3][row, :number] = 50
    torch.testing.assert_close(check(tensors, mask), output, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["one for all rows", "every second token", "expanded", "transposed"])
def test_masks_of_any_layout(kernel, kind):
    mask = causal(3, 90, (4, 11))
    if kind == "one for all rows":
        mask = mask[:1]
    elif kind == "every second token":
        mask = mask.repeat_interleave(2, dim=-1)[..., ::2]
    elif kind == "expanded":
        mask = mask[:, :, :1].expand(2, 1, 3, 90)
    else:
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    check(inputs(queries=3, tokens=90), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_is_spread_evenly(kernel, dtype):
    tensors, mask = inputs(tokens=600, dtype=dtype), causal(1, 600, (600, 0))
    output = check(tensors, mask)
    mean = torch.einsum("c,hvc->hv", tensors[2][0].double().mean(0), tensors[5].double())
    torch.testing.assert_close(output[0, :, 0].double(), mean, rtol=0.02, atol=0.02)


def test_scores_far_apart_neither_overflow_nor_vanish(kernel):
    tensors = inputs(tokens=400, batch=1)
    tensors[2][0, 250] *= 30
    output = check(tensors, scaling=40.0)
    assert output.isfinite().all()
    check([tensors[0] * 0, tensors[1] * 0, *tensors[2:]])  # all alike


@pytest.mark.parametrize("where", [3, 70, 299])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_in_its_row(kernel, where, number):
    tensors = inputs(tokens=300, dtype=torch.bfloat16)
    tensors[2][1, where, 5] = number
    output = attend_latents(*tensors, 0.25, weights=False)[0]
    assert output[0].isfinite().all() and output[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_others_have_used_makes_no_difference(kernel, monkeypatch, dtype):
    tensors, mask = inputs(3, 2, 333, 7, dtype=dtype), causal(2, 333, (0, 5, 70))
    expected = check(tensors, mask, 0.25)
    scratch.scratch((2**21,), torch.float32).fill_(float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *size, **about: torch.full(size, float("nan"), **about))
    torch.testing.assert_close(attend_latents(*tensors, 0.25, mask, weights=False)[0], expected, rtol=0, atol=0)
    monkeypatch.setattr(cpu_mla, "HELD", 2**14)  # some heads at a time
    torch.testing.assert_close(attend_latents(*tensors, 0.25, mask, weights=False)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(kernel, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(inputs(1, 1, 2000))
        check(inputs(5, 1, 600, dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_128k_tokens(kernel):
    generator = torch.Generator().manual_seed(0)
    tensors = inputs(1, 1, 1, 16, 64, 16, 8, 16, torch.bfloat16)
    tensors[2], tensors[3] = (torch.randn(1, 131_073, n, generator=generator).bfloat16() for n in (64, 8))
    check(tensors)


# quantised latents


def quantised(bits: int, dtype: torch.dtype, tokens: int = 300, **sizes) -> tuple[list, list[torch.Tensor]]:
    """What the kernel gets, and the same as exact numbers."""
    tensors = inputs(tokens=tokens, dtype=dtype, **sizes)
    states = [QuantizedStates.of(x.unsqueeze(1), bits) for x in tensors[2:4]]
    held = [states[0], states[1] if bits == 6 else tensors[3].unsqueeze(1)]
    exact = [x.double() for x in tensors]
    for i, x in enumerate(states[: 1 if bits == 8 else 2]):
        own = QuantizedStates(x.codes, x.scales, x.bits, x.width, torch.double)
        exact[2 + i] = own.dequantize().squeeze(1)
    return [*tensors[:2], *held, *tensors[4:]], exact


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(tokens=1),
        dict(queries=3, heads=33),
        dict(rank=192, rope=6),
        dict(rank=512, nope=128, rope=64, value=128, heads=16),
    ],
    ids=str,
)
def test_quantised_latents(kernel, bits, dtype, sizes):
    held, exact = quantised(bits, dtype, **sizes)
    queries, tokens = held[0].shape[2], exact[2].shape[1]
    mask = causal(queries, tokens, (min(100, tokens - 1), 0))
    scaling = exact[2].shape[-1] ** -0.5
    expected = absorbed_attention_reference(*exact, scaling, mask)[0]
    output = attend_quantized_latents(*held, scaling, mask)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert output.dtype == dtype and (output.double() - expected).norm() < tolerance * expected.norm()
    plain = absorbed_attention_quantized(*held, scaling, mask)
    assert (output - plain).float().norm() < 2 * tolerance * expected.norm()


@pytest.mark.parametrize("bits", [8, 6])
def test_quantised_vectors_that_are_no_numbers_stay_in_their_row(kernel, bits):
    tensors = inputs(tokens=300)
    tensors[2][1, 70, 3] = float("inf")
    latent, k_rope = (QuantizedStates.of(x.unsqueeze(1), bits) for x in tensors[2:4])
    k_rope = k_rope if bits == 6 else tensors[3].unsqueeze(1)
    output = attend_quantized_latents(*tensors[:2], latent, k_rope, *tensors[4:], 0.25)
    assert output[0].isfinite().all() and output[1].isnan().all()


# what goes there


def test_auto_takes_it_from_16_heads_of_v2_on(monkeypatch):
    monkeypatch.setattr(ops, "MLA_DECODE", "auto")
    large = inputs(1, 1, 5, 16, 512, 128, 64, 128)
    assert ops.decode_kernel(tuple(large), None) == "c"
    monkeypatch.setattr(cpu_mla, "_library", functools.cache(lambda: pytest.fail("a compiler was started")))
    assert ops.decode_kernel(tuple(inputs(1, 1, 5, 8, 512, 128, 64, 128)), None) is None
    monkeypatch.setattr(ops, "MLA_DECODE", "torch")
    assert ops.decode_kernel(tuple(large), None) is None


@pytest.mark.parametrize(
    "change", ["fp64", "fp16", "two dtypes", "rank", "rope", "value", "strides", "additive", "per head", "none"]
)
def test_the_rest_takes_the_plain_form(kernel, change):
    tensors, mask = inputs(queries=2), causal(2, 70)
    if change == "fp64":
        tensors = [x.double() for x in tensors]
    elif change == "fp16":
        tensors = [x.half() for x in tensors]
    elif change == "two dtypes":
        tensors[4:] = [x.bfloat16() for x in tensors[4:]]
    elif change in ("rank", "rope", "value"):
        tensors = inputs(queries=2, **{"rank": dict(rank=96), "rope": dict(rope=7), "value": dict(value=10)}[change])
    elif change == "strides":
        tensors[2] = tensors[2].transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "additive":
        mask = torch.zeros(1, 1, 2, 70)
    elif change == "per head":
        mask = mask.expand(2, 5, 2, 70)
    elif change == "none":
        tensors = [x[:0] for x in tensors[:4]] + tensors[4:]
    assert ops.decode_kernel(tuple(tensors), mask) is None
    if change not in ("two dtypes", "none"):
        expected = absorbed_attention_reference(*(x.double() for x in tensors), 0.25, mask)[0]
        output = attend_latents(*tensors, 0.25, mask, weights=False)[0]
        assert (output.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("which", range(6))
def test_tensors_that_do_not_agree_are_left_to_pytorch_which_says_so(kernel, which):
    tensors = inputs(queries=2)
    shorter = (slice(None), slice(None), slice(0, 1)) if which < 2 else slice(0, 1)
    tensors[which] = tensors[which][shorter]
    assert ops.decode_kernel(tuple(tensors), None) is None
    tensors = inputs()
    tensors[3] = tensors[3][:, :-1]
    with pytest.raises(RuntimeError, match="size"):
        attend_latents(*tensors, 0.25, weights=False)


def test_another_default_device_makes_no_difference(kernel):
    tensors = inputs()
    expected = check(tensors)
    with torch.device("meta"):
        output, _ = attend_latents(*tensors, tensors[2].shape[-1] ** -0.5, weights=False)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_what_traces_or_counts_sees_operations(kernel):
    tensors, others = inputs(1, seed=1), inputs(1, seed=2)

    def call(*arguments):
        return attend_latents(*arguments, 0.1, weights=False)[0]

    expected = call(*others)
    for graph in (
        torch.jit.trace(call, tensors, check_trace=False),
        torch.fx.experimental.proxy_tensor.make_fx(call)(*tensors),
    ):
        torch.testing.assert_close(graph(*others), expected, rtol=1e-4, atol=1e-5)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call(*tensors)
    assert counter.get_total_flops() >= 2 * 5 * 70 * (2 * 128 + 8)


def test_it_runs_on_the_stack_of_a_small_thread():
    """Latents as they are take little of it; what is converted takes some 100 KB more."""
    script = """if True:
        import threading, torch
        from modeling_deepseek import cpu_mla
        t = [torch.randn(1, 16, 1, 128), torch.randn(1, 16, 1, 64), torch.randn(1, 900, 512), torch.randn(1, 900, 64)]
        t += [torch.randn(16, 128, 512), torch.randn(16, 128, 512)]
        cpu_mla.decode_available()
        threading.stack_size(256 * 1024)
        thread = threading.Thread(target=lambda: print(cpu_mla.mla_decode(*t, 0.1).isfinite().all()))
        thread.start()
        thread.join()
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "tensor(True)" in run.stdout, run.stderr


def test_gradients_tangents_and_transforms_take_the_plain_form(kernel):
    tensors = inputs(batch=1)
    tensors[4].requires_grad_()
    output, _ = attend_latents(*tensors, 0.25, weights=False)
    assert output.requires_grad
    with torch.no_grad():
        assert ops.decode_kernel(tuple(tensors), None) == "c"
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.decode_kernel(tuple(tensors), None) is None

        def of_latent(latent):
            return attend_latents(*tensors[:2], latent, *tensors[3:], 0.25, weights=False)[0]

        _, tangent = torch.func.jvp(of_latent, (tensors[2],), (torch.ones_like(tensors[2]),))
        assert tangent.abs().max() > 0
        rows = torch.func.vmap(of_latent)(torch.stack([tensors[2], 2 * tensors[2]]))
        torch.testing.assert_close(rows[1], of_latent(2 * tensors[2]), rtol=1e-4, atol=1e-5)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[2], torch.ones_like(tensors[2]))
            found = torch.autograd.forward_ad.unpack_dual(of_latent(dual)).tangent
        torch.testing.assert_close(found, tangent)


def test_without_a_compiler_results_are_the_same(monkeypatch):
    tensors = inputs(1, 1, 50, 16, 512, 128, 64, 128)
    expected = attend_latents(*tensors, 0.1, weights=False)[0]
    monkeypatch.setattr(cpu_mla, "_library", functools.cache(lambda: None))
    torch.testing.assert_close(attend_latents(*tensors, 0.1, weights=False)[0], expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(ops, "MLA_DECODE", "c")
    with pytest.raises(ValueError, match="leave it at 'auto'"):
        attend_latents(*tensors, 0.1, weights=False)


def test_a_machine_without_avx2_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(cpu_mla, "compiled", lambda source, *flags: compiler.compiled(source, "-mno-avx2", *flags))
    assert cpu_mla._library.__wrapped__() is None
    monkeypatch.setattr(cpu_mla.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cpu_mla, "compiled", lambda *_: pytest.fail("a compiler was started"))
    assert cpu_mla._library.__wrapped__() is None


# models


@pytest.fixture(scope="module")
def model():
    """Two layers with the attention of V2-Lite."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=200, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, n_routed_experts=4,
        num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=1, topk_group=1, first_k_dense_replace=1,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def counted(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of queries that the kernel meets from now on."""
    met = []
    call = ops.cpu_mla_decode
    monkeypatch.setattr(ops, "cpu_mla_decode", lambda q_nope, *rest: met.append(q_nope.shape) or call(q_nope, *rest))
    return met


@pytest.mark.parametrize("kind", ["greedy", "beams", "8 bits", "6 bits", "eager"])
def test_generate_gives_the_same_tokens(model, monkeypatch, kind):
    prompts = torch.randint(2, 200, (2, 40))
    mask = torch.ones_like(prompts)
    prompts[0, :11] = mask[0, :11] = 0
    about = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=3 if kind == "beams" else 1)

    def generate():
        if kind in ("8 bits", "6 bits"):
            about["past_key_values"] = LatentCache(model.config, bits=int(kind[0]))
        return model.generate(prompts, return_dict_in_generate=True, output_logits=True, **about)

    monkeypatch.setattr(ops, "MLA_DECODE", "torch")
    expected = generate()
    monkeypatch.setattr(ops, "MLA_DECODE", "auto")
    met = counted(monkeypatch)
    if kind == "eager":
        model.set_attn_implementation("eager")
    try:
        result = generate()
    finally:
        model.set_attn_implementation("sdpa")
    assert len([shape for shape in met if shape[2] == 1]) == (0 if kind == "eager" else 11 * 2)
    assert torch.equal(result.sequences, expected.sequences)
    room = 0.05 if "bits" in kind else 1e-3  # a code may be the next one
    for ours, theirs in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=room, atol=room)


def test_new_tokens_on_a_prefix(model, monkeypatch):
    tokens = torch.randint(2, 200, (2, 300))
    with torch.no_grad():
        expected = model(tokens).logits[:, 290:]
        cache = LatentCache(model.config)
        model(tokens[:, :290], past_key_values=cache)
        met = counted(monkeypatch)
        logits = model(tokens[:, 290:], past_key_values=cache).logits
    assert met == [(2, 16, 10, 128)] * 2
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_weights_that_are_kept_in_fp8(model, monkeypatch):
    layer = DeepseekLatentAttention(model.config, 0).eval()
    layer.kv_b_proj = FP8Linear(*quantize(torch.randn(16 * 256, 512) / 10), (128, 128), None)
    q_nope, q_rope, latent, k_rope, *_ = inputs(1, 1, 90, 16, 512, 128, 64, 128)
    arguments = (q_nope, q_rope, latent.unsqueeze(1), k_rope.unsqueeze(1), None)
    with torch.no_grad():
        met = counted(monkeypatch)
        output, _ = layer.attend_absorbed(*arguments)
        monkeypatch.setattr(ops, "MLA_DECODE", "torch")
        expected, _ = layer.attend_absorbed(*arguments)
    assert len(met) == 1
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lanes,dtype,fast,new,keys,absorbed",
    [
        (16, torch.float32, False, 256, 1024, True),
        (16, torch.float32, False, 400, 1024, False),
        (16, torch.bfloat16, True, 192, 1024, True),
        (16, torch.bfloat16, True, 256, 1024, False),
        (16, torch.bfloat16, True, 256, 4096, True),
        (16, torch.bfloat16, True, 150, 512, False),
        (16, torch.bfloat16, False, 256, 1024, True),
        (8, torch.float32, False, 128, 1024, True),
        (8, torch.float32, False, 192, 1024, False),
        (8, torch.float32, False, 256, 8192, True),
        (None, torch.float32, False, 144, 1024, True),
        (None, torch.float32, False, 256, 8192, False),
    ],
)
def test_how_many_new_tokens_stay_in_latent_space(model, monkeypatch, lanes, dtype, fast, new, keys, absorbed):
    """As measured: what comes out faster with vectors of so many numbers, bf16 instructions or none, and without the kernel."""
    monkeypatch.setattr(ops, "decode_available", lambda: lanes is not None)
    monkeypatch.setattr(ops, "vector_lanes", lambda: lanes)
    monkeypatch.setattr(ops, "has_fast_gemm", lambda *_: fast)
    layer = DeepseekLatentAttention(model.config, 0).to(dtype).eval()
    without = new * (keys * 1088 + 2**17) < 1.2 * keys * (new * 320 + 2**17)
    assert layer.use_absorbed(new, keys, True) is without  # for gradients
    with torch.no_grad():
        assert layer.use_absorbed(new, keys, True) is absorbed
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.use_absorbed(new, keys, True) is without
        layer.config._attn_implementation = "eager"
        try:
            assert layer.use_absorbed(new, keys, True) is without
        finally:
            layer.config._attn_implementation = "sdpa"


def test_compiled_whole_with_lengths_that_change(model):
    compiled = torch.compile(model.model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for length in (24, 30):
            tokens = torch.randint(2, 200, (1, length + 5))
            cache = LatentCache(model.config)
            compiled(input_ids=tokens[:, :length], past_key_values=cache, use_cache=True)
            states = compiled(input_ids=tokens[:, length:], past_key_values=cache, use_cache=True).last_hidden_state
            expected = model.model(input_ids=tokens).last_hidden_state[:, length:]
            torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
