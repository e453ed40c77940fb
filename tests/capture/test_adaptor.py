"""Capture inside a Linear's backward: the same products, the same training, and no weight gradient anywhere."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import attached, mlp, regression, train
from torch import nn
from transformers.pytorch_utils import Conv1D

import gradlr
from gradlr import tensors
from gradlr.apps.bench.memory import peak_bytes
from gradlr.capture.layer_swap import SwappedLayer
from gradlr.gradient import Dense, OuterProduct
from gradlr.rules import LowRankPolar

# The layers here are so small that hooks would cost less.
pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")

PLAIN = {"rule": LowRankPolar(residual=0)}


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


class Recorder(gradlr.rules.LowRankPolar):
    """The default rule, keeping the products that it was handed."""

    def __init__(self):
        super().__init__(residual=0)
        self.seen = []

    def update(self, gradient, state, settings):
        m, n = gradient.shape
        like = {"dtype": gradient.dtype}
        self.seen.append((type(gradient), gradient @ torch.eye(n, **like), gradient.mT @ torch.eye(m, **like)))
        return super().update(gradient, state, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (2, 0, 5)])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_products_and_gradients_are_those_of_the_explicit_ones(dtype, has_bias, shape, needs_input_gradient):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4, bias=has_bias, dtype=dtype), torch.randn(shape, dtype=dtype, requires_grad=needs_input_gradient)
    plain = copy.deepcopy(layer)
    expected = torch.autograd.grad(plain(x).pow(3).sum(), [plain.weight, *([x] if needs_input_gradient else [])])
    rule = Recorder()
    _, tracker, opt = attached(layer, rule=rule, capture="adaptor")
    tracker(layer(x).pow(3).sum()).backward()
    ((kind, products, transposed),) = rule.seen
    # Sums of a few products in another order: a few units in the last place.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert kind is OuterProduct
    torch.testing.assert_close(products, expected[0], **tolerance)
    torch.testing.assert_close(transposed, expected[0].mT, **tolerance)
    if needs_input_gradient:
        torch.testing.assert_close(x.grad, expected[1], **tolerance)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("width", [16, 64])  # where the gradient itself would wait in step(), and where a sketch does
def test_training_is_that_of_hook_capture_without_residual(apply, width):
    results = []
    for capture in ("hook", "adaptor"):
        model, tracker, opt = attached(mlp(width, 3, dtype=torch.float64), capture=capture, apply=apply, **PLAIN)
        losses = train(model, opt, tracker, 10)
        results.append((losses, weights(model)))
    # float64; ten steps through eigenvectors of r x r matrices.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=0)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def twice(layer):
    return lambda x: layer(torch.tanh(layer(x)))


def test_a_layer_used_twice_needs_step_and_is_right_there():
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    x = torch.randn(8, 16, dtype=torch.float64)
    results = []
    for capture in ("hook", "adaptor"):
        model = copy.deepcopy(layer)
        _, tracker, opt = attached(model, capture=capture, apply="step", rank=16, momentum_rank=16, **PLAIN)
        tracker(twice(model)(x).square().mean()).backward()
        opt.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)

    _, tracker, opt = attached(layer, capture="adaptor")
    with pytest.raises(gradlr.BackwardError, match='used a second time.*apply="step"'):
        tracker(twice(layer)(x).square().mean()).backward()


def test_autocast_computes_as_before_and_keeps_the_products_wide():
    x, y = regression(16, count=16)
    results = []
    for capture in ("hook", "adaptor"):
        model, tracker, opt = attached(mlp(), capture=capture, **PLAIN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x), y)
        tracker(loss).backward()
        results.append((loss.item(), model[4].weight.detach().clone()))
    assert results[0][0] == results[1][0]
    # The hook sees a gradient that was rounded to bfloat16 (2^-8), the adaptor does not round it; a step is at most lr x scale.
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0.25 * 1e-2 * 0.2 * 4)
    assert all(value.dtype == torch.float32 for value in opt.state[model[4].weight].values() if value.ndim)


def test_the_module_stays_what_it_was():
    layer = nn.Linear(8, 8)
    keys, hooks = list(layer.state_dict()), []
    layer.register_forward_hook(lambda *_: hooks.append(1))
    _, tracker, opt = attached(layer, capture="adaptor")
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, SwappedLayer)
    assert list(layer.state_dict()) == keys
    tracker(layer(torch.randn(4, 8)).square().mean()).backward()
    assert hooks == [1]
    opt.detach()
    assert type(layer) is nn.Linear
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_an_ordinary_linear(copy_of):
    layer = nn.Linear(8, 8)
    _, tracker, opt = attached(layer, capture="adaptor")
    copied = copy_of(layer)
    assert type(copied) is nn.Linear
    copied(torch.randn(4, 8)).sum().backward()
    assert copied.weight.grad is not None


def test_no_graph_no_capture():
    layer = nn.Linear(8, 8)
    _, tracker, opt = attached(layer, capture="adaptor")
    with torch.no_grad():
        assert not layer(torch.randn(4, 8)).requires_grad


def test_auto_takes_the_adaptor_where_it_costs_less():
    layers = {"large": nn.Linear(64, 64), "small": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3), "table": nn.Embedding(9, 4)}
    model = nn.ModuleDict(layers)
    _, tracker, opt = attached(model, capture="auto", rank=8)
    captures = {record.plan.name: record.capture for record in opt.records}
    assert captures.pop("large.weight") == "adaptor"  # 2 · 8 · 128 < 64 · 64
    assert captures.pop("table.weight") == "rows"
    assert set(captures.values()) == {"hook"}
    assert "adaptor" in repr(opt)


@pytest.mark.parametrize(
    ("dtype", "captures"),
    [
        (torch.float32, {"linear": "adaptor", "conv": "adaptor"}),
        (torch.bfloat16, {"linear": "adaptor", "conv": "hook"}),  # a convolution's products are made in float32
        (torch.float16, {"linear": "hook", "conv": "hook"}),  # and so are all of float16
    ],
)
def test_auto_counts_what_precision_costs(monkeypatch, dtype, captures):
    """Where products in half precision are faster, autograd makes the gradient with those."""
    fast = tensors.DeviceTraits(is_async=True, widest_float=torch.float64, has_half_products=True)
    for traits in (fast, fast._replace(has_half_products=False)):
        monkeypatch.setitem(tensors._OVERRIDES, "cpu", traits)
        model = nn.ModuleDict({"linear": nn.Linear(64, 64, bias=False), "conv": nn.Conv1d(64, 64, 1, bias=False)}).to(dtype)
        _, tracker, opt = attached(model, capture="auto", rank=8)  # 2 · 8 · 128 < 64 · 64 < 8 times that
        expected = captures if traits is fast else dict.fromkeys(captures, "adaptor")
        assert {record.plan.name.removesuffix(".weight"): record.capture for record in opt.records} == expected


def test_a_rank_that_precision_makes_slow_is_told(monkeypatch):
    traits = tensors.DeviceTraits(is_async=True, widest_float=torch.float64, has_half_products=True)
    monkeypatch.setitem(tensors._OVERRIDES, "cpu", traits)
    with pytest.warns(
        gradlr.GradlrWarning, match=r"takes 8 times 2r\(m \+ n\), since they are in float32, = 16,384 .*rank of 2 at"
    ):
        attached(nn.Conv1d(64, 64, 1).bfloat16(), capture="adaptor", rank=8)


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_a_lost_optimizer_is_told_and_a_new_one_takes_over(capture):
    model, tracker, opt = attached(capture="adaptor")
    x, y = regression(16, count=16)
    del opt
    gc.collect()
    with pytest.raises(gradlr.AttachError, match="Keep it in a variable"):
        tracker(nn.functional.mse_loss(model(x), y)).backward()
    model.zero_grad()
    _, tracker, opt = attached(model, capture=capture)
    assert (isinstance(model[0], SwappedLayer)) == (capture == "adaptor")
    train(model, opt, tracker, 2)


def test_a_dropped_model_frees_everything():
    model, tracker, opt = attached(capture="adaptor")
    train(model, opt, tracker, 1)
    references = [weakref.ref(thing) for thing in (model, model[0], model[0].weight, opt, opt.state[model[0].weight]["P"])]
    del model, opt
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_gradients_of_other_things_train_nothing(apply):
    """Saliency, adversarial inputs and gradient norms: autograd.grad and backward(inputs=...) leave the weights alone."""
    model, tracker, opt = attached(mlp(dtype=torch.float64), capture="adaptor", apply=apply)
    plain = copy.deepcopy(model)
    x, y = regression(16, count=16, dtype=torch.float64)
    x.requires_grad_(True)
    before = weights(model)
    loss, expected = (nn.functional.mse_loss(net(x), y) for net in (model, plain))
    tracker(loss)
    for inputs, plain_inputs in ((x, x), ([*model.parameters()], [*plain.parameters()])):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        for one, other in zip(found, torch.autograd.grad(expected, plain_inputs, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    loss.backward(inputs=[x], retain_graph=True)
    opt.zero_grad() if apply == "step" else None
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_a_gradient_penalty_differentiates_twice(capture):
    results = []
    for kind in ("hook", capture):
        options = {"capture": kind, "apply": "step", "rank": 16, "momentum_rank": 16, **PLAIN}
        model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), **options)
        x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        for _ in range(2):
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            tracker(model(x).square().mean() + slope.square().mean()).backward()
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


# Torch's own decompositions for jvp use the deprecated torch.jit.script; the category of its warning depends on the version.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_function_transforms_see_an_ordinary_linear():
    model, tracker, opt = attached(capture="adaptor")
    x = torch.randn(5, 16)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()


def test_a_float64_model_stays_float64_under_autocast():
    model, tracker, opt = attached(mlp(dtype=torch.float64), capture="adaptor")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(4, 16, dtype=torch.float64)).square().mean()
    tracker(loss).backward()


def test_an_unknown_capture():
    with pytest.raises(gradlr.ArgumentError, match="capture='magic'"):
        gradlr.attach(mlp(), gradlr.LossTracker(), capture="magic")


def test_the_weight_gradient_never_exists():
    layer = nn.Linear(512, 512, bias=False)
    x = torch.randn(8, 512)
    _, tracker, opt = attached(layer, capture="adaptor", rank=4, momentum_rank=2)
    tracker(layer(x).square().mean()).backward()
    peak = peak_bytes(lambda: tracker(layer(x).square().mean()).backward())
    assert peak < 512 * 512 * 4 / 4  # activations and products of rank 4 only


def test_factored_agrees_with_dense():
    delta, x = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    factored, dense = OuterProduct(delta, x), Dense(delta.mT @ x)
    right, left = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert factored.shape == dense.shape
    torch.testing.assert_close(factored @ right, dense @ right)
    torch.testing.assert_close(factored.mT @ left, dense.mT @ left)
    torch.testing.assert_close(factored.matrix, dense.matrix)
    assert bool(factored.is_finite())
    assert not OuterProduct(delta * float("nan"), x).is_finite()


CHANGES = {
    "stride": ("1", "stride", (2,)), "stride as a number": ("1", "stride", 2), "dilation": ("1", "dilation", (2,)),
    "padding": ("1", "padding", (2,)), "padding_mode": ("1", "padding_mode", "circular"),
    "max_norm": ("0", "max_norm", 0.5), "padding_idx": ("0", "padding_idx", 3),
    "scale_grad_by_freq": ("0", "scale_grad_by_freq", True),
}  # fmt: skip


@pytest.mark.parametrize("capture", ["adaptor", "one_sided"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_what_was_changed_in_a_layer_since_attaching_is_followed(name, capture):
    class Transposed(nn.Module):
        def forward(self, x):
            return x.mT

    ids, results = torch.randint(0, 8, (4, 9)), []
    for used in ("hook", capture):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(8, 6), nn.Conv1d(6, 18, 3, padding=1)).double()
        model.insert(1, Transposed())
        # At full rank the projection of the one-sided way is the gradient itself.
        _, tracker, opt = attached(model, capture=used, rank=18, momentum_rank=18, **PLAIN)
        place, attribute, value = CHANGES[name]
        setattr(model[2 * int(place)], attribute, value)
        for _ in range(3):
            tracker(model(ids).pow(3).sum()).backward()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        # The same numbers summed in another order, and three orthogonalizations.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("capture", ["adaptor", "one_sided"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Embedding", "Conv1D"])
def test_the_input_may_be_given_by_the_layers_own_name_for_it(kind, capture):
    arguments = (8, 8, 3) if kind == "Conv1d" else (8, 8)
    layer = Conv1D(8, 8) if kind == "Conv1D" else getattr(nn, kind)(*arguments)
    x = torch.arange(8) if kind == "Embedding" else torch.randn(3, 8, 8)
    _, tracker, opt = attached(layer, capture=capture)
    expected, (name, stranger) = layer(x), ("x", "input") if kind == "Conv1D" else ("input", "x")
    assert layer.weight is opt.records[0].plan.parameter and expected.grad_fn is not None
    torch.testing.assert_close(layer(**{name: x}), expected, rtol=0, atol=0)
    assert type(layer(**{name: x}).grad_fn) is type(expected.grad_fn)
    for positional, named in (((x,), {name: x}), ((), {stranger: x}), ((x, x), {}), ((), {})):
        with pytest.raises(TypeError, match="argument"):
            layer(*positional, **named)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("capture", ["adaptor", "one_sided"])
def test_nested_inputs_are_left_to_hooks(capture, layout):
    layer, parts = nn.Linear(8, 6, dtype=torch.float64), [torch.randn(count, 8, dtype=torch.float64) for count in (2, 5)]
    plain = copy.deepcopy(layer)
    _, tracker, opt = attached(layer, capture=capture, apply="step")
    for module, show in ((layer, tracker), (plain, lambda loss: loss)):
        show(module(torch.nested.nested_tensor(parts, layout=layout)).to_padded_tensor(0.0).square().sum()).backward()
    torch.testing.assert_close(opt.pending.gradients.get(0).matrix, plain.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
def test_a_weight_that_is_frozen_after_the_forward_gets_no_gradient(capture):
    """As in torch, where autograd then accumulates nothing."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    _, tracker, opt = attached(layer, capture=capture)
    before, loss = layer.weight.detach().clone(), tracker(layer(x).sum())
    layer.weight.requires_grad_(False)
    loss.backward()
    assert torch.equal(layer.weight, before) and layer.weight.grad is None
    assert opt.state[layer.bias]["step"] == 1 and x.grad is not None
