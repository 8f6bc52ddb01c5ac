"""Products of few tokens with weights as they are, on a CPU in C: the door of linear layers and of experts."""

import itertools

import torch

from .cpu_kernels import kernels_available, kernels_fast, multiplies_pairs, products
from .dtypes import has_numbers, runs_as_it_is

PLAIN_PRODUCT = "auto"  # or "c", "torch": how few tokens meet weights in fp32 and bf16 on a CPU; set it to choose
MIN_WEIGHTS = 2**20  # numbers in a matrix that is worth the second which a compiler takes, once per process
# Measured: up to so many tokens per matrix (on average, of experts) PyTorch's products take longer, if no expert has many.
TOKENS, EXPERT_TOKENS = 12, 32
# Bytes of tokens in bf16 per matrix, which are read again for each of its rows: more leave the processor's first caches.
PAIRS = 2**16


def large_enough(numbers: int) -> bool:
    """Whether a matrix of so many numbers may be met in C: the question that costs next to nothing."""
    return numbers >= MIN_WEIGHTS or PLAIN_PRODUCT != "auto"


def meets_in_c(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether `x` and these weights are for C, whatever their number: on CPUs, all in fp32 or all in bf16, for no gradients.

    "auto" wants AVX2 and OpenMP too, without which PyTorch's products are as fast or were not measured.

    Raises:
        ValueError: for another `PLAIN_PRODUCT`, and for "c" where there is no compiler.
    """
    if PLAIN_PRODUCT not in ("auto", "c", "torch"):
        raise ValueError(f"PLAIN_PRODUCT is 'auto', 'c' or 'torch', got {PLAIN_PRODUCT!r}.")
    if PLAIN_PRODUCT == "torch" or x.dtype not in (torch.float32, torch.bfloat16) or not runs_as_it_is():
        return False
    for each in (x, *weights):
        if each.dtype != x.dtype or not each.is_cpu or not has_numbers(each):
            return False
        if each.requires_grad and torch.is_grad_enabled():
            return False
    if not x.numel() or any(each.stride(-1) != 1 for each in weights):
        return False
    if PLAIN_PRODUCT == "c" and not kernels_available():
        raise ValueError("PLAIN_PRODUCT = 'c' wants a C compiler: install one, or leave it at 'auto'.")
    return PLAIN_PRODUCT == "c" or kernels_fast()


def plain_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """`x` `[..., n]` times `weight` `[m, n]` -> `[..., m]` like `x`, summed in fp32, in one pass over the weight.

    `None` where that is not the way to do it. Its plain twin is `F.linear(x, weight)`, up to the order of the sums.
    """
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return None
    width = x.shape[-1]
    tokens, auto = x.numel() // max(1, width), PLAIN_PRODUCT == "auto"
    if (auto and tokens > TOKENS) or not meets_in_c(x, weight):
        return None
    if auto and x.dtype == torch.bfloat16 and (x.nbytes > PAIRS if multiplies_pairs() else tokens == 1):
        return None
    rows = x.reshape(tokens, width).contiguous()
    return products(rows, weight.unsqueeze(0), [0], [0, tokens]).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def experts_meet_in_c(
    hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, pairs: int
) -> bool:
    """Whether so many pairs of token and expert meet the experts' weights `[E, m, n]` in C, as [`meets_in_c`] says."""
    few = pairs <= TOKENS * len(down_proj) or PLAIN_PRODUCT == "c"
    return few and meets_in_c(hidden_states, gate_up_proj, down_proj)


def expert_products(
    weights: torch.Tensor, x: torch.Tensor, chosen: list[int], starts: list[int]
) -> torch.Tensor | None:
    """Rows `starts[i]` to `starts[i + 1]` of `x` `[N, n]` times `weights[chosen[i]]` `[m, n]` -> `[N, m]` like `x`.

    For what [`experts_meet_in_c`] says yes to; `None` where one expert meets many tokens, and where shapes or `chosen` do not
    fit the weights. Sums are in fp32.
    """
    most = max((end - start for start, end in itertools.pairwise(starts)), default=0)
    fits = x.shape[-1] == weights.shape[2] and max(chosen, default=-1) < len(weights)
    if not fits:
        return None
    if PLAIN_PRODUCT == "auto":
        wide = x.dtype == torch.bfloat16 and x.nbytes > PAIRS * len(chosen) and multiplies_pairs()
        if wide or most > EXPERT_TOKENS:
            return None
    return products(x.contiguous(), weights, chosen, starts).to(x.dtype)
