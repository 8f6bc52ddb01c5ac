"""The latent decode kernel against its plain twin. Without a GPU it runs in Triton's interpreter."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from modeling_deepseek import LatentCache, ops, plain_attention, quantized
from modeling_deepseek.ops import attend_latents
from modeling_deepseek.plain_attention import absorbed_attention_reference
from tiny import tiny_model, tiny_tokens

triton_mla = pytest.importorskip("modeling_deepseek.triton_mla")
if not triton_mla.AVAILABLE:
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILES = {16: (4, ((16, 1),)), 64: (8, ((16, 1),))}
EXACT = dict(rtol=0, atol=5e-6)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the wrapper allocates is NaN until it is written; blocks are small, so that there are several."""
    monkeypatch.setattr(triton_mla, "_TILES", SMALL_TILES)
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def inputs(batch=2, heads=4, queries=1, keys=40, rank=20, rope=8, dtype=torch.float32) -> list[torch.Tensor]:
    """q_latent, q_rope, latent, k_rope; the last two are views of larger buffers whose spare room is NaN."""
    q_latent, q_rope = torch.randn(batch, heads, queries, rank), torch.randn(batch, queries, heads, rope)
    held = [torch.full((batch, keys + 9, width), float("nan")) for width in (rank, rope)]
    for buffer in held:
        buffer[:, :keys] = torch.randn(batch, keys, buffer.shape[-1])
    tensors = (q_latent, q_rope.transpose(1, 2), *held)
    tensors = [tensor.to(DEVICE, dtype) for tensor in tensors]
    return [*tensors[:2], *(buffer.narrow(1, 0, keys) for buffer in tensors[2:])]


def attend(q_latent, q_rope, latent, k_rope, scaling=0.2, mask=None) -> torch.Tensor:
    """Attention over the latents in fp64, from absorbed queries on."""
    tensors = [tensor.double() for tensor in (q_latent, q_rope, latent, k_rope)]
    scores = tensors[0] @ tensors[2].unsqueeze(1).mT + tensors[1] @ tensors[3].unsqueeze(1).mT
    return plain_attention._masked_softmax(scores * scaling, mask) @ tensors[2].unsqueeze(1)


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)[None, None]


@pytest.mark.parametrize(
    ("heads", "queries", "keys"), [(1, 1, 1), (4, 1, 16), (4, 3, 37), (20, 2, 5), (16, 5, 18)], ids=str
)
def test_it_is_attention_over_latents(heads, queries, keys):
    tensors = inputs(batch=2 if heads < 16 else 1, heads=heads, queries=queries, keys=keys)
    ours = triton_mla.mla_decode(*tensors, 0.2)
    torch.testing.assert_close(ours.double(), attend(*tensors), **EXACT)


@pytest.mark.parametrize("heads", [16, 128])
def test_the_geometry_of_the_releases(heads, monkeypatch):
    monkeypatch.undo()  # also its tiles
    tensors = inputs(1, heads, 1, 70, 512, 64)
    ours = triton_mla.mla_decode(*tensors, 192**-0.5)
    torch.testing.assert_close(ours.double(), attend(*tensors, 192**-0.5), **EXACT)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_it_does_not_depend_on_the_number_of_splits(splits):
    tensors = inputs(batch=1, keys=75)
    ours = triton_mla.mla_decode(*tensors, 0.2, splits=splits)
    torch.testing.assert_close(ours.double(), attend(*tensors), **EXACT)


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_new_tokens_do_not_see_later_ones(queries):
    tensors = inputs(batch=1, queries=queries, keys=35)
    mask = causal(queries, 35)
    expected = attend(*tensors, mask=mask)
    for given in (dict(causal=True), dict(mask=mask), dict(mask=mask, causal=True)):
        ours = triton_mla.mla_decode(*tensors, 0.2, splits=2, **given)
        torch.testing.assert_close(ours.double(), expected, **EXACT)


