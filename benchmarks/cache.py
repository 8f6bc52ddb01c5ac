"""What a latent cache in 8 and 6 bits takes, what it costs a decode step, and what it does to a model's predictions.

    python benchmarks/cache.py memory
    python benchmarks/cache.py speed [--context 4096] [--heads 16] [--batch 1] [--rounds 30] [--threads 2] [--dtypes ...]
    python benchmarks/cache.py quality [--model examples/tiny-v3] [--windows 48] [--length 512] [--dtype float32]

"memory" fills caches of DeepSeek-V2's and V2-Lite's geometry and counts. "speed" times attention in latent space at V2-Lite's
geometry, from projected queries to outputs per head, interleaved. "quality" reads windows of held-out standard-library source
through each cache; every token is read from it, also those of its own window.
"""

import argparse
import platform
import sys
import sysconfig
from functools import partial
from pathlib import Path

import torch
from timing import machine, ratios, spread, take_turns
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_deepseek
from modeling_deepseek import DeepseekV2Config, LatentCache
from modeling_deepseek.ops import attend_latents, attend_quantized_latents

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain_tiny

BITS = {"model's dtype": None, "8 bits": 8, "6 bits": 6}
GQA_OF_67B = 95 * 2 * 8 * 128 * 2  # bytes per token: layers, keys and values, heads, width, bf16
RANK, ROPE = 512, 64


def memory(args: argparse.Namespace) -> None:
    print(
        "| bf16 model, cache in | bytes per token and layer | V2-Lite, 27 layers | V2, 60 layers | below DeepSeek-67B's GQA |"
    )
    print("|---|---|---|---|---|")
    for name, bits in BITS.items():
        cache = LatentCache(DeepseekV2Config(num_hidden_layers=60, kv_lora_rank=RANK, qk_rope_head_dim=ROPE), bits=bits)
        for layer in range(60):
            cache.update(torch.randn(1, 1, 1, RANK).bfloat16(), torch.randn(1, 1, 1, ROPE).bfloat16(), layer)
        layer, total = cache.layers[0].nbytes, cache.nbytes
        print(f"| {name} | {layer} | {27 * layer:,} | {total:,} | {1 - total / GQA_OF_67B:.2%} |")


@torch.inference_mode()
def speed(args: argparse.Namespace) -> None:
    print(f"{machine(args.threads)}, {args.heads} heads, batch {args.batch}, {args.context} cached tokens\n")
    print(
        "| dtype | cache in | ms per step and layer: median (min - max) | speed beside the model's dtype: median (min - max) |"
    )
    print("|---|---|---|---|")
    for dtype in (getattr(torch, name) for name in args.dtypes):
        torch.manual_seed(0)
        queries = [torch.randn(args.batch, args.heads, 1, width).to(dtype) for width in (128, ROPE)]
        weights = [torch.randn(args.heads, 128, RANK).mul(0.02).to(dtype) for _ in range(2)]
        steps = {}
        for name, bits in BITS.items():
            cache = LatentCache(bits=bits)
            states = (torch.randn(args.batch, 1, args.context, width).to(dtype) for width in (RANK, ROPE))
            held = cache.update(*states, 0, **({"dequantize": False} if bits else {}))
            held = held if bits else [states.squeeze(1) for states in held]
            form = attend_quantized_latents if bits else partial(attend_latents, weights=False)
            steps[name] = partial(form, *queries, *held, *weights, 192**-0.5)
        seconds = take_turns(steps, args.rounds, warmup=2)
        for name, own in seconds.items():
            beside = spread(ratios(seconds["model's dtype"], own))
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {spread(own, 1e3)} | {beside} |")


@torch.inference_mode()
def quality(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    _, held_out = pretrain_tiny.read_library(Path(sysconfig.get_paths()["stdlib"]))
    ids = pretrain_tiny.encode(tokenizer, list(held_out.values()))
    windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))][: args.windows]
    losses, divergences, agreements = ({name: [] for name in BITS} for _ in range(3))
    for window in tqdm(windows.split(4)):
        for name, bits in BITS.items():
            logits = model(window, past_key_values=LatentCache(model.config, bits=bits)).logits
            logs = logits.float().log_softmax(-1)
            if bits is None:
                expected = logs
            losses[name] += (-logs[:, :-1].gather(-1, window[:, 1:, None])).mean((1, 2)).tolist()
            divergences[name] += (expected.exp() * (expected - logs)).sum(-1).mean(-1).tolist()
            agreements[name] += (expected.argmax(-1) == logs.argmax(-1)).float().mean(-1).tolist()
    text = f"{len(windows)} windows of {args.length} tokens of held-out source, each the context of its own tokens"
    print(f"{Path(args.model).name}, {args.dtype}, Python {platform.python_version()}: {text}\n")
    print("| cache in | perplexity | of that without | KL of the logits, nats per token | the same best token |")
    print("|---|---|---|---|---|")
    for name in BITS:
        perplexity, base = (torch.tensor(losses[key]).mean().exp() for key in (name, "model's dtype"))
        divergence, same = (torch.tensor(found[name]).mean() for found in (divergences, agreements))
        print(f"| {name} | {perplexity:.3f} | {perplexity / base:.4f} | {divergence:.1e} | {same:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "quality"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "tiny-v3"))
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assert modeling_deepseek  # registers the classes
    {"memory": memory, "speed": speed, "quality": quality}[args.what](args)


if __name__ == "__main__":
    main()
