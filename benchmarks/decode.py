"""One decode step against a long context: ours beside transformers' native class, same weights, interleaved in one process.

    python benchmarks/decode.py [--context 4096] [--layers 2] [--rounds 9] [--threads 2] [--dtypes bfloat16 float32]

The model is the decoder of DeepSeek-V2-Lite (hidden 2048, 16 heads, latent 512 + 64, 64 experts, first layer dense) cut to
`--layers`; embedding and head are left out of the timing by a small vocabulary. The cache is filled with random latents.
"""

import argparse
import platform
import statistics
import time

import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2 import DeepseekV2Model as NativeModel

from modeling_deepseek import DeepseekV2Config, DeepseekV2Model, LatentCache

V2_LITE = dict(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=163840,
    rope_scaling=dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)


def filled(cache, layers: int, context: int, dtype: torch.dtype):
    """`cache` with `context` random latents per layer; the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        latent = torch.randn(1, 1, context, V2_LITE["kv_lora_rank"], generator=generator).to(dtype)
        k_rope = torch.randn(1, 1, context, V2_LITE["qk_rope_head_dim"], generator=generator).to(dtype)
        cache.update(latent, k_rope, layer)
    return cache


def contestants(layers: int, context: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    ours = DeepseekV2Model(DeepseekV2Config(num_hidden_layers=layers, **V2_LITE)).to(dtype).eval()
    entries = {"ours": (ours, filled(LatentCache(ours.config), layers, context, dtype))}
    for attention in ("sdpa", "eager"):
        config = NativeConfig(num_hidden_layers=layers, **V2_LITE)
        config._attn_implementation = attention
        native = NativeModel(config).to(dtype).eval()
        native.load_state_dict(ours.state_dict(), assign=True)
        entries[f"native {attention}"] = (native, filled(DynamicCache(config=config), layers, context, dtype))
    return entries


@torch.no_grad()
def step(model, cache, embeds: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    output = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
    elapsed = time.perf_counter() - start
    cache.crop(-1)
    return elapsed, output


def measure(layers: int, context: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    entries = contestants(layers, context, dtype)
    embeds = torch.randn(1, 1, V2_LITE["hidden_size"], generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = {name: step(*entry, embeds)[1].float() for name, entry in entries.items()}  # also the warm-up
    error = (outputs["ours"] - outputs["native sdpa"]).abs().max() / outputs["native sdpa"].abs().max()
    print(
        f"{str(dtype).removeprefix('torch.')}: largest difference to native, relative to its largest output: {error:.1e}"
    )
    times = {name: [] for name in entries}
    for _ in range(rounds):
        for name, entry in entries.items():
            times[name].append(step(*entry, embeds)[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {args.layers} layers of V2-Lite, context {args.context}")
    print("| dtype | model | ms per step: median (min - max) | ours is faster: median (min - max) |\n|---|---|---|---|")
    for name in args.dtypes:
        times = measure(args.layers, args.context, getattr(torch, name), args.rounds)
        for model, seconds in times.items():
            ratios = [slow / fast for slow, fast in zip(seconds, times["ours"], strict=True)]
            row = [f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} - {1e3 * max(seconds):.1f})"]
            row += [
                f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} - {max(ratios):.1f})" if model != "ours" else ""
            ]
            print(f"| {name} | {model} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
