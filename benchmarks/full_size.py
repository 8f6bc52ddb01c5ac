"""All of DeepSeek-V2-Lite (27 layers, 64 experts, 15.7 billion weights) kept in FP8 on a CPU: loading and decoding.

    python benchmarks/full_size.py FOLDER [--prompt 64] [--tokens 32] [--threads 2]

FOLDER is made if it is not there: 16.6 GB of random weights in the official layout. The floor is the time that this machine
takes to read, once, the bytes of the weights that a token meets.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from decode import V2_LITE
from fp8 import make_checkpoint
from timing import machine, spread
from transformers.generation.streamers import BaseStreamer

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM


class Clock(BaseStreamer):
    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def active_bytes(model: DeepseekV2ForCausalLM) -> int:
    """Of the weights and scales that one token meets: of the routed experts their share, of the embedding one row."""
    config, total = model.config, 0
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in held.items():
        if ".experts." in name:
            total += tensor.nbytes * config.num_experts_per_tok // config.n_routed_experts
        elif "embed_tokens" not in name:
            total += tensor.nbytes
    return total


def read_rate() -> float:
    """Bytes per second of reading 1 GiB, the best of 15 times."""
    memory = torch.ones(2**28)
    best = float("inf")
    for _ in range(15):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return memory.nbytes / best


def peak_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.folder.exists():
        make_checkpoint(args.folder, DeepseekV2Config(**V2_LITE | dict(vocab_size=102400, num_hidden_layers=27)))
    rate = read_rate()
    print(f"{machine(args.threads)}, reads {rate / 1e9:.1f} GB/s")
    start = time.perf_counter()
    model = DeepseekV2ForCausalLM.from_pretrained(args.folder, fp8_weights="keep", dtype=torch.bfloat16)
    print(
        f"loaded in {time.perf_counter() - start:.0f} s, {sum(map(torch.numel, model.parameters())) / 1e9:.2f} G weights"
    )
    ids = torch.randint(2, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    model.generate(ids, do_sample=False, min_new_tokens=args.tokens, max_new_tokens=args.tokens, streamer=clock)
    steps = [later - earlier for earlier, later in zip(clock.times[2:], clock.times[3:], strict=False)]
    active = active_bytes(model)
    floor = active / rate
    print(f"prompt of {args.prompt}: {clock.times[1] - clock.times[0]:.1f} s; peak memory {peak_memory():.1f} GiB")
    print(
        f"a token: {spread(steps, 1e3, 0)} ms over {len(steps)}, {1 / statistics.median(steps):.2f} tokens per second"
    )
    print(
        f"it meets {active / 1e9:.2f} GB: floor {1e3 * floor:.0f} ms; reached {floor / statistics.median(steps):.2f} of it"
    )


if __name__ == "__main__":
    main()