@pytest.mark.parametrize("queries", [1, 3])
def test_rows_hold_tokens_from_their_own_start_to_their_own_end(queries):
    tensors = inputs(batch=5, heads=2, queries=queries, keys=50)
    starts, ends = [0, 19, 0, 33, 7], [50, 50, 21, 36, 40]
    mask = torch.zeros(5, 1, queries, 50, dtype=torch.bool, device=DEVICE)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mask[row, :, :, start:end] = causal(queries, end - start)
    starts, ends = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (starts, ends))
    expected = attend(*tensors, mask=mask)
    ours = triton_mla.mla_decode(*tensors, 0.2, causal=True, starts=starts, ends=ends, splits=3)
    torch.testing.assert_close(ours.double(), expected, **EXACT)
    for tensor in tensors[2:]:
        for row in range(5):
            tensor[row, : starts[row]] = tensor[row, ends[row] :] = float("nan")  # none of it is read
    poisoned = triton_mla.mla_decode(*tensors, 0.2, causal=True, starts=starts, ends=ends, splits=3)
    assert torch.equal(poisoned, ours)


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 1, 3), (2, 1, 1)], ids=str)
def test_any_mask_of_tokens(shape):
    tensors = inputs(heads=2, queries=3, keys=61)
    mask = torch.rand(*shape, 61, device=DEVICE) > 0.6
    mask[..., 5] = True
    ours = triton_mla.mla_decode(*tensors, 0.2, mask, splits=3)
    torch.testing.assert_close(ours.double(), attend(*tensors, mask=mask), **EXACT)


