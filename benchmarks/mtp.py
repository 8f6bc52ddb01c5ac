"""What multi-token prediction costs in training, and what its drafts give in `generate`.

    python benchmarks/mtp.py train [--length 1024] [--vocabulary 32768] [--rounds 5] [--threads 2]
    python benchmarks/mtp.py generate [--model examples/tiny-v3] [--new 128] [--rounds 12] [--threads 2]

"train" runs forward and backward of one step with and without the loss, interleaved for the time and in a process of its own each
for the peak memory. "generate" completes windows of held-out standard-library source with and without drafts, interleaved.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from timing import machine, spread
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import modeling_deepseek
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain_tiny

TRAINED = dict(
    hidden_size=512,
    intermediate_size=1408,
    moe_intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    bos_token_id=0,
    eos_token_id=1,
)
# Weight of the loss, and whether the logits of the depth are asked for, which keeps them until the backward pass.
VARIANTS = {"without": (0.0, False), "MTP loss": (0.3, False), "MTP loss and logits": (0.3, True)}


def build(args: argparse.Namespace) -> tuple[DeepseekV3ForCausalLM, torch.Tensor]:
    set_seed(0)
    config = DeepseekV3Config(vocab_size=args.vocabulary, num_nextn_predict_layers=1, **TRAINED)
    model = DeepseekV3ForCausalLM(config).train()
    return model, torch.randint(config.vocab_size, (1, args.length))


def step(model, ids: torch.Tensor, variant: str) -> float:
    """Seconds of forward and backward."""
    model.config.mtp_loss_weight, logits = VARIANTS[variant]
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False, output_mtp_logits=logits).loss.backward()
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed


def peak_megabytes(args: argparse.Namespace, variant: str) -> float:
    """Of a process that takes two steps of `variant` alone."""
    command = [sys.executable, __file__, "train", "--only", variant]
    for name in ("length", "vocabulary", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def train(args: argparse.Namespace) -> None:
    if args.only:
        model, ids = build(args)
        for _ in range(2):
            step(model, ids, args.only)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    memory = {variant: peak_megabytes(args, variant) for variant in tqdm(VARIANTS)}  # first: children inherit a peak
    model, ids = build(args)
    times = {variant: [] for variant in VARIANTS}
    for _ in tqdm(range(args.rounds + 1)):  # the first round warms up
        for variant in VARIANTS:
            times[variant].append(step(model, ids, variant))
    print(f"\n{machine(args.threads)}, 6 + 1 layers of width 512, {args.length} tokens, vocabulary {args.vocabulary}")
    print("| | ms per step: median (min - max) | time: median (min - max) | peak memory, MB | more than without |")
    print("|---|---|---|---|---|")
    for variant, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds[1:], times["without"][1:], strict=True)]
        more = memory[variant] - memory["without"]
        print(
            f"| {variant} | {spread(seconds[1:], 1e3, 0)} | {spread(ratios, digits=2)} | {memory[variant]:.0f} | {more:.0f} |"
        )


def generate(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    _, held_out = pretrain_tiny.read_library(Path(sysconfig.get_paths()["stdlib"]))
    ids = pretrain_tiny.encode(tokenizer, list(held_out.values()))
    print(f"{machine(args.threads)}, {model.dtype}, {args.new} new tokens after 64 of held-out source")
    print(
        "| batch | decoding | drafts per round | accepted | tokens per second without | with / without: median (min - max) |"
    )
    print("|---|---|---|---|---|---|")
    for batch in (1, 8):
        windows = ids[: len(ids) // 64 * 64].view(-1, 64)
        chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        prompts = chosen[: batch * args.rounds].view(args.rounds, batch, 64)
        for sample in (False, True):
            times, accepted = {number: [] for number in (0, *args.drafts)}, {number: [] for number in args.drafts}
            for prompt in tqdm(prompts, leave=False):
                for number in times:
                    drafts = dict(use_mtp=True, num_assistant_tokens=number) if number else dict(use_mtp=False)
                    start = time.perf_counter()
                    result = model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=args.new,
                        do_sample=sample,
                        eos_token_id=None,
                        pad_token_id=1,
                        return_dict_in_generate=True,
                        **drafts,
                    )
                    times[number].append(time.perf_counter() - start)
                    if number:
                        accepted[number].append(result.mtp_stats.acceptance_rate)
            for number in args.drafts:
                ratios = [plain / own for own, plain in zip(times[number], times[0], strict=True)]
                speed = batch * args.new / statistics.median(times[0])
                how, rate = "as configured" if sample else "greedy", statistics.mean(accepted[number])
                print(f"| {batch} | {how} | {number} | {rate:.2f} | {speed:.0f} | {spread(ratios, digits=2)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--only", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "tiny-v3"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assert modeling_deepseek  # registers the classes
    (train if args.what == "train" else generate)(args)


if __name__ == "__main__":
    main()
