"""Two checkpoints compared, tensor by tensor, whatever layout and precision each has."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from modeling_deepseek.checkpoint import layer_index
from modeling_deepseek.conversion.add_code import read_config
from modeling_deepseek.conversion.family import causal_lm_class, read_family
from modeling_deepseek.conversion.weights import Weights

CHUNK = 2**17  # elements compared at a time: 1 MiB in fp64, which the CPU caches
NAMED = 8  # tensors that a report names of each kind
_PLACE = re.compile(r"(^|\.)(model|layers\.\d+|self_attn|mlp)(?=\.)|(?<=experts\.)\d+\.|\.weight$")


@dataclass
class Deviation:
    """How far the tensors of one kind are apart.

    Attributes:
        tensors, differing: how many were compared, and how many of them are not equal.
        absolute: the largest `|a - b|` of an element; infinite where only one of the two is finite.
        relative: the largest `||a - b|| / ||a||` (Euclidean) of a tensor.
        worst: the tensor with the largest absolute deviation.
    """

    tensors: int = 0
    differing: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""

    def add(self, name: str, absolute: float, relative: float) -> None:
        self.tensors += 1
        self.differing += absolute > 0
        if absolute > self.absolute:
            self.absolute, self.worst = absolute, name
        self.relative = max(self.relative, relative)


@dataclass
class Verification:
    """The findings of `verify`."""

    atol: float
    kinds: dict[str, Deviation] = field(default_factory=dict)  # kind, such as "experts.up_proj" -> deviation
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)  # "name: (shape in A) and (shape in B)"
    without_mtp: list[str] = field(default_factory=list)  # of MTP layers, which a demo checkpoint does not have
    logits: float | None = None  # the largest difference

    @property
    def agrees(self) -> bool:
        """Whether both hold the same tensors, no element further apart than `atol`. Logits are not looked at."""
        apart = any(deviation.absolute > self.atol for deviation in self.kinds.values())
        return not (apart or self.only_a or self.only_b or self.misshapen)


def verify(
    a: str | os.PathLike[str], b: str | os.PathLike[str], atol: float = 0.0, prompt: Sequence[int] | None = None
) -> Verification:
    """Compare the checkpoints in the folders `a` and `b`, one pair of tensors in memory at a time.

    FP8 is dequantised in fp32; beside a tensor that is not FP8 it is then rounded to that one's dtype, as `to-bf16` does.
    The demo layout says nothing about the sizes of FP8 blocks: they are those of the other folder's config.json, or 128 x 128.
    It has no MTP layers by default: those that the other folder has are listed, not counted as a difference.

    Args:
        atol: how far apart two elements may be.
        prompt: token ids; both models are also run on them in fp32, one after the other.

    Raises:
        ValueError: for an `atol` below 0, a folder that holds no complete checkpoint, or a prompt that the models cannot be run on.
    """
    if not atol >= 0:
        raise ValueError(f"atol is {atol}: expected 0 or more")
    first, second = Weights(a, config_in(b)), Weights(b, config_in(a))
    if prompt is not None:
        check_prompt(prompt, first, second)
    found = Verification(atol)
    common = [name for name in first.shapes if name in second.shapes]
    found.only_a, dropped_by_b = missing_from(second, first)
    found.only_b, dropped_by_a = missing_from(first, second)
    found.without_mtp = dropped_by_a + dropped_by_b
    sizes = {name: first.headers[name].nbytes + second.headers[name].nbytes for name in common}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="verify") as bar:
        for name in common:
            if first.shapes[name] != second.shapes[name]:
                found.misshapen.append(f"{name}: {first.shapes[name]} and {second.shapes[name]}")
            else:
                found.kinds.setdefault(kind_of(name), Deviation()).add(name, *deviation(*pair(first, second, name)))
            bar.update(sizes[name])
    if prompt is not None:
        found.logits = (logits_of(first.path, prompt) - logits_of(second.path, prompt)).abs().max().item()
    return found


def config_in(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the config.json in `folder`; none in the demo layout."""
    return read_config(Path(folder)) if (Path(folder) / "config.json").is_file() else {}


