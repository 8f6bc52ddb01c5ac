"""A training step of our classes beside transformers' native ones: same weights, data and settings, interleaved in one process.

    python benchmarks/training.py time [--families v2 v3] [--length 512] [--batch 1] [--vocabulary 32768] [--rounds 9] [--threads 1]
    python benchmarks/training.py memory

A step is forward and backward. Times are those of the processor (`time.process_time`), which other work on the machine disturbs
less than the clock's. Memory is the peak of a process of its own over one that builds the model and has gradients.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from timing import machine, spread
from tqdm import tqdm
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeV2Config
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as NativeV2
from transformers.models.deepseek_v3 import DeepseekV3Config as NativeV3Config
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeV3

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.load_balance import ExpertLoad

SHAPE = dict(
    hidden_size=512,
    intermediate_size=1408,
    moe_intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    first_k_dense_replace=1,
    n_routed_experts=64,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    bos_token_id=0,
    eos_token_id=1,
)
V2_LITE = dict(
    q_lora_rank=None, num_experts_per_tok=6, n_shared_experts=2, topk_method="greedy", n_group=1, topk_group=1
)
V3 = dict(q_lora_rank=192, num_experts_per_tok=8, n_shared_experts=1, n_group=8, topk_group=4)
FAMILIES = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM, NativeV2Config, NativeV2, V2_LITE),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM, NativeV3Config, NativeV3, V3),
}
BALANCED = dict(aux_loss_alpha=1e-3)
GROUPED = dict(device_aux_loss_alpha=5e-2, comm_aux_loss_alpha=2e-2)  # where experts have groups
ROWS = ["native", "ours", "all balancing", "no logits", "selective", "full", "native full"]


class Contestant:
    """One row: a model, and what is turned on around a step of it."""

    def __init__(self, family: str, row: str, args: argparse.Namespace):
        torch.manual_seed(0)
        config, model, native_config, native_model, shape = FAMILIES[family]
        shape = SHAPE | shape | dict(vocab_size=args.vocabulary, max_position_embeddings=args.length)
        native = row.startswith("native")
        if native:
            self.model = native_model(native_config(**shape))
        else:
            self.model = model(config(**shape))
        self.family, self.row = family, row
        self.model.train()
        if row == "all balancing":
            factors = BALANCED | (GROUPED if shape["n_group"] > 1 else {})
            for name, factor in factors.items():
                setattr(self.model.config, name, factor)
            ExpertLoad(self.model)
        self.model.config.training_logits = row != "no logits"
        if row == "selective":
            self.model.gradient_checkpointing_enable({"mode": "selective"})
        elif row.endswith("full"):
            self.model.gradient_checkpointing_enable()

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """Processor seconds of forward and backward, and the loss."""
        self.model.zero_grad(set_to_none=False)
        start = time.process_time()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return time.process_time() - start, loss.item()


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(args: argparse.Namespace, ids: torch.Tensor) -> None:
    """In a process of its own: prints what two steps need at their peak, above weights and gradients."""
    contestant = Contestant(args.families[0], args.only, args)
    for parameter in contestant.model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(0.0)
    before = megabytes()
    for _ in range(2):
        contestant.step(ids)
    print(megabytes() - before)


def peak_megabytes(args: argparse.Namespace, family: str, row: str) -> float:
    command = [sys.executable, __file__, "memory", "--families", family, "--only", row]
    for name in ("length", "batch", "vocabulary", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(family: str, args: argparse.Namespace) -> None:
    memory = {row: peak_megabytes(args, family, row) for row in tqdm(args.rows)}
    print(f"\n| {family} | peak memory of a step, MB |\n|---|---|")
    for row, peak in memory.items():
        print(f"| {row} | {peak:.0f} |", flush=True)


def measure_time(family: str, args: argparse.Namespace, ids: torch.Tensor) -> None:
    contestants = [Contestant(family, row, args) for row in args.rows]
    weights = contestants[0].model.state_dict()
    for contestant in contestants[1:]:
        contestant.model.load_state_dict(weights)
    times, losses = {row: [] for row in args.rows}, {}
    for turn in tqdm(range(args.rounds + 1)):  # the first round warms up
        for contestant in contestants if turn % 2 else reversed(contestants):
            seconds, losses[contestant.row] = contestant.step(ids)
            times[contestant.row].append(seconds)
    print(f"\n{family}: losses {', '.join(f'{row} {loss:.6f}' for row, loss in losses.items())}\n")
    print(
        f"| {family} | processor ms per step: median (min - max) | of {args.rows[0]}: median (min - max) |\n|---|---|---|"
    )
    for row, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds[1:], times[args.rows[0]][1:], strict=True)]
        print(f"| {row} | {spread(seconds[1:], 1e3, 0)} | {spread(ratios, digits=3)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(args.vocabulary, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    if args.only:
        alone(args, ids)
        return
    print(f"{machine(args.threads)}, {args.batch} x {args.length} tokens, vocabulary {args.vocabulary}")
    for family in args.families:
        if args.what == "memory":
            measure_memory(family, args)
        else:
            measure_time(family, args, ids)


if __name__ == "__main__":
    main()
