"""Linear layers of few tokens on a CPU: in C, as the models call them, beside PyTorch's own, in turns in one process.

    python benchmarks/linear.py [--tokens 1 2 4 8 12] [--weights bfloat16 float32 float8_e4m3fn] [--forced]

Weights of DeepSeek-V2-Lite's and V3's layers, so many of each that they come from memory. Tokens are like the weights, and in bf16
for those kept in FP8, which PyTorch's operations dequantise first. `--forced` asks C also where PyTorch is chosen.
"""

import argparse
import copy
import statistics
from functools import partial

import torch
from timing import head, machine, ratios, row, spread, take_turns

from modeling_deepseek import ops, products
from modeling_deepseek.fp8 import FP8Linear, quantize
from modeling_deepseek.layers import linear

SHAPES = {
    "V2-Lite q_proj": (2048, 3072),
    "V2-Lite o_proj": (2048, 2048),
    "V2-Lite dense down_proj": (10944, 2048),
    "V2-Lite lm_head": (2048, 102400),
    "V3 kv_a_proj_with_mqa": (7168, 576),
}
MEMORY = 2**29  # bytes of each shape, which no processor caches


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 12])
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "float32", "float8_e4m3fn"])
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.forced:
        products.PLAIN_PRODUCT = "c"
    print(machine(args.threads))
    head("weights", "of", "tokens", "ours, ms", "GB/s", "PyTorch takes")
    for name in args.weights:
        for label, (inner, outer) in SHAPES.items():
            one = layer(name, inner, outer)
            layers = [one, *(copy.deepcopy(one) for _ in range(MEMORY // one.weight.nbytes))]
            for tokens in args.tokens:
                x = torch.randn(tokens, inner).to(torch.float32 if name == "float32" else torch.bfloat16)
                calls = {way: partial(each_with, layers, x, way) for way in ("auto", "torch")}
                times = take_turns(calls, args.rounds)
                own = [seconds / len(layers) for seconds in times["auto"]]
                rate = f"{one.weight.nbytes / statistics.median(own) / 1e9:.0f}"
                row(name, label, tokens, spread(own, 1e3), rate, f"{spread(ratios(times['torch'], times['auto']))} x")


def layer(name: str, inner: int, outer: int) -> torch.nn.Module:
    if name == "float8_e4m3fn":
        return FP8Linear(*quantize(torch.randn(outer, inner)), (128, 128), bias=None)
    return torch.nn.Linear(inner, outer, bias=False, dtype=getattr(torch, name))


def each_with(layers: list[torch.nn.Module], x: torch.Tensor, way: str) -> None:
    ops.FP8_PRODUCT = "auto" if way == "auto" else "dequantize"
    for module in layers:
        if way == "auto":
            linear(module, x)
        else:
            module(x)


if __name__ == "__main__":
    main()
