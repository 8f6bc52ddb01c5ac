"""`deepseek-convert`: the command line over the functions of this package."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modeling_deepseek.conversion.add_code import add_code
from modeling_deepseek.conversion.demo import from_demo, to_demo
from modeling_deepseek.conversion.inspection import inspect
from modeling_deepseek.conversion.inspection import report as inspection_report
from modeling_deepseek.conversion.llama import from_llama, to_llama
from modeling_deepseek.conversion.quantization import SCALE_FMTS, to_bf16, to_fp8
from modeling_deepseek.conversion.verify import report as verification_report
from modeling_deepseek.conversion.verify import verify
from modeling_deepseek.conversion.writer import MAX_SHARD_SIZE


class Command(NamedTuple):
    """A subcommand: `run` is called with one keyword argument per entry of `arguments`, and returns the exit code if not 0."""

    help: str
    arguments: dict[str, dict[str, Any]]  # argument name or flag -> keywords of `add_argument`
    run: Callable[..., int | None]


def run_add_code(folder: Path) -> None:
    written = add_code(folder)
    print(f"{folder}: wrote {', '.join(written)}" if written else f"{folder}: the code is there already")


def run_inspect(source: str, context: int, batch: int) -> None:
    print(inspection_report(inspect(source, context, batch)))


def run_verify(a: Path, b: Path, atol: float, logits: list[int] | None) -> int:
    found = verify(a, b, atol, logits)
    print(verification_report(found, str(a), str(b)))
    return 0 if found.agrees else 1


def token_ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


FOLDERS = {
    "source": {"type": Path, "metavar": "SRC", "help": "the folder of a checkpoint; only read"},
    "destination": {"type": Path, "metavar": "DST", "help": "a new or empty folder, or what a killed run left in it"},
}
JOBS = {"--jobs": {"type": int, "default": 2, "metavar": "N", "help": "files written at a time (2)"}}
SHARDS = {
    "--max-shard-size": {
        "default": MAX_SHARD_SIZE,
        "metavar": "SIZE",
        "help": f"largest file, such as 500MB ({MAX_SHARD_SIZE})",
    },
    **JOBS,
}

COMMANDS = {
    "add-code": Command(
        help="put the modeling code into a model folder, so that it loads with trust_remote_code=True",
        arguments={"folder": {"type": Path, "help": "an official snapshot or a saved model"}},
        run=run_add_code,
    ),
    "inspect": Command(
        help="say from the headers what a checkpoint holds, what it needs in memory, and which tensors it lacks",
        arguments={
            "source": {"help": "a folder, or the id of a model on the Hub"},
            "--context": {"type": int, "default": 4096, "help": "tokens per sequence in the memory estimate (4096)"},
            "--batch": {"type": int, "default": 1, "help": "sequences in the memory estimate (1)"},
        },
        run=run_inspect,
    ),
    "verify": Command(
        help="compare two checkpoints tensor by tensor, across layouts and FP8; exit code 1 when they differ",
        arguments={
            "a": {"type": Path, "help": "a checkpoint in the Hub layout or the inference demo's"},
            "b": {"type": Path, "help": "another one"},
            "--atol": {"type": float, "default": 0.0, "help": "how far apart two elements may be (0)"},
            "--logits": {
                "type": token_ids,
                "metavar": '"ID ID ..."',
                "help": "also run both models in fp32 on these token ids",
            },
        },
        run=run_verify,
    ),
    "to-bf16": Command(
        help="make a bf16 checkpoint of a block-FP8 one, exactly as the official script does",
        arguments={**FOLDERS, **SHARDS},
        run=to_bf16,
    ),
    "to-fp8": Command(
        help="make a block-FP8 checkpoint in the official layout of a bf16 one",
        arguments={
            **FOLDERS,
            "--scale-fmt": {"choices": SCALE_FMTS[1:], "help": "round scales up to powers of two, as in V3.1"},
            **SHARDS,
        },
        run=to_fp8,
    ),
    "to-demo": Command(
        help="shard a V2 or V3 checkpoint for the official inference demo",
        arguments={
            **FOLDERS,
            "--mp": {"type": int, "required": True, "metavar": "N", "help": "number of ranks"},
            "--with-mtp": {"action": "store_true", "help": "keep the MTP layers, which the demo does not have"},
            **JOBS,
        },
        run=to_demo,
    ),
    "from-demo": Command(
        help="put the official inference demo's ranks together again as a checkpoint in the Hub layout",
        arguments={
            **FOLDERS,
            "--config": {
                "dest": "config_file",
                "type": Path,
                "required": True,
                "metavar": "FILE",
                "help": "the config.json of the model on the Hub",
            },
            **SHARDS,
        },
        run=from_demo,
    ),
    "from-llama": Command(
        help="make a checkpoint of DeepseekForCausalLM, code included, of a DeepSeek-LLM in Llama's class",
        arguments={**FOLDERS, **SHARDS},
        run=from_llama,
    ),
    "to-llama": Command(
        help="make a checkpoint of Llama's class of a dense DeepseekForCausalLM",
        arguments={**FOLDERS, **SHARDS},
        run=to_llama,
    ),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="deepseek-convert", description="Work on folders of DeepSeek models.")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help)
        for argument, keywords in command.arguments.items():
            sub.add_argument(argument, **keywords)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, what the command says, or 2 after an error that the user can mend."""
    arguments = vars(parser().parse_args(argv))
    try:
        return COMMANDS[arguments.pop("command")].run(**arguments) or 0
    except (ValueError, OSError) as error:
        print(f"deepseek-convert: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
