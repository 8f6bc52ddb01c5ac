"""The latent decode kernel on a GPU: bytes and operations per second, beside a copy of memory and the plain torch form.

    python benchmarks/gpu_decode.py [--batches 1 32] [--contexts 4096 32768 131072] [--heads 16 128] [--queries 1] [--rounds 30]
    python benchmarks/gpu_decode.py --beside fa3 flashinfer flashmla     # and other kernels, where they are installed
    python benchmarks/gpu_decode.py --sweep     # every tile of the table in triton_mla.py, to choose the best
    python benchmarks/gpu_decode.py --smoke     # one tiny shape; on a CPU with TRITON_INTERPRET=1, where times mean nothing

Both forms go from absorbed queries to the context `[B, H, S, c]`, over latents of 512 + 64 in bf16 (or 8 bits and a scale per
token: `--latents`). Calls are recorded in a CUDA graph and go round over as many caches as the L2 cannot hold. GB/s counts each
latent and rope key once, as the kernel should read them. A result further than `TOLERANCE` from fp32 ends the run.
"""

import argparse
import functools
import math
import statistics
import time
from itertools import product

import torch

from modeling_deepseek import hub_kernels, triton_mla

RANK, ROPE, SCALING = 512, 64, 192**-0.5
TOLERANCE = 0.02  # relative, of the norms
BEYOND_L2 = 256 * 2**20  # bytes
EIGHT_BITS = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


