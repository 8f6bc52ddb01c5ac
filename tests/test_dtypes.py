"""Which numbers this processor multiplies fast."""

import pytest
import torch

from modeling_deepseek import dtypes


def test_a_cast_to_the_same_dtype_is_the_tensor_itself():
    x = torch.randn(3)
    assert dtypes.cast(x, torch.float32) is x
    assert torch.equal(dtypes.cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_slow_on_a_cpu_that_has_no_instructions_for_them(dtype, monkeypatch):
    for slow in (True, False):
        monkeypatch.setattr(dtypes, "SLOW_ON_CPU", {dtype} if slow else set())
        assert dtypes.has_fast_gemm("cpu", dtype) is not slow
        assert dtypes.has_fast_gemm("cuda", dtype)
        assert dtypes.has_fast_gemm("cpu", torch.float32)
