"""What the fine-tuning examples share: flags, how a model is loaded, and data that every Python has, its standard library."""

import argparse
import ast
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

TINY = Path(__file__).with_name("tiny-v3")


class Function(NamedTuple):
    """A documented function: `def name(...):`, its docstring, and its source without the docstring."""

    head: str
    doc: str
    source: str


def arguments(description: str, steps: int, learning_rate: float, **flags: str) -> argparse.Namespace:
    """The flags of every example, and switches that `flags` explain; seeds everything."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(TINY), help="Hub id or folder (default: the small model beside this)")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimiser steps ({steps})")
    parser.add_argument(
        "--learning-rate", type=float, default=learning_rate, help=f"{learning_rate:g} suits the small model only"
    )
    parser.add_argument("--output", default="finetuned", help="folder for the result")
    parser.add_argument("--dtype", default="float32", help="of the weights; auto: as stored")
    parser.add_argument("--seed", type=int, default=0)
    for name, explanation in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=explanation)
    args = parser.parse_args()
    set_seed(args.seed)
    assert args.steps > 0, f"--steps {args.steps} must be positive"
    return args


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with its MTP layers, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=True)


def training_options(args: argparse.Namespace) -> dict:
    """Arguments that every trainer of the examples takes."""
    return dict(
        output_dir=args.output,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        bf16=torch.cuda.is_available(),
        save_strategy="no",  # the examples save at the end
        logging_steps=max(1, args.steps // 10),
        report_to="none",
    )


def functions() -> tuple[list[Function], list[Function]]:
    """Documented functions of the library's modules, to train on, and every 16th to evaluate with."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                doc = node.body[0]
                head, body = lines[node.lineno - 1 : doc.lineno - 1], lines[doc.end_lineno : node.end_lineno]
                found.append(Function("\n".join(head), ast.get_docstring(node), "\n".join(head + body)))
    return [function for index, function in enumerate(found) if index % 16], found[::16]


def tokenized(functions: list[Function], tokenizer: PreTrainedTokenizerBase, length: int = 512) -> list[dict]:
    """Each function as `# docstring`, source, end of text: `{"input_ids": ids}` of at most `length` tokens."""
    texts = [f"# {each.doc.splitlines()[0]}\n{each.source}\n{tokenizer.eos_token}" for each in functions]
    return [{"input_ids": tokenizer(text, truncation=True, max_length=length)["input_ids"]} for text in texts]
