"""What the benchmarks share: contestants that take turns in one process, and the lines of a table."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers


def machine(threads: int) -> str:
    name = platform.processor() or platform.machine()
    return f"{name}, {threads} threads, torch {torch.__version__}, transformers {transformers.__version__}"


def keep_memory() -> None:
    """What is freed stays with this process (glibc only): fresh pages of gigabytes take longer than the work, and never as long."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, -1)


def take_turns(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call: all contestants in each round, in turns forwards and backwards, after `warmup` rounds.

    `clock`: `time.process_time` for what runs in one thread on a machine that others use too.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        order = list(contestants.items())
        for name, call in order if turn % 2 else reversed(order):
            start = clock()
            call()
            elapsed = clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def spread(values: list[float], factor: float = 1, digits: int = 2) -> str:
    """Median (min - max)."""
    middle, low, high = (factor * f(values) for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Of each round."""
    return [other / own for other, own in zip(slow, fast, strict=True)]


def better(times: dict[str, list[float]], names: list[str]) -> str:
    """The contestant with the lower median."""
    return min(names, key=lambda name: statistics.median(times[name]))


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))
