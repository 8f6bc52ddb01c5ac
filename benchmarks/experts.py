"""The routed experts alone: ours as it chooses, or by name, beside transformers' native class, in turns in one process.

    python benchmarks/experts.py [--tokens 1 2 4 8 ...] [--dtypes bfloat16 float32] [--backward]

DeepSeek-V2-Lite: 64 experts of 2048 x 1408, 6 per token, chosen at random. Native's eager loop and grouped_mm both count; with
--backward `--native grouped_mm` leaves out the loop, which makes a gradient of all experts for each of them, and memory is kept
between calls: 2.2 GB of fresh gradients in fp32 would be most of the time.
"""

import argparse
from functools import partial

import torch
from decode import V2_LITE
from timing import better, head, keep_memory, machine, ratios, row, spread, take_turns
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts as NativeExperts

from modeling_deepseek import DeepseekV2Config
from modeling_deepseek.moe import DeepseekExperts, few_tokens_experts_forward

NATIVE = ("eager", "grouped_mm")
OURS = ("auto", "few", "grouped_mm", "eager")


def experts_of(name: str, weights: dict | None, dtype: torch.dtype):
    native, kind = name.startswith("native"), name.removeprefix("native ")
    config = (NativeConfig if native else DeepseekV2Config)(num_hidden_layers=1, **V2_LITE)
    config._experts_implementation = "auto" if kind == "few" else kind
    with torch.device("meta"):
        experts = (NativeExperts if native else DeepseekExperts)(config)
    if weights is None:
        weights = {
            key: torch.nn.Parameter((torch.randn(value.shape) * 0.02).to(dtype))
            for key, value in experts.state_dict().items()
        }
    experts.load_state_dict(weights, assign=True)  # the same parameters, and gradients, for all
    return experts, weights


def run(name: str, experts, inputs: tuple[torch.Tensor, ...], backward: bool) -> torch.Tensor:
    if name == "few":
        return few_tokens_experts_forward(experts, *inputs)
    output = experts(*inputs)
    if backward:
        experts.zero_grad(set_to_none=False)
        output.float().sum().backward()
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 128, 256, 512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--forms", nargs="+", default=["auto"], choices=OURS)
    parser.add_argument("--native", nargs="+", default=NATIVE, choices=[*NATIVE, "batched_mm"])
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(args.backward)
    if args.backward:
        keep_memory()
    natives = [f"native {form}" for form in args.native]
    print(machine(args.threads), "forward and backward" if args.backward else "forward")
    head("dtype", "tokens", *(f"ours {form}, ms" for form in args.forms), "better native", "it takes of the first")
    for name in args.dtypes:
        dtype, weights, built = getattr(torch, name), None, {}
        for each in (*args.forms, *natives):
            built[each], weights = experts_of(each, weights, dtype)
        for tokens in args.tokens:
            torch.manual_seed(tokens)
            x = torch.randn(tokens, 2048).to(dtype).requires_grad_(args.backward)
            inputs = (x, torch.stack([torch.randperm(64)[:6] for _ in range(tokens)]), torch.rand(tokens, 6))
            calls = {each: partial(run, each, experts, inputs, args.backward) for each, experts in built.items()}
            times = take_turns(calls, args.rounds, warmup=3 if args.backward else 1)
            native = better(times, natives)
            ours = [spread(times[form], 1e3) for form in args.forms]
            row(name, tokens, *ours, native, f"{spread(ratios(times[native], times[args.forms[0]]))} x")


if __name__ == "__main__":
    main()