def missing_from(lacking: Weights, other: Weights) -> tuple[list[str], list[str]]:
    """Names that only `other` has: those that count as a difference, and MTP layers that a demo checkpoint does without."""
    only = [name for name in other.shapes if name not in lacking.shapes]
    mtp = {layer_index(name) for name in other.shapes if name.endswith(".eh_proj.weight")} if lacking.is_demo else set()
    mtp -= set(map(layer_index, lacking.shapes))
    return [name for name in only if layer_index(name) not in mtp], [name for name in only if layer_index(name) in mtp]


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.experts.7.up_proj.weight` -> `experts.up_proj`."""
    return _PLACE.sub("", name).removeprefix(".")


def pair(first: Weights, second: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor `name` of both, FP8 rounded to the other's dtype."""
    if name in first.quantized and name not in second.quantized:
        b = second.read(name)
        return first.read(name, b.dtype), b
    a = first.read(name)
    return a, second.read(name, a.dtype)


def deviation(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """`max |a - b|` and `||a - b|| / ||a||` of two tensors of one shape. NaNs and infinities are equal to their like."""
    a, b = a.flatten(), b.flatten()
    if a.dtype == b.dtype and same_bits(a, b):
        return 0.0, 0.0
    absolute, square, norm = 0.0, 0.0, 0.0
    for left, right in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        left, right = left.double(), right.double()
        apart = (left - right).abs()
        largest = apart.max().item()
        if not isfinite(largest):
            same = (left == right) | (left.isnan() & right.isnan())
            apart = apart.masked_fill_(apart.isnan(), inf).masked_fill_(same, 0.0)
            largest = apart.max().item()
        absolute = max(absolute, largest)
        square += apart.dot(apart).item()
        norm += left.dot(left).item()
    if square == 0.0:
        return absolute, 0.0
    return absolute, sqrt(square / norm) if 0.0 < norm < inf and square < inf else inf


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two flat tensors of one dtype are equal bit by bit; by words of 8 bytes, which is four times as fast."""
    word = torch.int64 if a.nbytes % 8 == 0 else torch.uint8
    return torch.equal(a.view(word), b.view(word))


def check_prompt(prompt: Sequence[int], *checkpoints: Weights) -> None:
    """Both models can be run on the token ids, and their logits compared; asked before any weight is read."""
    vocabularies = {weights.path: 0 for weights in checkpoints}
    for weights in checkpoints:
        if weights.is_demo:
            raise ValueError(
                f"{weights.path} has the demo layout; logits need the Hub layout on both sides (from-demo)"
            )
        vocabulary = vocabularies[weights.path] = read_family(weights.path).vocab_size
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise ValueError(
                f"the prompt is {list(prompt)}; expected token ids from 0 to {vocabulary - 1}, the vocabulary of {weights.path}"
            )
    if len(set(vocabularies.values())) > 1:
        sizes = " and ".join(f"{size} of {path}" for path, size in vocabularies.items())
        raise ValueError(f"vocab_size is {sizes}; logits can be compared over one vocabulary only")


@torch.no_grad()
def logits_of(folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of the model in `folder`, in fp32."""
    model_class = causal_lm_class(read_family(folder))
    try:
        model, loading = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except OSError:
        raise
    except Exception as error:  # whatever a wrong field of a config leads to
        raise ValueError(f"{folder} does not load: {str(error).partition(chr(10))[0]}") from error
    if loading["missing_keys"]:
        raise ValueError(f"{folder} lacks {', '.join(sorted(loading['missing_keys'])[:NAMED])}: no logits without them")
    return model.eval()(torch.tensor([list(prompt)]), use_cache=False).logits[0]


def report(found: Verification, a: str, b: str) -> str:
    """The findings as aligned lines, the largest deviation first."""
    lines = [f"A: {a}", f"B: {b}", "", f"{'kind':36}{'tensors':>9}{'differing':>11}{'max |A - B|':>14}{'relative':>12}"]
    for kind, apart in sorted(found.kinds.items(), key=lambda item: (-item[1].absolute, item[0])):
        line = f"{kind:36}{apart.tensors:9,}{apart.differing:11,}{apart.absolute:14.6g}{apart.relative:12.4g}"
        lines.append(f"{line}  {apart.worst}".rstrip())
    named = {
        "only in A": found.only_a,
        "only in B": found.only_b,
        "of another shape": found.misshapen,
        "of MTP layers, without which the demo layout does": found.without_mtp,
    }
    for title, names in named.items():
        if names:
            lines += ["", f"{title}: {len(names):,}", *(f"  {name}" for name in names[:NAMED])]
            lines += [f"  and {len(names) - NAMED:,} more"] if len(names) > NAMED else []
    if found.logits is not None:
        lines += ["", f"largest difference of logits in fp32: {found.logits:.6g}"]
    return "\n".join(lines)
