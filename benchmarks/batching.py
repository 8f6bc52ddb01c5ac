"""Continuous batching: `generate_batch` of ours beside one `generate` after the other, same weights and prompts, in turns.

    python benchmarks/batching.py [--layers 2] [--shrink 4] [--requests 8] [--prompts 64 512] [--new 32] [--rounds 3] [--threads 2]

The model has the attention of DeepSeek-V2-Lite (see decode.py), `--layers` of it, and its other widths divided by `--shrink`;
prompts are of lengths spread over `--prompts`. The native class fails in `generate_batch`, which the last line shows.
"""

import argparse
import logging
import platform
import statistics
import time

import torch
import transformers
from decode import V2_LITE
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as NativeModel

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM

BLOCK = 256  # tokens per block of the pool, as transformers has it


def models(
    layers: int, shrink: int, dtype: torch.dtype, device: str
) -> tuple[DeepseekV2ForCausalLM, dict[str, NativeModel]]:
    """Ours, and native's with "sdpa" and "eager", on one set of weights."""
    torch.manual_seed(0)
    narrow = {name: V2_LITE[name] // shrink for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")}
    fields = V2_LITE | narrow | dict(num_hidden_layers=layers)
    ours = DeepseekV2ForCausalLM(DeepseekV2Config(**fields)).to(device, dtype).eval()
    natives = {}
    for attention in ("sdpa", "eager"):
        config = NativeConfig(**fields)
        config._attn_implementation = attention
        with torch.device("meta"):
            native = NativeModel(config)
        native.model.rotary_emb = type(native.model.rotary_emb)(config).to(device)
        native.load_state_dict(ours.state_dict(), assign=True)
        natives[attention] = native.eval()
    return ours, natives


def one_by_one(model, prompts: list[list[int]], generation: GenerationConfig) -> list[list[int]]:
    texts = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return [model.generate(text, generation_config=generation)[0, text.shape[1] :].tolist() for text in texts]


def all_at_once(model, prompts: list[list[int]], generation: GenerationConfig) -> list[list[int]]:
    blocks = sum(-(-(len(prompt) + generation.max_new_tokens) // BLOCK) for prompt in prompts)
    batching = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=2048)
    return [result.generated_tokens for result in model.generate_batch(prompts, generation, batching).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=4)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs=2, default=(64, 512))
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what native's failure says

    ours, natives = models(args.layers, args.shrink, getattr(torch, args.dtype), args.device)
    lengths = torch.linspace(*args.prompts, args.requests).int().tolist()
    prompts = [torch.randint(3, V2_LITE["vocab_size"], (length,)).tolist() for length in lengths]
    generation = GenerationConfig(max_new_tokens=args.new, do_sample=False, eos_token_id=V2_LITE["vocab_size"])
    contestants = {"ours, generate_batch": (all_at_once, ours), "ours, one by one": (one_by_one, ours)}
    contestants |= {f"native {attention}, one by one": (one_by_one, model) for attention, model in natives.items()}

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    shape = f"{args.layers} layers, V2-Lite's widths / {args.shrink}, {args.dtype}"
    print(
        f"{device}, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, {shape}, ",
        end="",
    )
    print(f"{args.requests} prompts of {lengths[0]} to {lengths[-1]} tokens, {args.new} new ones each", flush=True)
    warm_up = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=V2_LITE["vocab_size"])
    speeds, answers = {name: [] for name in contestants}, {}
    for how, model in contestants.values():
        how(model, prompts[:2], warm_up)
    for _ in range(args.rounds):
        for name, (how, model) in contestants.items():
            start = time.perf_counter()
            answers[name] = how(model, prompts, generation)
            speeds[name].append(args.requests * args.new / (time.perf_counter() - start))
    print(
        "| | tokens per second: median (min - max) | generate_batch is faster | tokens as native sdpa |\n|---|---|---|---|"
    )
    first, expected = statistics.median(speeds["ours, generate_batch"]), answers["native sdpa, one by one"]
    for name, found in speeds.items():
        same = [a == b for x, y in zip(answers[name], expected, strict=True) for a, b in zip(x, y, strict=True)]
        middle = statistics.median(found)
        spread = f"{middle:.1f} ({min(found):.1f} - {max(found):.1f})"
        print(f"| {name} | {spread} | {first / middle:.1f}x | {100 * sum(same) / len(same):.1f} % |")
    failed = all_at_once(natives["sdpa"], prompts[:2], warm_up)
    print(f"| native sdpa, generate_batch | answers {failed} | | |")


if __name__ == "__main__":
    main()
