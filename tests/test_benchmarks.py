"""benchmarks/readme.py reads the tables that the other benchmarks print; those for a GPU run on a tiny model here."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PRINTED = """machine, 2 threads

| dtype | tokens | ours, ms | native sdpa takes | native eager takes | error |
| --- | --- | --- | --- | --- | --- |
| float32 | 256 | 4.00 (3.00 - 5.00) | 1.50 (1.00 - 9.00) x | 1.25 (1.00 - 2.00) x | 3.5e-07 |
| float32 | 512 | 8.00 (7.00 - 9.00) | 2.00 (1.00 - 2.50) x | 3.00 (2.00 - 4.00) x | 3.5e-07 |
5 s in all
"""


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("readme", BENCHMARKS / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_better_native_counts(benchmark):
    rows = benchmark.table(PRINTED)
    assert [row["tokens"] for row in rows] == ["256", "512"]
    assert [benchmark.faster(row) for row in rows] == [1.25, 2.0]
    assert benchmark.faster({"ours, ms per token": "3 (2 - 4)", "ours takes of it": "0.80 (0.70 - 0.90)"}) == 1.25


def test_a_line_for_each_benchmark(benchmark, monkeypatch, tmp_path, capsys):
    for command in benchmark.LINES.values():
        (tmp_path / command.split()[0]).write_text(f"print({PRINTED!r})")
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "readme.py"))
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()[-len(benchmark.LINES) :]
    assert lines == [f"| {name} | 1.25x / 2x |" for name in benchmark.LINES]
    (tmp_path / "generate.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"generate.py lite .* failed"):
        benchmark.main()


def test_its_commands_are_ones_that_the_benchmarks_take(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for command in benchmark.LINES.values():
        script, what, *_ = command.split()
        spec = importlib.util.spec_from_file_location(f"benchmark_{Path(script).stem}", BENCHMARKS / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        asked = []
        monkeypatch.setattr(module, what, asked.append)
        monkeypatch.setattr(sys, "argv", command.split())
        monkeypatch.setattr(module.torch, "set_num_threads", lambda number: None)
        module.main()
        assert len(asked) == 1


@pytest.mark.parametrize("what", [["decode", "--forms", "eager"], ["prefill"], ["train"]], ids=lambda what: what[0])
def test_a_tiny_model_stands_in_for_a_gpu(what, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("gpu_model", BENCHMARKS / "gpu_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*what, "--smoke"])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    assert [row[2].partition(",")[0].strip() for row in rows] == ["ours", "native sdpa", "native eager"]
    assert all(len(row) == 7 and float(row[3].split()[0]) > 0 for row in rows)  # none failed
    entries = module.models(SimpleNamespace(smoke=True, layers=2, device="cpu", what="prefill"))
    ids = torch.randint(2, 1000, (2, 9))
    logits = [model(ids).logits.float() for model in entries.values()]
    for other in logits[1:]:
        assert ((logits[0] - other).norm() / other.norm()).item() < 0.02
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="measures a CUDA GPU, and torch finds none"):
            module.main(what)
