"""The attention core alone, ours beside transformers' native one: same weights and inputs, in turns in one process.

    python benchmarks/attention.py decode [--heads 16 128] [--contexts 1024 4096 16384] [--dtypes bfloat16 float32]
    python benchmarks/attention.py crossover
    python benchmarks/attention.py prefill

From projected queries and cached latents to the outputs of the heads: absorbing, expanding and un-absorbing included, the other
projections not. Geometry of DeepSeek-V2 / V3: latent 512 + 64, heads of 128 + 64 and 128. Native is measured with "sdpa" and
"eager"; the better of both counts. A turn of `decode` passes through several layers, as a step of a model does; `--layers 1` finds
weights and caches where native left them.
"""

import argparse
from collections.abc import Callable

import torch
from decode import V2_LITE
from timing import better, head, machine, ratios, row, spread, take_turns
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention as NativeAttention
from transformers.models.deepseek_v2.modeling_deepseek_v2 import eager_attention_forward

from modeling_deepseek import DeepseekV2Config
from modeling_deepseek.attention import DeepseekLatentAttention
from modeling_deepseek.dtypes import has_fast_gemm
from modeling_deepseek.plain_attention import blocked_causal_attention

NATIVE = ("native sdpa", "native eager")


class Case:
    """`new` queries of `heads` heads against `context` latents, the queries' own included."""

    def __init__(self, heads: int, new: int, context: int, dtype: torch.dtype):
        torch.manual_seed(0)
        shape = V2_LITE | dict(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads)
        self.new, self.context, self.prefix = new, context, new < context
        self.ours = DeepseekLatentAttention(DeepseekV2Config(attn_implementation="sdpa", **shape), 0).to(dtype).eval()
        self.native = NativeAttention(NativeConfig(**shape), 0).to(dtype).eval()
        self.native.load_state_dict(self.ours.state_dict(), assign=True)
        self.q_nope = torch.randn(1, heads, new, 128).to(dtype)
        self.q_rope = torch.randn(1, heads, new, 64).to(dtype)
        self.latent = torch.randn(1, 1, context, 512).to(dtype)
        self.k_rope = torch.randn(1, 1, context, 64).to(dtype)
        self.seen = None
        if 1 < new < context:
            self.seen = torch.ones(new, context, dtype=torch.bool).tril(context - new)[None, None]
        self.additive = None
        if new > 1:
            causal = torch.ones(new, context, dtype=torch.bool).tril(context - new)[None, None]
            self.additive = torch.zeros(1, 1, new, context, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)

    def absorbed(self) -> torch.Tensor:
        return self.ours.attend_absorbed(self.q_nope, self.q_rope, self.latent, self.k_rope, self.seen)[0]

    def expanded(self) -> torch.Tensor:
        query = torch.cat((self.q_nope, self.q_rope), dim=-1)
        if self.ours.blocks_queries(self.q_nope.transpose(1, 2), self.seen):
            key, value = self.ours.expand(self.latent, self.k_rope, wide=not has_fast_gemm("cpu", query.dtype))
            return blocked_causal_attention(query, key, value, self.ours.scaling, self.seen).flatten(2)
        key, value = self.ours.expand(self.latent, self.k_rope)
        if self.ours.pads_values(query, key, self.seen is not None):
            value = torch.nn.functional.pad(value, (0, self.ours.qk_head_dim - self.ours.v_head_dim))
        return self.ours.attend(query, key, value, self.seen)[0]

    def chosen(self) -> torch.Tensor:
        """As [`DeepseekLatentAttention.forward`] chooses."""
        return self.absorbed() if self.prefix and self.takes_absorbed() else self.expanded()

    def takes_absorbed(self) -> bool:
        return self.ours.use_absorbed(self.new, self.context, has_cache=True)

    def of_native(self, name: str) -> torch.Tensor:
        query = torch.cat((self.q_nope, self.q_rope), dim=-1)
        key, value = self.native.expand_kv(self.latent, self.k_rope)
        kind = name.removeprefix("native ")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        mask = self.additive if kind == "eager" else self.seen
        return attend(self.native, query, key, value, mask, scaling=self.native.scaling)[0].flatten(2)

    def contestants(self, *forms: str) -> dict:
        natives = {name: lambda name=name: self.of_native(name) for name in NATIVE}
        return {form: getattr(self, form) for form in forms} | natives

    def error(self, form: str) -> float:
        """Largest difference to native in fp32, relative to its largest output."""
        expected = self.of_native("native eager").float()
        return ((getattr(self, form)().float() - expected).abs().max() / expected.abs().max()).item()


