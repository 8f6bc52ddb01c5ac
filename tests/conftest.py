import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are the same in every run, whatever ran before."""
    torch.manual_seed(0)
