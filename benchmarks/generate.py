"""`generate` of ours beside transformers' native class: same weights and cached tokens, in turns in one process.

    python benchmarks/generate.py lite [--contexts 1024 4096 16384] [--layers 4] [--dtypes bfloat16]   # V2-Lite, cut in depth
    python benchmarks/generate.py thin [--compile]     # 27 layers so thin that only what surrounds them takes time; processor time
    python benchmarks/generate.py memory [--contexts 16384]        # peak of decoding, above the weights

Caches are filled with random latents. Native is measured with "sdpa" and "eager"; the better of both counts.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch
from decode import V2_LITE, filled
from timing import better, head, machine, ratios, row, spread, take_turns
from tqdm import tqdm
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as Native

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache

THIN = dict(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=27,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    bos_token_id=0,
    eos_token_id=1,
)
NATIVE = ("native sdpa", "native eager")
KEPT = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def models(shape: dict, dtype: torch.dtype, names: tuple[str, ...] = ("ours", *NATIVE)) -> dict:
    torch.manual_seed(0)
    entries, weights = {}, None
    for name in names:
        model_class, config_class = (
            (DeepseekV2ForCausalLM, DeepseekV2Config) if name == "ours" else (Native, NativeConfig)
        )
        config = config_class(**shape)
        config._attn_implementation = "eager" if name == "native eager" else "sdpa"
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        if weights is None:
            model = model_class(config)
            weights = model.state_dict()
        else:
            with torch.device("meta"):
                model = model_class(config)
            model.load_state_dict(weights, assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        torch.set_default_dtype(default)
        entries[name] = model.eval()
    return entries


def cache_of(name: str, model, context: int, dtype: torch.dtype):
    layers = model.config.num_hidden_layers
    return filled(
        LatentCache(model.config) if name == "ours" else DynamicCache(config=model.config), layers, context, dtype
    )


def decoder(model, cache, context: int, tokens: int):
    ids = torch.randint(2, 1000, (1, context + 1), generator=torch.Generator().manual_seed(0))

    def call() -> torch.Tensor:
        output = model.generate(ids, past_key_values=cache, min_new_tokens=tokens, max_new_tokens=tokens, **KEPT)
        cache.crop(context - cache.get_seq_length())
        return output[:, -tokens:]

    return call


def lite(args: argparse.Namespace) -> None:
    head("dtype", "context", "ours, ms per token", "better native", "it takes", "same tokens")
    for name in args.dtypes:
        dtype = getattr(torch, name)
        entries = models(V2_LITE | dict(num_hidden_layers=args.layers), dtype)
        for context in args.contexts:
            calls = {
                each: decoder(model, cache_of(each, model, context, dtype), context, args.tokens)
                for each, model in entries.items()
            }
            times = take_turns(calls, args.rounds)
            native = better(times, list(NATIVE))
            same = sum((calls["ours"]() == calls[native]())[0].tolist())
            ours = spread(times["ours"], 1e3 / args.tokens, 1)
            row(
                name,
                context,
                ours,
                native,
                f"{spread(ratios(times[native], times['ours']))} x",
                f"{same}/{args.tokens}",
            )
            del calls
            gc.collect()


def thin(args: argparse.Namespace) -> None:
    entries = models(THIN | dict(num_hidden_layers=args.layers), torch.float32)
    ids = torch.randint(2, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    kept = KEPT | dict(min_new_tokens=args.tokens, max_new_tokens=args.tokens)
    if args.compile:
        kept["cache_implementation"] = "static"
    calls = {}
    for name, model in entries.items():
        if args.compile:
            model.forward = torch.compile(model.forward, dynamic=False)
        calls[name] = lambda model=model: model.generate(ids, **kept)
    start = time.perf_counter()
    times = take_turns(
        calls, args.rounds, warmup=2, clock=time.process_time if args.threads == 1 else time.perf_counter
    )
    native = better(times, list(NATIVE))
    head("form", "ours, ms per token", "better native", "ours takes of it")
    share = spread(ratios(times["ours"], times[native]))
    row("compiled" if args.compile else "eager", spread(times["ours"], 1e3 / args.tokens, 2), native, share)
    print(f"{time.perf_counter() - start:.0f} s in all")


def alone(args: argparse.Namespace) -> None:
    """In a process of its own: the rise of the peak of its memory while it decodes, its cache included."""
    dtype, (name,) = getattr(torch, args.dtypes[0]), args.only
    ((_, model),) = models(V2_LITE | dict(num_hidden_layers=args.layers, n_routed_experts=8), dtype, (name,)).items()
    for context in (64, args.contexts[0]):
        cache = cache_of(name, model, context, dtype)
        decoder(model, cache, context, 2)()
        if context == 64:
            del cache
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = resident("VmRSS")
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(args: argparse.Namespace) -> None:
    peaks = {}
    for name in tqdm(("ours", *NATIVE)):
        command = [sys.executable, __file__, "memory", "--only", name, "--contexts", str(args.contexts[-1])]
        command += ["--layers", str(args.layers), "--dtypes", args.dtypes[0], "--threads", str(args.threads)]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    head("context", "of", "MB above the weights", "of the better native")
    least = min(peaks[name] for name in NATIVE)
    for name, peak in peaks.items():
        row(args.contexts[-1], name, f"{peak:.0f}", f"{peak / least:.2f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lite", "thin", "memory"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.layers = args.layers or (27 if args.what == "thin" else 4)
    args.threads = args.threads or (1 if args.what == "thin" else 2)
    args.tokens = args.tokens or (32 if args.what == "thin" else 4)
    torch.set_num_threads(args.threads)
    if args.only:
        alone(args)
        return
    print(f"{machine(args.threads)}, {args.layers} layers")
    globals()[args.what](args)


if __name__ == "__main__":
    main()
