"""What block-FP8 checkpoints cost: to convert, to load, to run, and to multiply with on a GPU.

    python benchmarks/fp8.py convert FOLDER [--rounds 3]     # to-bf16 beside cp; load and save, ours and native
    python benchmarks/fp8.py load FOLDER                     # memory of from_pretrained, both kinds
    python benchmarks/fp8.py decode [--rounds 9]             # one layer of DeepSeek-V3, kept in FP8 and dequantised
    python benchmarks/fp8.py product [--rounds 50]           # the block-FP8 product at V3's shapes, on a GPU

Seconds are without the start of Python.
FOLDER is made if it is not there: 3 layers of DeepSeek-V3 in its own shapes with 32 of its 256 experts, 4.3 GB of random FP8. What
is written beside it is removed again.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedConfig

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM, ops
from modeling_deepseek.conversion.family import expected_shapes
from modeling_deepseek.conversion.quantization import QUANTISED
from modeling_deepseek.fp8 import SCALE_SUFFIX, dequantize, official_fp8_config, quantize
from modeling_deepseek.modeling_deepseek import DeepseekDecoderLayer

SHARD_BYTES = 2_000_000_000
SHAPES = {"kv_a_proj": (576, 7168), "q_b_proj": (24576, 1536), "o_proj": (7168, 16384), "expert up_proj": (2048, 7168)}

CONVERT = "from modeling_deepseek.conversion.cli import main; import sys; sys.exit(main(['to-bf16', *sys.argv[1:]]))"
LOAD_AND_SAVE = """
import sys, torch
from modeling_deepseek import DeepseekV3ForCausalLM as Ours
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Native
model_class = dict(ours=Ours, native=Native)[sys.argv[1]]
model = model_class.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[3], max_shard_size="2GB")
"""
LOAD = """
import sys, torch
from modeling_deepseek import DeepseekV3ForCausalLM
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[1], fp8_weights=sys.argv[2], dtype=torch.bfloat16)
held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
fp8 = [p for p in model.parameters() if p.dtype == torch.float8_e4m3fn]
scales = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("_scale_inv"))
per_weight = (sum(p.nbytes for p in fp8) + scales) / max(1, sum(p.numel() for p in fp8))
print(sum(held.values()), max(p.nbytes for p in model.parameters()), per_weight)
"""


def config(**fields) -> DeepseekV3Config:
    few = dict(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=32, vocab_size=16384)
    return DeepseekV3Config(**few | dict(num_nextn_predict_layers=0) | fields)


def make_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Shards in the official layout with random weights; those that become FP8 are the same where their shapes are."""
    folder.mkdir(parents=True)
    generator, shards, size = torch.Generator().manual_seed(0), [{}], 0
    fields = {**config.to_dict(), "quantization_config": official_fp8_config(), "dtype": "bfloat16"}

    @functools.cache
    def quantized(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16))

    for name, shape in tqdm(expected_shapes(config).items(), desc="checkpoint"):
        if QUANTISED.search(name):
            weight, scale = quantized(tuple(shape))
            tensors = {name: weight.clone(), name + SCALE_SUFFIX: scale.clone()}
        else:
            tensors = {name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)}
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].float()
        size += sum(tensor.nbytes for tensor in tensors.values())
        shards[-1] |= tensors
        if size > SHARD_BYTES:
            save(folder, shards)
            shards.append({})
            size = 0
    save(folder, shards)
    weight_map = {name: file_name(number) for number, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(fields))


def file_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def save(folder: Path, shards: list[dict]) -> None:
    """Writes the last shard and keeps only its names."""
    save_file(shards[-1], folder / file_name(len(shards) - 1), metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1])


