"""The loss in pieces: that of transformers, without logits that are all there at once."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from modeling_deepseek import loss
from modeling_deepseek.fp8 import FP8Linear, quantize
from test_training_memory import BALANCED, LiveMemory, assert_same, step
from tiny import tiny_model, tiny_tokens

LABELS = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(1))
LABELS[0, :4], LABELS[2, 7:] = -100, -100
CASES = {
    "mean": (LABELS, {}),
    "items": (LABELS, dict(num_items_in_batch=torch.tensor(40))),
    "items as a number": (LABELS, dict(num_items_in_batch=40)),
    "other index": (LABELS.masked_fill(LABELS == -100, 5), dict(ignore_index=5)),
    "shifted labels": (None, dict(shift_labels=LABELS, num_items_in_batch=7)),
    "arguments of others": (LABELS, dict(some_keyword=1)),
}


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr(loss, "LOSS_PIECE_CPU", 97 * 4)  # 4 of 33 rows
    monkeypatch.setattr(loss, "LOSS_ROWS", 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("labels", "options"), CASES.values(), ids=CASES)
def test_the_loss_is_that_of_transformers(labels, options, dtype, pieces):
    logits = (5 * torch.randn(3, 11, 97)).to(dtype)
    found = []
    for function in (ForCausalLMLoss, loss.causal_lm_loss):
        own = logits.clone().requires_grad_()
        value = function(own, labels, 97, **options)
        (3 * value).backward()
        found.append((value.detach(), own.grad))
    assert found[1][0].dtype == torch.float32
    assert found[1][1].dtype == dtype
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    one_ulp = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found[1][1], found[0][1], rtol=one_ulp, atol=1e-8)


def test_a_batch_without_targets_has_the_loss_of_transformers():
    logits, labels = torch.randn(1, 5, 97), torch.full((1, 5), -100)
    assert ForCausalLMLoss(logits, labels, 97).isnan()
    assert loss.causal_lm_loss(logits, labels, 97).isnan()
    assert loss.causal_lm_loss(logits, labels, 97, num_items_in_batch=3) == 0


@pytest.mark.parametrize("options", [{}, dict(num_items_in_batch=0), dict(num_items_in_batch=torch.tensor(0))])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_a_batch_without_targets_moves_no_weight(family, options):
    depth = dict(num_nextn_predict_layers=1) if family == "v3" else dict(aux_loss_alpha=0.1)
    for training_logits in (True, False):
        model = tiny_model(family, training_logits=training_logits, **depth).train()
        ids = tiny_tokens(model.config)
        model(ids, labels=torch.full_like(ids, -100), use_cache=False, **options).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_logits_without_a_target_do_not_matter(value):
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 6, 11), torch.randint(1, 11, (1, 6))
    labels[0, 3], logits[0, 2] = -100, value
    logits[0, :, 0] = float("-inf")  # a token that is suppressed
    found = []
    for function in (loss.causal_lm_loss, ForCausalLMLoss):
        own = logits.clone().requires_grad_()
        value = function(own, labels, 11)
        found.append((value, *torch.autograd.grad(value, own)))
    (loss_of_ours, ours), (loss_of_theirs, theirs) = found
    torch.testing.assert_close(loss_of_ours, loss_of_theirs)
    assert not ours[0, 2].any()  # where transformers' own may have NaN
    seen = torch.arange(6) != 2
    torch.testing.assert_close(ours[:, seen], theirs[:, seen])


def test_a_graph_that_is_dropped_leaves_nothing():
    model = tiny_model("v3", num_nextn_predict_layers=1).train()
    model.gradient_checkpointing_enable({"mode": "selective"})
    ids, left = tiny_tokens(model.config), []
    for _ in range(3):
        model(ids, labels=ids, use_cache=False).loss  # noqa: B018
        gc.collect()
        left.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert left[1] == left[2]


def test_a_loss_function_of_whole_rows_is_the_main_loss_alone():
    def own(logits, labels, vocab_size, **kwargs):
        return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

    expected = None
    for function in (None, own):
        model = tiny_model("v3", num_nextn_predict_layers=1).train()
        if function:
            model.loss_function = function
        ids = tiny_tokens(model.config)
        output = model(ids, labels=ids, use_cache=False)
        expected = output if expected is None else expected
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.mtp_loss, expected.mtp_loss)
    model.config.training_logits = False
    with pytest.raises(ValueError, match="takes no shift_labels.*set training_logits to True"):
        model(ids, labels=ids, use_cache=False)


def test_logits_to_keep_mean_the_same_in_pieces():
    found = []
    for training_logits in (True, False):
        model = tiny_model("llm", training_logits=training_logits).train()
        ids = tiny_tokens(model.config)
        found.append(model(ids, labels=ids[:, -3:], logits_to_keep=3, use_cache=False).loss)
    torch.testing.assert_close(*found)


def test_a_label_outside_of_the_vocabulary_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss.causal_lm_loss(torch.randn(1, 5, 97), torch.full((1, 5), 97), 97)


@pytest.mark.parametrize("options", [{}, dict(num_items_in_batch=31), dict(ignore_index=7)], ids=str)
def test_without_training_logits_loss_and_gradients_are_the_same(options, pieces):
    model = tiny_model("v3", num_nextn_predict_layers=1, **BALANCED)
    expected = step(model, **options)
    other = tiny_model("v3", num_nextn_predict_layers=1, training_logits=False, **BALANCED)
    assert_same(step(other, **options), expected, rtol=1e-5, atol=1e-6)
    ids = tiny_tokens(model.config)
    assert other(ids, labels=ids).logits is None
    assert other(ids).logits.shape == other.eval()(ids, labels=ids).logits.shape == (2, 10, 97)


def test_a_loss_function_that_was_set_is_called(monkeypatch):
    asked = []

    def ours(logits, labels, shift_labels=None, **kwargs):
        asked.append(logits)
        return logits.float().square().mean()

    model = tiny_model("v3").train()
    ids = tiny_tokens(model.config)
    assert model.loss_function is loss.causal_lm_loss
    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", ours)
    output = model(ids, labels=ids, use_cache=False)
    assert asked[-1] is output.logits
    monkeypatch.undo()
    model.loss_function = ForCausalLMLoss
    assert model.loss_function is ForCausalLMLoss
    model.loss_function = ours
    output = model(ids, labels=ids, use_cache=False)
    assert asked[-1] is output.logits
    assert output.loss == output.logits.square().mean()
    model.config.training_logits = False
    model(ids, labels=ids, use_cache=False)
    assert asked[-1].shape == (20, 97)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_all_there_in_fp32(dtype, pieces):
    logits = torch.randn(40, 97).to(dtype).requires_grad_()
    with LiveMemory() as memory:
        loss.causal_lm_loss(logits, None, 97, shift_labels=torch.ones(40, dtype=torch.long)).backward()
    sizes = [size for _, size in memory.made if size >= 2 * logits.numel()]
    assert sizes == [logits.nbytes] * 2  # the logits themselves, in a view, and their gradient


@pytest.mark.parametrize(
    ("tokens", "kept"), [(23, 0), (96, 48 * 97 * 4)], ids=["few tokens", "more than the head is wide"]
)
def test_without_training_logits_less_is_kept(tokens, kept, pieces):
    """Of many tokens the gradient of the head is kept, which is smaller than their logits."""
    saved = step(tiny_model("v3"), tokens=tokens)[2] - step(tiny_model("v3", training_logits=False), tokens=tokens)[2]
    assert saved > (2 * tokens * 97 * 4 - kept) * 0.7


# --- gradients that are made with the loss -------------------------------------------------------------------------------


def states_and_weight(rows=33, width=16, vocabulary=97, dtype=torch.float32, learns=True):
    """`[1, N, d]`, `[V, d]` and targets `[1, N]`, two of which are none."""
    random = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*shape, generator=random) for shape in ((1, rows, width), (vocabulary, width)))
    targets = torch.randint(vocabulary, (1, rows), generator=random)
    targets[0, 3:5] = -100
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(learns), targets


def gradients_of(value: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [value.detach(), *torch.autograd.grad(3 * value, [tensor for tensor in tensors if tensor.requires_grad])]


def by_transformers(states, weight, targets, items, dtype=None, **options):
    states, weight = (
        tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad) for tensor in (states, weight)
    )
    value = ForCausalLMLoss(linear(states, weight), None, len(weight), items, shift_labels=targets, **options)
    return gradients_of(value, states, weight)


@pytest.mark.parametrize("items", [31, torch.tensor(40)], ids=str)
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("options", [{}, dict(ignore_index=7)], ids=str)
def test_gradients_made_with_the_loss_are_those_of_transformers(options, learns, items, pieces):
    states, weight, targets = states_and_weight(learns=learns)
    if options:
        targets = targets.masked_fill(targets == -100, 7)
    found = gradients_of(loss.loss_of_weight(weight, states, targets, items, **options), states, weight)
    for own, expected in zip(found, by_transformers(states, weight, targets, items, **options), strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_made_with_the_loss_in_bf16(autocast, pieces):
    states, weight, targets = states_and_weight(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss.loss_of_weight(weight, states, targets, 31)
        theirs = ForCausalLMLoss(linear(states, weight), None, 97, 31, shift_labels=targets)
    found, theirs = gradients_of(value, states, weight), gradients_of(theirs, states, weight)
    assert [tensor.dtype for tensor in found] == [torch.float32, states.dtype, weight.dtype]
    for own, other, exact in zip(
        found, theirs, by_transformers(states, weight, targets, 31, torch.float32), strict=True
    ):
        assert (own - exact).norm() < 1.5 * (other - exact).norm() + 1e-3 * exact.norm()


def test_the_wide_vocabulary_of_deepseek_v3():
    states, weight, targets = states_and_weight(64, 64, 129280)
    found = gradients_of(loss.loss_of_weight(weight, states, targets, 62), states, weight)
    for own, expected in zip(found, by_transformers(states, weight, targets, 62), strict=True):
        assert (own - expected).norm() < 3e-6 * expected.norm()


def test_a_backward_pass_may_be_repeated():
    states, weight, targets = states_and_weight()
    value = loss.loss_of_weight(weight, states, targets, 31)
    first = torch.autograd.grad(value, (states, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, (states, weight))))


def test_rows_without_a_target_have_no_part_in_the_gradients_made_with_the_loss():
    states, weight, targets = states_and_weight()
    for items in (0, torch.tensor(0), 5):
        value = loss.loss_of_weight(weight, states, torch.full_like(targets, -100), items)
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, (states, weight)))
    weight = weight.detach()
    expected = torch.autograd.grad(loss.loss_of_weight(weight, states, targets, 31), states)[0]
    broken = torch.where(torch.arange(33)[:, None] == 4, float("nan"), states.detach()).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(loss.loss_of_weight(weight, broken, targets, 31), broken)[0], expected
    )


def test_the_gradient_of_a_weight_in_bf16_is_as_good_after_many_pieces(pieces):
    states, weight, targets = states_and_weight(4000, dtype=torch.bfloat16)
    found = gradients_of(loss.loss_of_weight(weight, states, targets, 3998), states, weight)
    theirs = gradients_of(ForCausalLMLoss(linear(states, weight), None, 97, 3998, shift_labels=targets), states, weight)
    exact = by_transformers(states, weight, targets, 3998, torch.float32)
    for own, other, value in zip(found, theirs, exact, strict=True):
        assert (own - value).norm() < 1.5 * (other - value).norm() + 1e-5 * value.norm()


@pytest.mark.parametrize("form", ["kept logits", "with the loss"])
def test_a_second_derivative_is_refused(form):
    states, weight, targets = states_and_weight()
    if form == "with the loss":
        value = loss.loss_of_weight(weight, states, targets, 31)
    else:
        value = loss.causal_lm_loss(linear(states, weight), None, 97, 31, shift_labels=targets)
    with pytest.raises(RuntimeError, match="no second derivative.*ForCausalLMLoss"):
        torch.autograd.grad(value, weight, create_graph=True)


@pytest.mark.parametrize("number", [33 + 9, 33 - 1, 2 * 33])
def test_targets_that_are_not_as_many_as_states_are_an_error(number, pieces):
    model = tiny_model("llm", training_logits=False).train()
    ids = tiny_tokens(model.config, 2, 30)
    targets = torch.ones(2, number, dtype=torch.long)
    with pytest.raises(ValueError):
        model(ids, labels=ids, shift_labels=targets, num_items_in_batch=60, use_cache=False)


@pytest.mark.parametrize("case", ["no gradient", "few tokens", "fp16", "two dtypes"])
def test_what_has_its_gradients_made_later(case):
    states, weight, targets = states_and_weight(
        15 if case == "few tokens" else 33, dtype=torch.float16 if case == "fp16" else torch.float32
    )
    states = states.detach().bfloat16() if case == "two dtypes" else states
    with torch.set_grad_enabled(case != "no gradient"):
        assert loss.loss_of_weight(weight, states, targets, 31) is None
    if case == "few tokens":  # the gradient of a weight that learns not is not kept
        assert loss.loss_of_weight(weight.detach(), states, targets, 13) is not None


@pytest.mark.parametrize("wrap", ["plain", "hook", "backward hook", "adapter", "sequential", "fp8"])
def test_a_head_that_is_more_than_its_weight_is_called(wrap):
    """Tokens are as many as the head is wide, those of the MTP layer one fewer per row."""
    expected = model = tiny_model("v3", num_nextn_predict_layers=1).train()
    other = tiny_model("v3", num_nextn_predict_layers=1, training_logits=False).train()
    if wrap == "adapter":
        config = LoraConfig(r=2, target_modules=["lm_head", "q_a_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        expected = get_peft_model(model, config).train()
        torch.manual_seed(0)
        other = get_peft_model(other, config).train()
    if wrap == "sequential":
        model.lm_head, other.lm_head = (torch.nn.Sequential(each.lm_head) for each in (model, other))
    if wrap == "fp8":
        quantized = quantize(model.lm_head.weight.detach(), (16, 16))
        model.lm_head, other.lm_head = (FP8Linear(*quantized, (16, 16), None) for _ in range(2))
    head, called = other.lm_head if wrap != "adapter" else other.base_model.model.lm_head, []
    if wrap == "hook":
        for each in (model.lm_head, head):
            each.register_forward_hook(lambda module, args, output: called.append(module) or 2 * output)
    if wrap == "backward hook":
        for each in (model.lm_head, head):
            each.register_full_backward_hook(
                lambda module, entering, leaving: called.append(module) or (2 * entering[0],)
            )
    ids = tiny_tokens(model.config, 2, 30)
    found = []
    for each in (expected, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "fp8"):
            output = each(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        found.append((output.loss, output.mtp_loss, [parameter.grad for parameter in each.parameters()]))
    (value, mtp, gradients), (other_value, other_mtp, other_gradients) = found
    torch.testing.assert_close(value, other_value)
    torch.testing.assert_close(mtp, other_mtp)
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-6)
    assert (head in called) == ("hook" in wrap)


def test_an_fp64_model_stays_in_fp64_under_autocast():
    found = []
    for training_logits in (True, False):
        model = tiny_model("llm", training_logits=training_logits).double().train()
        ids = tiny_tokens(model.config, 2, 30)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(ids, labels=ids, use_cache=False).loss)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_compiled_model_without_training_logits(depth):
    model = tiny_model("v3", training_logits=False, num_nextn_predict_layers=depth).train()
    ids, found = tiny_tokens(model.config, 2, 30), []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        value = run(input_ids=ids, labels=ids, use_cache=False).loss
        value.backward()
        found.append((value, model.lm_head.weight.grad.clone()))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_logits_to_keep_may_be_a_mask():
    found = []
    for training_logits in (True, False):
        model = tiny_model("llm", training_logits=training_logits).train()
        ids = tiny_tokens(model.config, 2, 30)
        kept = torch.arange(60).view(2, 30) % 3 > 0
        options = dict(logits_to_keep=kept, shift_labels=ids.roll(-1, 1)[kept], num_items_in_batch=40)
        found.append(model(ids, labels=ids, use_cache=False, **options).loss)
    torch.testing.assert_close(*found)


def test_logits_that_nobody_asked_for_are_made_once(monkeypatch):
    """More tokens than the head is wide: neither of its two losses calls it, or computes its logits again."""
    asked = []
    monkeypatch.setattr("modeling_deepseek.objective.loss_of_states", lambda *args, **kwargs: asked.append(args))
    model = tiny_model("v3", num_nextn_predict_layers=1, training_logits=False).train()
    ids = tiny_tokens(model.config, 2, 30)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert asked == []
    assert model.lm_head.weight.grad.any()


def test_no_tokens_have_no_loss():
    """As a depth of MTP has none in a text of one token."""
    states, weight, targets = states_and_weight()
    states = states[:, :0]
    value = loss.loss_of_weight(weight.detach(), states, targets[:, :0], torch.tensor(1))
    assert value == 0
    assert torch.autograd.grad(value, states)[0].shape == (1, 0, 16)
