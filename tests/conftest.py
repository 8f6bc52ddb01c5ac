import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one worker per core


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are the same in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pretrain():
    """examples/pretrain_tiny.py, as a module."""
    path = Path(__file__).parent.parent / "examples" / "pretrain_tiny.py"
    spec = importlib.util.spec_from_file_location("pretrain_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