def run(*command: str) -> tuple[float, int, int, str]:
    """Seconds, peak of all memory and of memory without a file behind it (bytes), and the output or what went wrong."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks = dict(RssAnon=0, VmHWM=0)

    def watch() -> None:
        while process.returncode is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for name, value in (line.split(":", 1) for line in lines):
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, error = process.communicate()
    watcher.join()
    lines = [line for line in error.strip().splitlines() if "Error" in line]
    return (
        time.perf_counter() - start,
        peaks["VmHWM"],
        peaks["RssAnon"],
        output if process.returncode == 0 else lines[-1],
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def convert(args: argparse.Namespace) -> None:
    source, target = Path(args.folder), Path(args.folder).with_name(Path(args.folder).name + "-out")
    ways = {
        "cp": ("sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh"),
        "to-bf16": (sys.executable, "-c", CONVERT),
        "to-bf16 --jobs 2": (sys.executable, "-c", CONVERT, "--jobs", "2"),
        "load and save, ours": (sys.executable, "-c", LOAD_AND_SAVE, "ours"),
        "load and save, native": (sys.executable, "-c", LOAD_AND_SAVE, "native"),
    }
    found = {name: [] for name in ways}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, command in ways.items():
            shutil.rmtree(target, ignore_errors=True)
            idle = 0.0 if name == "cp" else run(*command[:2], "import modeling_deepseek.conversion.cli")[0]
            seconds, peak, anonymous, said = run(*command, str(source), str(target))
            seconds -= idle  # a checkpoint of several hundred GB does not notice how long Python takes to start
            written = folder_bytes(target) if target.exists() else 0
            found[name].append((seconds, peak, anonymous, written, said))
    shutil.rmtree(target, ignore_errors=True)
    read = folder_bytes(source)
    print(f"\n{machine()}, {read / 1e9:.1f} GB of FP8")
    print(
        "| | seconds: median (min - max) | MB/s read and written | of cp: median (min - max) | peak memory, GB "
        "| without files, GB |"
    )
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        if not runs[0][3]:
            print(f"| {name} | {runs[0][4]} | | | | |")
            continue
        rates = [(read + written) / 1e6 / seconds for seconds, _, _, written, _ in runs]
        ratios = [rate / (2 * read / 1e6 / other[0]) for rate, other in zip(rates, found["cp"], strict=True)]
        peaks = [max(each[column] for each in runs) / 1e9 for column in (1, 2)]
        print(
            f"| {name} | {spread([each[0] for each in runs], 1)} | {statistics.median(rates):.0f} | {spread(ratios, 2)} "
            f"| {peaks[0]:.2f} | {peaks[1]:.2f} |"
        )


def load(args: argparse.Namespace) -> None:
    print(f"{machine()}, {folder_bytes(Path(args.folder)) / 1e9:.1f} GB of FP8")
    print(
        "| | seconds | model, GB | largest tensor, GB | peak memory without files, GB "
        "| of model + largest tensor | bytes per weight |"
    )
    print("|---|---|---|---|---|---|---|")
    idle = run(sys.executable, "-c", "import modeling_deepseek")[2]
    for kind in ("dequantize", "keep"):
        seconds, _, peak, said = run(sys.executable, "-c", LOAD, args.folder, kind)
        model, largest, per_weight = map(float, said.split())
        peak -= idle
        ratio = peak / (model + largest)
        sizes = " | ".join(f"{x / 1e9:.2f}" for x in (model, largest, peak))
        print(f"| {kind} | {seconds:.0f} | {sizes} | {ratio:.2f} | {per_weight if kind == 'keep' else 2:.3f} |")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    print(f"{machine()}, {torch.get_num_threads()} threads, one MoE layer of V3, 32 experts, bf16")
    model = DeepseekV3ForCausalLM(config(num_hidden_layers=1, first_k_dense_replace=0)).to(torch.bfloat16).eval()
    kept = DeepseekV3ForCausalLM(model.config).to(torch.bfloat16).eval()
    kept.load_state_dict(model.state_dict())
    kept.quantize_fp8()
    print("| tokens | dequantised, ms | kept takes: median (min - max) |")
    print("|---|---|---|")
    for tokens in (1, 16, 256):
        hidden = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16)
        positions = torch.arange(tokens)[None]
        times = {name: [] for name in ("plain", "kept")}
        for _ in tqdm(range(args.rounds + 1), leave=False):
            for name, each in (("plain", model), ("kept", kept)):
                layer: DeepseekDecoderLayer = each.model.layers[0]
                start = time.perf_counter()
                layer(hidden, position_embeddings=each.model.rotary_emb(hidden, positions))
                times[name].append(time.perf_counter() - start)
        plain, own = times["plain"][1:], times["kept"][1:]
        ratios = [x / y for x, y in zip(own, plain, strict=True)]
        print(f"| {tokens} | {statistics.median(plain) * 1e3:.0f} | {spread(ratios, 2)} |")


@torch.no_grad()
def product(args: argparse.Namespace) -> None:
    """The kernel, with the rounding of its activations, beside `torch.matmul` in bf16 and beside the exact product."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise SystemExit("product needs a GPU that multiplies FP8 (compute capability 8.9)")
    print(f"{machine()}, {args.rounds} rounds, interleaved")
    print("| weight | rows | ours, us | TFLOPS | GB/s | bf16 matmul takes: median (min - max) | relative error |")
    print("|---|---|---|---|---|---|---|")
    for name, (outer, inner) in SHAPES.items():
        weight, scale = quantize(torch.randn(outer, inner, device="cuda") * 0.02)
        exact = dequantize(weight, scale)
        plain = exact.to(torch.bfloat16)
        for rows in (1, 64, 4096):
            x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
            ways = {
                "ours": lambda x=x: ops.block_scaled_product(x, weight, scale, (128, 128)),  # noqa: B023 (called here)
                "bf16": lambda x=x: x @ plain.T,  # noqa: B023
            }
            times = {way: [] for way in ways}
            for _ in range(args.rounds + 5):  # the first ones compile and warm up
                for way, call in ways.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call()
                    end.record()
                    end.synchronize()
                    times[way].append(start.elapsed_time(end) / 1e3)
            own, other = times["ours"][5:], times["bf16"][5:]
            seconds, wanted = statistics.median(own), x.float() @ exact.T
            error = ((ways["ours"]().float() - wanted).norm() / wanted.norm()).item()
            moved = weight.nbytes + scale.nbytes + x.nbytes + rows * outer * 2
            print(
                f"| {name} {outer} x {inner} | {rows} | {seconds * 1e6:.0f} | {2 * rows * outer * inner / seconds / 1e12:.1f} "
                f"| {moved / seconds / 1e9:.0f} | {spread([b / a for a, b in zip(own, other, strict=True)], 2)} | {error:.3f} |"
            )


def spread(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["convert", "load", "decode", "product"])
    parser.add_argument("folder", nargs="?", default="fp8-checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.what in ("convert", "load") and not Path(args.folder).exists():
        make_checkpoint(Path(args.folder), config())
    dict(convert=convert, load=load, decode=decode, product=product)[args.what](args)


if __name__ == "__main__":
    main()