def test_blocks_that_a_mask_hides_at_both_ends_are_not_read():
    tensors = inputs(keys=400)
    mask = torch.zeros(2, 1, 1, 400, dtype=torch.bool, device=DEVICE)
    mask[0, :, :, 130:291], mask[1, :, :, 399] = True, True
    expected = attend(*tensors, mask=mask)
    for tensor in tensors[2:]:
        tensor[0, : 130 // 16 * 16] = tensor[0, 304:] = tensor[1, :384] = float("nan")
    for splits in (1, 3):
        ours = triton_mla.mla_decode(*tensors, 0.2, mask, splits=splits)
        torch.testing.assert_close(ours.double(), expected, **EXACT)


def test_a_query_that_sees_nothing_gets_the_mean_of_what_was_read():
    tensors = inputs(queries=2, keys=45)
    mask = causal(2, 45).expand(2, -1, -1, -1).clone()
    mask[0, :, 0], mask[1] = False, False
    ours = triton_mla.mla_decode(*tensors, 0.2, mask, splits=2)
    expected = attend(*tensors, mask=mask)
    torch.testing.assert_close(ours[0].double(), expected[0], **EXACT)  # the other query made it read all
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))  # nothing was read
    starts = torch.tensor([3, 45], dtype=torch.int32, device=DEVICE)
    ours = triton_mla.mla_decode(*tensors, 0.2, starts=starts)
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    assert ours[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_near_fp32(dtype):
    tensors = inputs(batch=1, heads=16, keys=90, dtype=dtype)
    ours = triton_mla.mla_decode(*tensors, 0.2, splits=3)
    expected = attend(*tensors)
    assert ours.dtype == dtype
    error = (ours.double() - expected).norm() / expected.norm()
    assert error.item() < (6e-3 if dtype == torch.bfloat16 else 8e-4)  # weights and outputs are rounded once each


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_latents_may_be_quantised_with_a_scale_per_token(kind):
    if DEVICE == "cuda" and kind.is_floating_point and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that knows FP8")
    tensors, scales = inputs(queries=2, keys=45), torch.rand(2, 50, device=DEVICE).narrow(1, 0, 45) + 0.5
    codes = torch.randint(-8, 9, tensors[2].shape, device=DEVICE).to(kind)  # E4M3 holds these too
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        q_latent, q_rope, k_rope = (tensors[place].to(dtype) for place in (0, 1, 3))
        ours = triton_mla.mla_decode(q_latent, q_rope, codes, k_rope, 0.02, scales=scales, splits=2)
        expected = attend(q_latent, q_rope, codes.double() * scales[..., None], k_rope, 0.02)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_logits_that_grow_from_block_to_block_do_not_overflow():
    tensors = inputs(keys=64)
    tensors[2] *= torch.linspace(0, 40, 64, device=DEVICE)[:, None]
    ours = triton_mla.mla_decode(*tensors, 1.0, splits=2)
    torch.testing.assert_close(ours.double(), attend(*tensors, 1.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 128, 300])
@pytest.mark.parametrize("shared", [232448, 166912, 101376, 65536], ids=["H100", "A100", "RTX 4090", "64 KiB"])
def test_tiles_fit_the_shared_memory(rows, shared, monkeypatch):
    monkeypatch.undo()
    tile, tokens, stages, _ = triton_mla._tile(rows, 512, 64, 2, shared)
    assert 2 * (576 * tile + tokens * (512 * stages + 64 + tile)) <= shared
    assert shared < 232448 or (tile, tokens, stages) == ((16, 64, 3) if rows <= 16 else (64, 32, 4))


def test_a_tile_that_triton_finds_too_large_is_not_asked_for_again(monkeypatch):
    """As Triton 3.6 does on a B200, where it wants one buffer more than elsewhere."""
    kernel, asked = triton_mla._attend_split, []

    class Strict:
        def __getitem__(self, grid):
            def launch(*args, TOKENS, STAGES, **kwargs):
                asked.append((TOKENS, STAGES))
                if TOKENS * STAGES > 32:
                    raise triton_mla.OutOfResources(291872, 232448, "shared memory")
                kernel[grid](*args, TOKENS=TOKENS, STAGES=STAGES, **kwargs)

            return launch

    monkeypatch.setattr(triton_mla, "_TILES", {16: (4, ((32, 3), (32, 2), (32, 1))), 64: SMALL_TILES[64]})
    monkeypatch.setattr(triton_mla, "_too_large", set())
    monkeypatch.setattr(triton_mla, "_attend_split", Strict())
    tensors = inputs(keys=130)
    mask = causal(1, 130).expand(2, 1, 1, 130).clone()
    mask[0, ..., :50] = False
    for _ in range(2):
        ours = triton_mla.mla_decode(*tensors, 0.2, mask)
        torch.testing.assert_close(ours.double(), attend(*tensors, mask=mask), rtol=0, atol=5e-6)
    assert asked == [(32, 3), (32, 2), (32, 1), (32, 1)]
    monkeypatch.setattr(triton_mla, "_TILES", {16: (4, ((32, 3), (32, 1))), 64: SMALL_TILES[64]})
    assert [triton_mla._tile(4, 32, 16, 4, 232448, scaled)[1:3] for scaled in (False, True)] == [(32, 1), (32, 3)]
    monkeypatch.setattr(triton_mla, "_TILES", {16: (4, ((32, 3),)), 64: SMALL_TILES[64]})
    with pytest.raises(ValueError, match="do not fit"):
        triton_mla.mla_decode(*tensors, 0.2)


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "splits"),
    [(1, 16, 131072, 132), (1, 16, 4096, 32), (32, 16, 4096, 4), (32, 128, 4096, 2), (200, 16, 4096, 3), (1, 16, 5, 1)],
)
def test_the_splits_fill_an_h100(batch, heads, keys, splits):
    programs = batch * -(-heads // 64)
    assert triton_mla._splits(programs, -(-keys // 64), 132) == splits


@pytest.fixture
def forced(monkeypatch):
    """Both ways to attend, one after the other; `calls` counts what the kernel did."""
    calls = []

    def counted(q_latent, *args, **kwargs):
        calls.append(tuple(q_latent.shape))
        return triton_mla.mla_decode(q_latent, *args, **kwargs)

    monkeypatch.setattr(ops, "mla_decode", counted)

    def both(run):
        results = []
        for way in ("torch", "kernel"):
            monkeypatch.setattr(ops, "MLA_DECODE", way)
            assert not calls
            results.append(run())
        return results

    both.calls = calls
    return both


def absorbed_inputs(queries=2, dtype=torch.float32) -> list[torch.Tensor]:
    shapes = ((2, 4, queries, 12), (2, 4, queries, 8), (2, 30, 20), (2, 30, 8), (4, 12, 20), (4, 10, 20))
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def test_the_door_gives_what_the_reference_gives(forced):
    tensors = absorbed_inputs()
    expected = absorbed_attention_reference(*tensors, 0.2, causal(2, 30))[0]
    plain, kernel = forced(lambda: attend_latents(*tensors, 0.2, causal(2, 30), weights=False))
    for output in (plain[0], kernel[0]):
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    assert kernel[1] is None
    assert forced.calls == [(2, 4, 2, 20)]


@pytest.mark.parametrize("why", ["weights", "dropout", "gradients", "additive", "per head", "autocast"])
def test_what_the_kernel_cannot_do_takes_the_plain_form(why, forced):
    tensors = absorbed_inputs()
    mask, kwargs = causal(2, 30), dict(weights=why == "weights", dropout=0.5 * (why == "dropout"))
    if why == "gradients":
        tensors[2].requires_grad_()
    if why == "additive":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    if why == "per head":
        mask = mask.expand(1, 4, -1, -1)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=why == "autocast"):
        _, kernel = forced(lambda: attend_latents(*tensors, 0.2, mask, **kwargs))
    assert kernel[1] is not None
    assert not forced.calls
    if why == "gradients":
        with torch.no_grad():
            assert attend_latents(*tensors, 0.2, mask, **kwargs)[1] is None


def test_the_way_to_decode_is_chosen_by_name(monkeypatch):
    tensors = absorbed_inputs()
    assert not ops.decode_kernel(tensors, None)  # fp32, or on a CPU
    monkeypatch.setattr(ops, "MLA_DECODE", "kernel")
    assert ops.decode_kernel(tensors, None) == "kernel"
    with pytest.raises(ValueError, match=r"all bf16, fp16 or fp32, got torch.float32, torch.float64"):
        ops.decode_kernel([*tensors[:5], tensors[5].double()], None)
    monkeypatch.setattr(ops, "MLA_DECODE", "fast")
    with pytest.raises(
        ValueError, match="'auto', 'c', 'kernel', 'fa3', 'flashinfer', 'flashmla' or 'torch', got 'fast'"
    ):
        ops.decode_kernel(tensors, None)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_a_padded_batch_generates_the_same(family, kind, forced):
    model = tiny_model(family, attn_implementation="sdpa").to(DEVICE)
    ids = tiny_tokens(model.config, length=6).to(DEVICE)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    options = dict(attention_mask=padding, max_new_tokens=3, do_sample=False, output_logits=True)
    options |= dict(return_dict_in_generate=True, cache_implementation=kind)
    plain, kernel = forced(lambda: model.generate(ids, **options))
    assert torch.equal(plain.sequences, kernel.sequences)
    for theirs, ours in zip(plain.logits, kernel.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert forced.calls.count((2, 4, 1, 28)) == 2 * 3  # steps of three layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_in_8_bits_is_read_as_it_is(dtype, forced, monkeypatch):
    model = tiny_model("v3", attn_implementation="sdpa").to(DEVICE, dtype)
    ids = tiny_tokens(model.config, length=12).to(DEVICE)
    read = []
    monkeypatch.setattr(plain_attention, "read", lambda *args: read.append(1) or pytest.fail("was converted"))

    def logits() -> torch.Tensor:
        cache = LatentCache(model.config, bits=8)
        with torch.no_grad(), monkeypatch.context() as patch:
            if ops.MLA_DECODE == "torch":
                patch.setattr(plain_attention, "read", quantized.read)
            model(ids, past_key_values=cache)
            forced.calls.clear()
            return model(ids[:, :2], past_key_values=cache).logits

    plain, kernel = forced(logits)
    error = (kernel.float() - plain.float()).norm() / plain.float().norm()
    assert error.item() < (1e-5 if dtype == torch.float32 else 3e-2)
    assert forced.calls == [(2, 4, 2, 28)] * 3


def test_drafts_of_mtp_are_verified_the_same(forced):
    model = tiny_model("v3", attn_implementation="sdpa", num_nextn_predict_layers=1).to(DEVICE)
    ids = tiny_tokens(model.config, length=6).to(DEVICE)
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    options = dict(attention_mask=padding, max_new_tokens=4, do_sample=False, use_mtp=True)
    plain, kernel = forced(lambda: model.generate(ids, **options))
    assert torch.equal(plain, kernel)
    assert (2, 4, 2, 28) in forced.calls


def test_the_number_of_splits_is_a_matter_of_shapes():
    """Nothing asks a tensor for its values: no `.item()`, no `tolist`, no branch on them, as CUDA graphs require."""
    meta = torch.empty(2, 1, 1, 40, device="meta", dtype=torch.bool)
    tensors = [tensor.to("meta") for tensor in inputs()]
    launched = []
    kernels = [type("", (), {"__getitem__": lambda self, grid: lambda *a, **k: launched.append(grid)})() for _ in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_mla, "_attend_split", kernels[0])
        patch.setattr(triton_mla, "_combine_splits", kernels[1])
        starts = torch.empty(2, device="meta", dtype=torch.int32)
        triton_mla.mla_decode(*tensors, 0.2, meta, starts=starts, ends=starts)
    assert launched == [(1, 1, 2), (4, 1, 2)]


@pytest.mark.skipif(DEVICE == "cuda", reason="takes address space that a GPU would have to fill")
@pytest.mark.parametrize("strides", [(0, 2**26, 1), (2**30 + 64, 64, 1)], ids=["tokens", "rows"])
def test_offsets_beyond_int32(strides):
    tensors, scales = inputs(batch=3, keys=36), torch.ones(3, 36)
    far = torch.empty(2 * strides[0] + 36 * strides[1], dtype=torch.int8)  # mostly untouched, so without memory
    far = far.as_strided((3, 36, 20), strides)
    for row in far:
        row.copy_(torch.randint(-8, 9, row.shape))
    codes = far.contiguous()
    ours, expected = (
        triton_mla.mla_decode(*tensors[:2], latent, tensors[3], 0.2, scales=scales) for latent in (far, codes)
    )
    assert torch.equal(ours, expected)


def test_the_benchmark_runs(capsys, monkeypatch):
    monkeypatch.undo()
    path = Path(__file__).parent.parent / "benchmarks" / "gpu_decode.py"
    spec = importlib.util.spec_from_file_location("gpu_decode", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--smoke", "--latents", "int8"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:5]] == ["2", "70", "4", "1"]
    assert float(cells[9]) < 0.01
    monkeypatch.setitem(benchmark.BESIDE, "fa3", benchmark.kernel)
    monkeypatch.setitem(benchmark.BESIDE, "flashinfer", lambda **tensors: 2 * benchmark.kernel(**tensors))
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    benchmark.main(["--smoke", "--beside", "fa3", "flashinfer", "flashmla"])
    *_, names, _, values = (line.split("|") for line in capsys.readouterr().out.splitlines())
    assert len(names) == len(values)
    assert values[13].strip().endswith("x")
    assert values[14].strip() == "wrong"
    assert "flash_mla" in values[16]
    monkeypatch.setattr(triton_mla, "_too_large", set())
    monkeypatch.setattr(benchmark, "seconds", lambda *args: triton_mla._too_large.add(1) or [1.0])
    benchmark.main(["--smoke", "--sweep"])
    assert capsys.readouterr().out.count("wants more shared memory") == 8
    monkeypatch.undo()
    monkeypatch.setattr(benchmark, "SCALING", 0.5)  # of the plain form alone
    monkeypatch.setattr(benchmark, "kernel", lambda **tensors: triton_mla.mla_decode(**tensors, scaling=0.4))
    with pytest.raises(SystemExit, match="wrong: relative error"):
        benchmark.main(["--smoke"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="measures a CUDA GPU, and torch finds none"):
            benchmark.main([])
