"""Linear layers of few tokens in C: what they give, and what is left to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from modeling_deepseek import cpu_kernels, layers, products
from modeling_deepseek.layers import linear
from modeling_deepseek.products import plain_product
from tiny import tiny_model, tiny_tokens


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")


@pytest.fixture
def answers(monkeypatch):
    """Whether C answered, each time that it was asked."""
    asked = []

    def ask(*inputs):
        output = plain_product(*inputs)
        asked.append(output is not None)
        return output

    monkeypatch.setattr(layers, "plain_product", ask)
    monkeypatch.setattr(products, "kernels_fast", cpu_kernels.kernels_available)  # on any processor
    return asked


@torch.no_grad()
def met(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return linear(module, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 2), (1, 17), (5,), ()])
@pytest.mark.parametrize("rows,columns", [(1, 1), (40, 33), (7, 300)])
@torch.no_grad()
def test_a_linear_layer_is_that_of_pytorch(forced, answers, dtype, shape, rows, columns):
    torch.manual_seed(0)
    module, x = nn.Linear(columns, rows, bias=False).to(dtype), torch.randn(*shape, columns).to(dtype)
    output = linear(module, x)
    assert answers == [True] and output.dtype == dtype
    expected = F.linear(x.double(), module.weight.double())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance / 10)


@torch.no_grad()
def test_weights_and_states_that_lie_apart(forced, answers):
    module = nn.Linear(50, 6, bias=False)
    module.weight = nn.Parameter(torch.randn(6, 80)[:, 20:70])
    x = torch.randn(50, 4).T
    torch.testing.assert_close(linear(module, x), x @ module.weight.T, rtol=1e-5, atol=1e-5)
    module.weight = nn.Parameter(torch.randn(50, 6).T)
    torch.testing.assert_close(linear(module, x), x @ module.weight.T, rtol=1e-5, atol=1e-5)
    assert answers == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_the_released_sizes_take_up_to_12_tokens(answers, monkeypatch, dtype):
    monkeypatch.setattr(products, "multiplies_pairs", lambda: True)
    for size in ((2048, 3072), (7168, 576)):  # q_proj of V2-Lite, kv_a_proj_with_mqa of V3
        module = nn.Linear(*size, bias=False).to(dtype)
        for tokens in (1, 2, 12, 13):
            met(module, 1, tokens, size[0], dtype=dtype)
    met(nn.Linear(1024, 512, bias=False).to(dtype), 1, 1024, dtype=dtype)  # half a million: not worth a compiler
    v3 = [True, True, dtype == torch.float32, False]
    assert answers == [True, True, True, False, *v3]


def test_bf16_leaves_to_pytorch_what_is_slower_in_c(answers, monkeypatch):
    wide, narrow = (nn.Linear(width, 2**20 // width, bias=False).bfloat16() for width in (16384, 8192))
    monkeypatch.setattr(products, "multiplies_pairs", lambda: True)
    for tokens in (2, 3):
        met(wide, tokens, 16384, dtype=torch.bfloat16)
    met(narrow, 4, 8192, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "multiplies_pairs", lambda: False)
    for tokens in (1, 2):
        met(wide, tokens, 16384, dtype=torch.bfloat16)
    assert answers == [True, False, True, False, True]


def test_what_is_more_than_a_linear_layer_is_called(forced, answers):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def plain() -> nn.Linear:
        return nn.Linear(8, 8, bias=False)

    hooked, before, patched, watched = plain(), plain(), plain(), plain()
    watched.register_full_backward_hook(lambda *_: None)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    before.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    patched.forward = lambda x: x
    x = torch.randn(2, 8)
    with torch.no_grad():
        for module in (hooked, before, patched, watched, Doubled(8, 8, bias=False), nn.Linear(8, 8)):
            torch.testing.assert_close(linear(module, x), module(x), rtol=0, atol=0)
        seen, everywhere = plain(), []
        handle = register_module_forward_hook(lambda module, inputs, output: everywhere.append(module))
        try:
            linear(seen, x)
        finally:
            handle.remove()
        assert everywhere == [seen] and not any(answers)
        linear(seen, x)
    assert answers == [True]


def test_gradients_and_all_else_that_c_does_not_know_are_for_pytorch(forced, answers):
    module, x = nn.Linear(8, 8, bias=False), torch.randn(2, 8)
    linear(module, x).sum().backward()
    assert module.weight.grad is not None
    frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
    states = x.clone().requires_grad_()
    linear(frozen, states).sum().backward()
    torch.testing.assert_close(states.grad, frozen.weight.sum(0).expand(2, 8))
    with torch.no_grad():
        linear(module.double(), x.double())
        linear(module.half(), x.half())
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(module, x).dtype == torch.bfloat16
        linear(module.bfloat16(), x.bfloat16())
        module.float()
        torch.func.vmap(lambda row: linear(module, row))(x)
        linear(module, x[:0])
        with FakeTensorMode(allow_non_fake_inputs=True):
            linear(module, torch.randn(2, 8))
        compiled = torch.compile(lambda x: linear(module, x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
        with pytest.raises(RuntimeError, match="shapes"):
            linear(module, torch.randn(2, 9))
    assert sum(answers) == 1  # bf16
    assert linear(frozen, x).grad_fn is None and answers[-1]


@torch.no_grad()
def test_operations_that_somebody_changes_are_those_of_pytorch(forced, answers, monkeypatch):
    class Zeros(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            return output * 0 if func is F.linear else output

    module, x = nn.Linear(8, 8, bias=False), torch.randn(2, 8)
    with Zeros():
        assert not linear(module, x).any()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert linear(module, x) is x
    assert not any(answers)
    with torch.device("meta"):  # a mode too, of which C need not know
        torch.testing.assert_close(linear(module, x), module(x))
    assert answers[-1]


@torch.no_grad()
def test_what_is_no_memory_of_numbers_is_for_pytorch(forced, answers):
    class Own(torch.Tensor):
        pass

    module, x = nn.Linear(8, 6, bias=False), torch.randn(2, 8)
    expected = module(x)
    torch.testing.assert_close(linear(module, torch._neg_view(x)), -expected)
    torch.testing.assert_close(linear(module, x.as_subclass(Own)).as_subclass(torch.Tensor), expected)
    weight = module.weight.detach()
    for other in (torch._neg_view(weight), weight.to_sparse_csr(), weight.clone().as_subclass(Own), weight[0].clone()):
        module.weight = nn.Parameter(other, requires_grad=False)
        torch.testing.assert_close(linear(module, x), module(x))
    module.weight = nn.Parameter(weight)
    with pytest.raises(RuntimeError):
        linear(module, torch.tensor(1.0))
    assert not any(answers)


def test_a_trace_of_symbols_is_one_of_the_module():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(1024, 1024, bias=False)

        def forward(self, x):
            return linear(self.proj, x)

    traced = torch.fx.symbolic_trace(Layer())
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def test_settings_that_cannot_be(monkeypatch):
    module = nn.Linear(8, 8, bias=False)
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "fast")
    with pytest.raises(ValueError, match="'auto', 'c' or 'torch', got 'fast'"):
        met(module, 1, 8)
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "torch")
    monkeypatch.setattr(products, "products", lambda *_: pytest.fail("C was asked"))
    met(module, 1, 8)
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    monkeypatch.setattr(products, "kernels_available", lambda: False)
    with pytest.raises(ValueError, match="C compiler"):
        met(module, 1, 8)


def test_without_a_compiler_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_library", lambda: None)
    module, x = nn.Linear(2048, 512, bias=False), torch.randn(1, 2048)
    with torch.no_grad():
        torch.testing.assert_close(linear(module, x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llm", "v2", "v3"])
def test_a_model_generates_the_same_with_all_its_layers_in_c(answers, monkeypatch, family):
    model = tiny_model(family).eval()
    ids = tiny_tokens(model.config, 2, 7)
    wanted = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(ids, **wanted)
    assert not answers
    monkeypatch.setattr(products, "PLAIN_PRODUCT", "c")
    found = model.generate(ids, **wanted)
    biased = sum(type(module) is nn.Linear and module.bias is not None for module in model.modules())
    assert sum(answers) > 6 * (model.config.num_hidden_layers * 5 - biased)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
