"""The house rules: who imports whom, what ships to the Hub, what an installation needs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from absent import without

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "modeling_deepseek"

# A shipped file imports only from lower layers.
LAYERS = {
    "configuration_deepseek": 0,
    "dispatch": 0,
    "dtypes": 0,
    "loss": 0,
    "rope": 0,
    "scratch": 0,
    "quantized": 1,
    "cache_file": 0,
    "cache": 2,
    "balance": 0,
    "recompute": 0,
    "router": 1,
    "masking": 0,
    "ragged": 0,
    "checkpoint": 0,
    "triton_kernels": 0,
    "compiler": 0,
    "cpu_kernels": 1,
    "mla_source": 0,
    "cpu_mla": 2,
    "products": 2,
    "layers": 3,
    "triton_mla": 1,
    "hub_kernels": 0,
    "trials": 0,
    "hub": 0,
    "plain_attention": 2,
    "ops": 3,
    "drafter": 4,
    "fp8": 4,
    "fp8_checkpoint": 5,
    "attention": 5,
    "moe": 5,
    "precision": 6,
    "lora": 6,
    "decoder": 6,
    "paged": 6,
    "mtp": 7,
    "speculative": 7,
    "pretrained": 7,
    "objective": 8,
    "modeling_deepseek": 9,
}
PIP_ONLY = {"__init__", "adapters", "ema", "export", "load_balance", "scaling_laws", "schedules", "serve", "training"}
SHIPPED_MAY_NEED = {"torch", "transformers", "huggingface_hub", "safetensors"}
CONVERSION_NEEDS = {"filelock"}  # beside what is shipped

ENTRY_FILES = [PACKAGE / "configuration_deepseek.py", PACKAGE / "modeling_deepseek.py"]
SHIPPED = sorted({*ENTRY_FILES, *(Path(file) for entry in ENTRY_FILES for file in get_relative_import_files(entry))})

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

IMPORT_ALL = """
import modeling_deepseek

for name in modeling_deepseek.__all__:
    getattr(modeling_deepseek, name)
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
"""

# Collects all tests, runs none, and prints every loaded file of a folder that users copy from or run by hand.
COLLECT = """
import pathlib, sys
import pytest

code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"])
files = {pathlib.Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
for folder in ("examples", "benchmarks"):
    for file in sorted(f for f in files if f.is_relative_to(pathlib.Path(folder).resolve())):
        print("LOADED", file)
sys.exit(code)
"""


def module_id(path):
    return path.stem


def relative_imports_of_syntax(path):
    """The relative imports that Python sees, as (dots, module) pairs, wherever in the file they stand."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {(node.level, node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize("path", SHIPPED, ids=module_id)
def test_shipped_file_imports_only_from_lower_layers(path):
    assert path.stem in LAYERS, f"{path.name} ships to the Hub but has no layer"
    upward = [name for name in get_relative_imports(path) if LAYERS.get(name, 99) >= LAYERS[path.stem]]
    assert upward == []


@pytest.mark.parametrize("path", SHIPPED, ids=module_id)
def test_shipped_file_needs_no_further_package(path):
    assert set(get_imports(path)) - SHIPPED_MAY_NEED - sys.stdlib_module_names == set()


@pytest.mark.parametrize("path", SHIPPED, ids=module_id)
def test_every_relative_import_is_one_that_the_hub_client_follows(path):
    # The client reads the text with a regular expression; `from . import a`, `from .a.b import c` and
    # `from ..a import b` lead it to no file or to one that does not exist.
    odd = re.findall(r"^\s*(?:from\s+\.+\s+import|from\s+\.\.|from\s+\.\w+\.|import\s+\.).*", path.read_text(), re.M)
    assert odd == []
    assert relative_imports_of_syntax(path) == {(1, name) for name in get_relative_imports(path)}


@pytest.mark.parametrize("path", SHIPPED, ids=module_id)
def test_shipped_file_does_not_name_the_installed_package(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    assert [name for name in names if name.partition(".")[0] == "modeling_deepseek"] == []


def test_every_file_either_ships_or_is_pip_only():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    shipped = {path.stem for path in SHIPPED}
    assert shipped & PIP_ONLY == set()
    assert files - shipped - PIP_ONLY == set()


def test_package_is_flat():
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


@pytest.mark.parametrize(
    "path", [*sorted(PACKAGE.glob("*.py")), *sorted((ROOT / "conversion").glob("*.py"))], ids=lambda path: path.stem
)
def test_installed_file_imports_only_declared_dependencies(path):
    declared = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    assert set(get_imports(path)) - declared - {"modeling_deepseek"} - sys.stdlib_module_names == set()


def test_installation_brings_only_what_the_model_needs():
    assert "dynamic" not in PYPROJECT["project"]
    assert {
        Requirement(line).name for line in PYPROJECT["project"]["dependencies"]
    } == SHIPPED_MAY_NEED | CONVERSION_NEEDS


def test_listed_packages_are_the_folders_of_the_house():
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == ["modeling_deepseek", "modeling_deepseek.conversion"]
    assert setuptools["package-dir"] == {"modeling_deepseek.conversion": "conversion"}


def test_package_imports_without_triton_peft_accelerate():
    script = without("triton", "peft", "accelerate") + IMPORT_ALL
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_collecting_the_tests_loads_no_example_and_no_benchmark():
    result = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("LOADED")] == []