def skinny_rate(heads: int, context: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """Seconds of the two products that decoding cannot do without, as plain matrix products: [H, 576] x [576, T] and back."""
    queries, latents = torch.randn(heads, 576).to(dtype), torch.randn(context, 576).to(dtype)
    probs = torch.randn(heads, context).to(dtype)
    return take_turns({"gemm": lambda: (queries @ latents.T, probs @ latents[:, :512])}, rounds)["gemm"]


def in_a_row(layers: list[dict[str, Callable]]) -> dict[str, Callable]:
    """Contestants that pass through all layers: as in a model, whose weights and caches have left the processor's caches."""

    def passing(form: str) -> Callable:
        return lambda: [layer[form]() for layer in layers]

    return {form: passing(form) for form in layers[0]}


def decode(args: argparse.Namespace) -> None:
    head("dtype", "heads", "context", "ours, ms", "better native", "it takes", "of the skinny GEMMs", "error")
    for name in args.dtypes:
        for heads in args.heads:
            for context in args.contexts if heads == 16 else args.contexts[:1]:
                layers = args.layers or max(1, min(8, 2**16 // context))
                cases = [Case(heads, 1, context, getattr(torch, name)) for _ in range(layers)]
                times = take_turns(in_a_row([case.contestants("chosen") for case in cases]), args.rounds)
                times = {form: [seconds / layers for seconds in found] for form, found in times.items()}
                case = cases[0]
                native = better(times, list(NATIVE))
                kind = case.latent.dtype if has_fast_gemm("cpu", case.latent.dtype) else torch.float32
                floor = min(times["chosen"]) / min(skinny_rate(heads, context, kind, args.rounds))
                faster = f"{spread(ratios(times[native], times['chosen']), digits=1)} x"
                cells = name, heads, context, spread(times["chosen"], 1e3), native, faster, f"{floor:.2f}"
                row(*cells, f"{case.error('chosen'):.1e}")


def crossover(args: argparse.Namespace) -> None:
    head("dtype", "context", "new", "absorbed, ms", "expanded takes", "better native takes", "chosen")
    for name in args.dtypes:
        for context in args.contexts:
            for new in args.new:
                case = Case(16, new, context, getattr(torch, name))
                times = take_turns(case.contestants("absorbed", "expanded"), args.rounds)
                native = better(times, list(NATIVE))
                chosen = "absorbed" if case.takes_absorbed() else "expanded"
                row(
                    name, context, new, spread(times["absorbed"], 1e3),
                    f"{spread(ratios(times['expanded'], times['absorbed']))} x",
                    f"{spread(ratios(times[native], times['absorbed']))} x", chosen,
                )  # fmt: skip


def prefill(args: argparse.Namespace) -> None:
    head("dtype", "tokens", "ours, ms", "native sdpa takes", "native eager takes", "error")
    for name in args.dtypes:
        for tokens in args.tokens:
            case = Case(16, tokens, tokens, getattr(torch, name))
            times = take_turns(case.contestants("chosen"), args.rounds)
            versus = [f"{spread(ratios(times[native], times['chosen']))} x" for native in NATIVE]
            row(name, tokens, spread(times["chosen"], 1e3), *versus, f"{case.error('chosen'):.1e}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "crossover", "prefill"])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--new", type=int, nargs="+", default=[2, 4, 16, 64, 128, 192, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, help="of one turn of decoding; 8, fewer beyond 8k tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.threads))
    globals()[args.what](args)


if __name__ == "__main__":
    main()
