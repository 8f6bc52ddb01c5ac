"""The table of the README, measured again in less than five minutes: attention, `generate`, prefill and overhead in fp32.

    python benchmarks/readme.py

Each line is a run of another benchmark here with few rounds; their tables, with the spread, are printed as they come.
"""

import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

CONTEXTS = "--contexts 1024 4096 16384 --dtypes float32"
LINES = {
    "attention of a new token, 16 heads, 1k / 4k / 16k cached tokens": f"attention.py decode --heads 16 --rounds 7 {CONTEXTS}",
    "`generate`, 4 layers of V2-Lite, 1k / 4k / 16k": f"generate.py lite --rounds 2 --tokens 2 {CONTEXTS}",
    "attention of a prompt of 256 / 1,024 tokens": "attention.py prefill --tokens 256 1024 --dtypes float32 --rounds 5",
    "27 thin layers, where only overhead counts, per token": "generate.py thin --rounds 5",
}


def table(output: str) -> list[dict[str, str]]:
    """The rows of the table that a benchmark printed, by the names of its columns."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, cells, strict=True)) for cells in rows]


def faster(row: dict[str, str]) -> float:
    """How many times as long as ours the better native takes, by the medians of one row."""
    medians = {name: float(cell.split()[0]) for name, cell in row.items() if "take" in name}
    return 1 / medians["ours takes of it"] if "ours takes of it" in medians else min(medians.values())


def main() -> None:
    found = {}
    for name, command in tqdm(LINES.items(), disable=None):
        script, *arguments = command.split()
        run = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
            output = ""
            for line in process.stdout:
                tqdm.write(line, end="")
                output += line
        if process.returncode:
            raise SystemExit(f"{command} failed")
        found[name] = table(output)
    print("\n| fp32 | native takes |\n|---|---|")
    for name, rows in found.items():
        print(f"| {name} | {' / '.join(f'{faster(row):.3g}x' for row in rows)} |")


if __name__ == "__main__":
    main()
