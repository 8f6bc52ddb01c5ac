"""V2-Lite in bf16 on a GPU, ours beside transformers' native class with the same weights: decode, prefill and a training step.

    python benchmarks/gpu_model.py decode [--batches 1 32] [--contexts 4096 32768] [--layers 27] [--forms eager compiled]
    python benchmarks/gpu_model.py prefill [--batches 1] [--contexts 1024 4096 16384]
    python benchmarks/gpu_model.py train [--batches 1] [--contexts 4096] [--layers 4]
    python benchmarks/gpu_model.py decode --smoke       # a tiny model, on a CPU, where times mean nothing

"decode" is one forward of one token per row over a cache of random latents; "compiled" takes a static cache and CUDA graphs. Its
floor is what has to be read (weights of the experts that so many random choices hit, and latents) at the speed of a copy there.
"prefill" and "train" count the multiply-adds of the active weights and of causal attention. Native is measured with "sdpa" and
"eager"; the better of both counts. What fails says why in its place.
"""

import argparse
import gc
import statistics
from functools import partial

import torch
from decode import V2_LITE
from generate import THIN
from gpu_decode import copied_per_second
from timing import head, row, spread, take_turns
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as Native

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache

NAMES = ("ours", "native sdpa", "native eager")
SPARE = 256  # slots of a static cache behind the context, for the steps that are measured