def make(batch: int, heads: int, queries: int, context: int, latents: str, device: str, seed: int = 0) -> dict:
    """Arguments of the kernel: a query, and a cache with spare room as `LatentCache` leaves it on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    made = dict(q_latent=normal(batch, heads, queries, RANK), q_rope=normal(batch, heads, queries, ROPE))
    held = normal(batch, context + 64 + -context % 64, RANK + ROPE)[:, :context]
    made["latent"], made["k_rope"] = held.split((RANK, ROPE), dim=-1)
    if latents in EIGHT_BITS:
        made["latent"], made["k_rope"] = (made["latent"] * 16).to(EIGHT_BITS[latents]), made["k_rope"].contiguous()
        made["scales"] = torch.full((batch, context), 1 / 16, device=device)
    return made


def plain(q_latent, q_rope, latent, k_rope, scales=None) -> torch.Tensor:
    """What `absorbed_attention` does between its products with the weights."""
    batch, heads, queries, rank = q_latent.shape
    if scales is not None:
        latent = latent.to(q_latent.dtype) * scales[..., None].to(q_latent.dtype)
    scores = torch.bmm(q_rope.reshape(batch, heads * queries, -1), k_rope.mT)
    scores = torch.baddbmm(scores, q_latent.reshape(batch, heads * queries, -1), latent.mT, beta=SCALING, alpha=SCALING)
    return torch.bmm(scores.float().softmax(-1).to(latent.dtype), latent).view(batch, heads, queries, rank)


def kernel(**tensors: torch.Tensor) -> torch.Tensor:
    return triton_mla.mla_decode(**tensors, scaling=SCALING)


BESIDE = {name: functools.partial(form, scaling=SCALING) for name, form in hub_kernels.DECODES.items()}


def error(output: torch.Tensor, tensors: dict) -> float:
    """Of an output, in the first and the last row of the batch, relative to the plain form in fp32."""
    found = []
    for row in (slice(0, 1), slice(-1, None)):
        wanted = plain(**{name: tensor[row].float() for name, tensor in tensors.items()})
        found.append(((output[row].float() - wanted).norm() / wanted.norm()).item())
    return max(found)


def seconds(form, copies: list, rounds: int) -> list[float]:
    """Seconds per call, of `rounds` rounds over `copies`."""
    if next(iter(copies[0].values())).device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for each in copies:
                form(**each)
            times.append((time.perf_counter() - start) / len(copies))
        return times
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes cuBLAS's workspace, before anything is recorded
        for _ in range(2):
            form(**copies[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in copies:
            form(**each)
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(copies))
    return times[3:]


def copied_per_second(device: str, rounds: int) -> float:
    """Bytes that a copy of memory reads and writes in a second."""
    source = torch.zeros(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    copies = [dict(latent=source, target=torch.empty_like(source))]
    times = seconds(lambda latent, target: target.copy_(latent), copies, rounds)
    return 2 * source.nbytes / statistics.median(times)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e6:.1f} ({min(values) * 1e6:.1f} - {max(values) * 1e6:.1f})"


def row(shape: tuple[int, int, int, int], args: argparse.Namespace, device: str, copied: float) -> str:
    batch, heads, queries, context = shape
    tensors = make(*shape, args.latents, device)
    wrong = error(kernel(**tensors), tensors)
    if not wrong < TOLERANCE:
        raise SystemExit(f"wrong: relative error {wrong:.1e} at batch {batch}, context {context}, {heads} heads")
    read = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("q_"))
    copies = copies_of(shape, read, args, device)
    ours = seconds(kernel, copies, args.rounds)
    middle = statistics.median(ours)
    operations = 2 * batch * heads * queries * context * (2 * RANK + ROPE)
    rates = f"{read / middle / 1e9:.0f} | {100 * read / middle / copied:.0f} % | {operations / middle / 1e12:.1f}"
    beside = []
    for form in (plain, *(BESIDE[name] for name in args.beside)):
        try:
            if not error(form(**tensors), tensors) < TOLERANCE:
                beside.append("wrong |")
                continue
            theirs = seconds(form, copies, args.rounds)
            beside.append(f"{spread(theirs)} | {statistics.median(theirs) / middle:.1f}x")
        except Exception as problem:  # out of memory, not installed, not for this GPU or these heads
            beside.append(f"{(str(problem) or type(problem).__name__).splitlines()[0][:60]} |")
    cells = (batch, context, heads, queries, spread(ours), rates, f"{wrong:.1e}", *beside)
    return f"| {' | '.join(map(str, cells))} |"


def copies_of(shape: tuple[int, int, int, int], read: int, args: argparse.Namespace, device: str) -> list[dict]:
    """As many sets of arguments as do not fit the L2 together."""
    number = 1 if args.smoke else min(64, math.ceil(BEYOND_L2 / read))
    return [make(*shape, args.latents, device, seed) for seed in range(number)]


def tile_of(tensors: dict) -> tuple[int, int, int, int]:
    """Rows, tokens, stages and warps that the kernel takes for these arguments."""
    query, latent = tensors["q_latent"], tensors["latent"]
    shared = triton_mla._device(latent.device)[1]
    rows = query.shape[1] * query.shape[2]
    return triton_mla._tile(rows, RANK, ROPE, query.element_size(), shared, "scales" in tensors)


def sweep(shape: tuple[int, int, int, int], args: argparse.Namespace, device: str) -> None:
    """Times every tile for one shape, fastest first."""
    tensors, found = make(*shape, args.latents, device), []
    copies = copies_of(shape, tensors["latent"].nbytes, args, device)
    chosen, tile = dict(triton_mla._TILES), 16 if shape[1] * shape[2] <= 16 else 64
    try:
        for tokens, stages, warps in product((16,) if args.smoke else (16, 32, 64, 128), (1, 2, 3, 4), (4, 8)):
            triton_mla._TILES[tile] = (warps, ((tokens, stages),))
            triton_mla._too_large.clear()
            try:
                middle = statistics.median(seconds(kernel, copies, args.rounds))
                if triton_mla._too_large or tile_of(tensors) != (tile, tokens, stages, warps):
                    raise ValueError("wants more shared memory than there is")  # and another tile was taken
                found.append((middle, tokens, stages, warps))
            except Exception as problem:  # it does not fit
                print(f"  {tokens} tokens, {stages} stages, {warps} warps: {str(problem).splitlines()[0][:80]}")
    finally:
        triton_mla._TILES.update(chosen)
    print(f"batch {shape[0]}, context {shape[3]}, {shape[1]} heads, {shape[2]} new tokens, {tile} rows in a tile:")
    for middle, tokens, stages, warps in sorted(found)[:6]:
        print(f"  {middle * 1e6:.1f} us with {tokens} tokens, {stages} stages, {warps} warps")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--queries", type=int, nargs="+", default=[1])
    parser.add_argument("--latents", choices=["bfloat16", *EIGHT_BITS], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--beside", nargs="+", default=[], choices=list(BESIDE))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.smoke:
        raise SystemExit(
            "gpu_decode.py measures a CUDA GPU, and torch finds none here (TRITON_INTERPRET=1 and --smoke try one tiny shape)."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.smoke:
        args.batches, args.contexts, args.heads, args.rounds = [2], [70], [4], 1
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (the interpreter: times mean nothing)"
    copied = copied_per_second(device, args.rounds)
    print(
        f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton_mla.triton.__version__}, ",
        end="",
    )
    print(f"{args.latents} latents of {RANK} + {ROPE}, {args.rounds} rounds; a copy moves {copied / 1e9:.0f} GB/s")
    shapes = list(product(args.batches, args.heads, args.queries, args.contexts))
    if args.sweep:
        for shape in shapes:
            sweep(shape, args, device)
        return
    columns = [
        "batch",
        "context",
        "heads",
        "new tokens",
        "kernel, us: median (min - max)",
        "GB/s",
        "of the copy",
        "TFLOPS",
    ]
    columns += ["relative error"]
    for name in ("plain torch", *args.beside):
        columns += [f"{name}, us: median (min - max)", "kernel is faster"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for shape in shapes:
        print(row(shape, args, device, copied), flush=True)


if __name__ == "__main__":
    main()