def models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """All of them with the same random weights, which are made on the device."""
    shape = THIN if args.smoke else V2_LITE | dict(vocab_size=102400)
    found, weights = {}, None
    for name in NAMES:
        own = name == "ours"
        config = (DeepseekV2Config if own else NativeConfig)(**shape | dict(num_hidden_layers=args.layers))
        config._attn_implementation = "eager" if name == "native eager" else "sdpa"
        with torch.device("meta"):
            model = (DeepseekV2ForCausalLM if own else Native)(config)
        if weights is None:
            generator = torch.Generator(args.device).manual_seed(0)
            weights = {}
            for key, value in model.state_dict().items():
                weights[key] = torch.empty(value.shape, dtype=torch.bfloat16, device=args.device)
                weights[key].normal_(1.0 if "norm" in key else 0.0, 0.02, generator=generator)
        model.load_state_dict(weights, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(args.device)
        found[name] = model.train(args.what == "train")
    return found


def filled(cache, model, batch: int, context: int, device: str):
    config, generator = model.config, torch.Generator(device).manual_seed(0)
    for layer in range(config.num_hidden_layers):
        states = [
            torch.randn(batch, 1, context, width, dtype=torch.bfloat16, device=device, generator=generator)
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        ]
        cache.update(*states, layer)
    return cache


def decoder(name: str, form: str, model, batch: int, context: int, device: str):
    """A call that decodes one token per row."""
    if form == "compiled":
        cache = StaticCache(config=model.config, max_cache_len=context + SPARE)
        forward = torch.compile(model.forward, mode="reduce-overhead" if device == "cuda" else None)
    else:
        cache = LatentCache(model.config) if name == "ours" else DynamicCache(config=model.config)
        forward = model.forward
    filled(cache, model, batch, context, device)
    ids = torch.randint(2, 1000, (batch, 1), device=device)

    def call() -> None:
        forward(input_ids=ids, past_key_values=cache, use_cache=True)
        wait(device)

    return call


def reader(model, batch: int, tokens: int, device: str):
    ids = torch.randint(2, 1000, (batch, tokens), device=device)

    def call() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        wait(device)

    return call


def learner(model, batch: int, tokens: int, device: str):
    ids = torch.randint(2, 1000, (batch, tokens), device=device)

    def call() -> None:
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        wait(device)

    return call


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def active_weights(model, tokens: int, logits: bool = True) -> tuple[float, float]:
    """Weights that meet one token, and those that `tokens` tokens read, by independent random choices of experts."""
    config, per_token, read = model.config, 0.0, 0.0
    chosen = config.num_experts_per_tok / config.n_routed_experts
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or ("lm_head" in name and not logits):
            continue
        routed = ".experts." in name
        per_token += parameter.numel() * (chosen if routed else 1)
        read += parameter.numel() * (1 - (1 - chosen) ** tokens if routed else 1)
    return per_token, read


def operations(model, batch: int, tokens: int, logits: bool) -> float:
    """Of a forward over whole texts: two per weight and token, and causal attention in its expanded form."""
    config = model.config
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * widths * tokens**2
    return batch * (2 * active_weights(model, 1, logits)[0] * tokens + attention)


def measured(calls: dict, rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each in turns, or why it failed."""
    found = {}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as problem:  # out of memory, or what a compiler says
            found[name] = (str(problem).strip() or type(problem).__name__).splitlines()[0][:80]
            del calls[name]
    return found | take_turns(calls, rounds, warmup=3)


def print_rows(found: dict, what: tuple, last) -> None:
    """A line per contestant; `last` makes the cells that follow from its median seconds."""
    natives = [statistics.median(times) for name, times in found.items() if "native" in name and type(times) is list]
    for name, times in found.items():
        if type(times) is str:
            row(*what, name, times, "", "", "")
            continue
        middle = statistics.median(times)
        faster = f"{min(natives) / middle:.2f}x" if natives and name.startswith("ours") else ""
        row(*what, name, spread(times, 1e3), faster, *last(middle))


def decode(args: argparse.Namespace) -> None:
    entries, speed = models(args), copied_per_second(args.device, 10)
    print(f"a copy moves {speed / 1e9:.0f} GB/s")
    head("batch", "context", "model", "ms per step", "better native takes", "floor, ms", "reached")
    for batch in args.batches:
        for context in args.contexts:
            ours = entries["ours"]
            read = active_weights(ours, batch)[1]
            read += batch * context * args.layers * (ours.config.kv_lora_rank + ours.config.qk_rope_head_dim)
            floor = 2 * read / speed
            for form in args.forms:
                makers = {f"{name}, {form}": partial(decoder, name, form, model) for name, model in entries.items()}
                found = {}
                for name, make in makers.items():  # one after the other: their caches do not fit together
                    try:
                        found |= measured({name: make(batch, context, args.device)}, args.rounds)
                    except Exception as problem:
                        found[name] = (str(problem).strip() or type(problem).__name__).splitlines()[0][:80]
                    clear(args)
                print_rows(found, (batch, context), lambda s, floor=floor: (f"{floor * 1e3:.2f}", f"{floor / s:.2f}"))


def clear(args: argparse.Namespace) -> None:
    torch.compiler.reset()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def throughput(args: argparse.Namespace, make, factor: int) -> None:
    entries = models(args)
    head("batch", "tokens", "model", "ms", "better native takes", "TFLOPS", "tokens per second")
    for batch in args.batches:
        for tokens in args.contexts:
            calls = {name: make(model, batch, tokens, args.device) for name, model in entries.items()}
            work = factor * operations(entries["ours"], batch, tokens, logits=factor == 3)
            found = measured(calls, args.rounds)
            print_rows(
                found,
                (batch, tokens),
                lambda s, work=work, n=batch * tokens: (f"{work / s / 1e12:.1f}", f"{n / s:.0f}"),
            )


def prefill(args: argparse.Namespace) -> None:
    throughput(args, reader, 1)


def train(args: argparse.Namespace) -> None:
    throughput(args, learner, 3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "prefill", "train"])
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--forms", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.smoke:
        raise SystemExit("gpu_model.py measures a CUDA GPU, and torch finds none here (--smoke tries a tiny model).")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    contexts = {"decode": [4096, 32768], "prefill": [1024, 4096, 16384], "train": [4096]}[args.what]
    args.batches = args.batches or ([1, 32] if args.what == "decode" else [1])
    args.contexts = args.contexts or contexts
    args.layers = args.layers or (4 if args.what == "train" else 27)
    if args.smoke:
        args.batches, args.contexts, args.layers, args.rounds = [2], [24], 2, 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU (times mean nothing)"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {args.layers} layers, bf16")
    with torch.set_grad_enabled(args.what == "train"):
        globals()[args.what](args)


if __name__ == "__main__":
    main()
