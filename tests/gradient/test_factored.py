"""Gradients known by their factors or rows: every product is that of the explicit matrix, which is never made."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from gradlr import tensors
from gradlr.gradient import Dense, OuterProduct, RowSparse, Sketched
from gradlr.layers import layer_op
from gradlr.params.kinds import plan_parameters
from gradlr.rules import Update

# name -> layer, shape of its input. Strides, dilations and paddings that leave a rest, kernels of one, and no tokens at all.
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear_vector": (lambda: nn.Linear(5, 4), (5,)),
    "linear_3d": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "linear_no_tokens": (lambda: nn.Linear(5, 4), (2, 0, 5)),
    "transformers": (lambda: Conv1D(4, 5), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 7)),
    "conv2d_pointwise": (lambda: nn.Conv2d(6, 4, 1, bias=False), (3, 6, 4, 4)),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 6, 6)),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 3)),
}
# Sums of at most a few hundred products in another order: some units in the last place of the largest.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
OVER_LAYERS = pytest.mark.parametrize("name", list(LAYERS))
OVER_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def traced(name, dtype):
    """(map, weight's gradient as m x n, output gradient, input, input's gradient, bias' gradient or None)."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    delta = torch.randn_like(y)
    y.backward(delta)
    (plan,) = [plan for plan in plan_parameters(layer) if plan.name == "weight"]
    gradient = plan.view.of(layer.weight.grad)
    bias = None if layer.bias is None else layer.bias.grad
    return layer_op(layer), layer, gradient, delta, x.detach(), x.grad, bias


@OVER_LAYERS
@OVER_DTYPES
def test_products_are_those_of_the_explicit_gradient(name, dtype):
    found, _, gradient, delta, x, *_ = traced(name, dtype)
    factored, (m, n) = OuterProduct(delta, x, found), gradient.shape
    right, left = torch.randn(n, 3, dtype=dtype), torch.randn(m, 2, dtype=dtype)
    assert factored.shape == gradient.shape and factored.dtype == dtype
    torch.testing.assert_close(factored @ right, gradient @ right, **TOLERANCE[dtype])
    torch.testing.assert_close(factored.mT @ left, gradient.mT @ left, **TOLERANCE[dtype])
    torch.testing.assert_close(factored.matrix, gradient, **TOLERANCE[dtype])
    assert bool(factored.is_finite())


@OVER_LAYERS
@OVER_DTYPES
def test_one_sided_products_need_the_projected_input_only(name, dtype):
    found, _, gradient, delta, x, *_ = traced(name, dtype)
    right = torch.linalg.qr(torch.randn(gradient.shape[1], 3, dtype=dtype)).Q
    projected = found.project(x, right)
    assert projected.numel() == 3 * delta.numel() // gradient.shape[0]  # r numbers a token
    sketched = Sketched(right, found.weight_grad_matmul(delta, projected))
    expected = gradient @ right @ right.mT
    torch.testing.assert_close(sketched.matrix, expected, **TOLERANCE[dtype])


@OVER_LAYERS
@OVER_DTYPES
def test_forward_and_the_other_gradients_are_those_of_the_layer(name, dtype):
    found, layer, gradient, delta, x, x_gradient, bias_gradient = traced(name, dtype)
    torch.testing.assert_close(found.forward(x, layer.weight, layer.bias), layer(x), **TOLERANCE[dtype])
    torch.testing.assert_close(found.input_gradient(delta, layer.weight, x.shape), x_gradient, **TOLERANCE[dtype])
    torch.testing.assert_close(found.weight_gradient(delta, x), layer.weight.grad, **TOLERANCE[dtype])
    if bias_gradient is not None:
        torch.testing.assert_close(found.bias_gradient(delta), bias_gradient, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
        nn.Conv1d(4, 4, 2, padding="same"),  # one more on the right than on the left
        nn.ConvTranspose2d(4, 4, 3),
        nn.Bilinear(4, 4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),  # attention reads its weight without calling it
        nn.Embedding(4, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_plain_linear_map_is_left_alone(layer):
    assert layer_op(layer) is None


def test_half_precision_products_are_wide():
    delta, x = torch.randn(64, 4).bfloat16(), torch.randn(64, 5).bfloat16()
    factored, right = OuterProduct(delta, x), torch.randn(5, 2)
    exact = delta.double().mT @ x.double() @ right.double()
    assert (factored @ right).dtype == torch.float32
    torch.testing.assert_close((factored @ right).double(), exact, rtol=1e-5, atol=1e-5)  # float32 sums of 64 exact products


def test_a_sum_that_overflows_is_not_taken_for_an_infinity():
    delta = torch.full((64, 4), 3e4).half()  # sums to 7.7e6, beyond float16
    assert bool(OuterProduct(delta, torch.ones(64, 3).half()).is_finite())
    assert not OuterProduct(delta * 10, torch.ones(64, 3).half()).is_finite()


# -- rows --------------------------------------------------------------------------------------------------------------


def rows_and_dense(ids, count=9, dtype=torch.float64):
    torch.manual_seed(0)
    ids = torch.tensor(ids, dtype=torch.int64)
    values = torch.randn(len(ids), 5, dtype=dtype)
    dense = torch.zeros(count, 5, dtype=dtype).index_add_(0, ids, values)
    return RowSparse.summed(ids, values, count), dense


@pytest.mark.parametrize("ids", [[], [3], [4, 1, 4, 4, 8, 1], [0, 0, 0], list(range(9))])
def test_rows_are_the_explicit_matrix(ids):
    rows, dense = rows_and_dense(ids)
    right, left = torch.randn(5, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    assert len(rows.rows) == len(set(ids))
    torch.testing.assert_close(rows.matrix, dense)
    torch.testing.assert_close(rows @ right, dense @ right)
    torch.testing.assert_close(rows.mT @ left, dense.mT @ left)
    torch.testing.assert_close(rows.row_energies(), dense.square().sum(1, keepdim=True))
    assert bool(rows.is_finite())


def test_rows_that_were_padded_are_the_same_matrix():
    """Where their number is not known without asking the device, the first row comes again with zeros."""
    rows, dense = rows_and_dense([4, 1, 4, 8])
    padded = RowSparse(torch.cat([rows.rows, rows.rows[:1]]), torch.cat([rows.values, torch.zeros(1, 5, dtype=torch.float64)]), 9)
    torch.testing.assert_close(padded.matrix, dense)
    torch.testing.assert_close(padded.row_energies(), dense.square().sum(1, keepdim=True))


@pytest.mark.parametrize(("more", "kind"), [([8, 1, 2], RowSparse), ([0, 1, 2, 3, 5, 6, 7], Dense)])
def test_rows_add_as_rows_while_that_is_smaller(more, kind):
    (one, dense_one), (other, dense_other) = rows_and_dense([4, 1, 4, 8]), rows_and_dense(more)
    total = one.add_(other)
    assert type(total) is kind
    torch.testing.assert_close(total.matrix, dense_one + dense_other)


def test_rows_and_a_dense_gradient_add_in_either_order():
    one, dense = rows_and_dense([4, 1, 4])
    other = torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(one.add_(Dense(other)).matrix, dense + other)
    one, _ = rows_and_dense([4, 1, 4])
    torch.testing.assert_close(Dense(other).add_(one).matrix, dense + other)


def test_the_lengths_of_a_heads_rows_are_those_of_the_explicit_gradient(monkeypatch):
    monkeypatch.setattr("gradlr.gradient.factors._BLOCK_NUMBERS", 12)  # two rows at a time
    delta, x = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    factored = OuterProduct(delta, x)
    torch.testing.assert_close(factored.row_energies(), factored.matrix.square().sum(1, keepdim=True))


class _Products(TorchDispatchMode):
    """Dtypes of the factors of all products that run under it."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.dtypes |= {one.dtype for one in args[-2:]}
        return func(*args, **(kwargs or {}))


def test_a_heads_gradient_is_made_in_half_precision_where_products_are_faster_so(monkeypatch):
    """Twice: its rows' lengths, and the update. The second is a kernel's, which is given both factors as they are."""
    traits = tensors.DeviceTraits(is_async=True, widest_float=torch.float64, has_half_products=True)
    monkeypatch.setitem(tensors._OVERRIDES, "cpu", traits)
    delta, x = torch.randn(7, 90).bfloat16(), torch.randn(7, 50).bfloat16()
    head, dense = OuterProduct(delta, x), delta.double().mT @ x.double()
    with _Products() as products:
        energies = head.row_energies()
    assert products.dtypes == {torch.bfloat16}
    # Without wide sums each entry of a row is rounded once: to 2^-9 of it.
    torch.testing.assert_close(energies.double(), dense.square().sum(1, keepdim=True), rtol=4e-3, atol=0)
    parts = head.scaled_rows(energies.rsqrt())
    assert parts["left"].dtype == parts["right"].dtype == torch.bfloat16
    torch.testing.assert_close(Update(**parts).direction().double(), dense * energies.double().rsqrt(), rtol=1e-5, atol=1e-6)


# -- what every operator can ------------------------------------------------------------------------------------------


def operators():
    torch.manual_seed(0)
    gradient = torch.randn(9, 5, dtype=torch.float64)
    right, left = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q for size in (5, 9))
    delta, x = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    convolution = traced("conv2d", torch.float64)
    return {
        "dense": Dense(gradient.clone()),
        "one_sided": Sketched.of(Dense(gradient), right),
        "two_sided": Sketched.of(Dense(gradient), right, left),
        "rows": rows_and_dense([4, 1, 4, 8])[0],
        "factored": OuterProduct(delta, x),
        "convolution": OuterProduct(convolution[3], convolution[4], convolution[0]),
    }


@pytest.mark.parametrize("name", list(operators()))
def test_its_norm_is_that_of_its_matrix(name):
    operator = operators()[name]
    torch.testing.assert_close(operator.squared_norm(), operator.matrix.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["dense", "one_sided", "two_sided", "rows"])
def test_what_may_wait_can_be_scaled(name):
    operator = operators()[name]
    expected = 0.25 * operator.matrix
    torch.testing.assert_close(operator.scaled(torch.tensor(0.25, dtype=torch.float64)).matrix, expected)


@pytest.mark.parametrize("name", ["linear", "linear_vector", "linear_3d", "linear_no_tokens", "transformers"])
def test_rows_made_on_demand_are_those_of_the_matrix_and_none_exceeds_the_bound(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    gradient = OuterProduct(torch.randn(*shape[:-1], 4, dtype=torch.float64), x, layer_op(layer))
    rows, bound = gradient.rows_on_demand()
    torch.testing.assert_close(rows[...], gradient.matrix)
    torch.testing.assert_close(rows[..., 1:3, :], gradient.matrix[1:3])
    doubled = rows.mapped(lambda place, block: 2 * block + place.start)
    torch.testing.assert_close(doubled[..., 1:3, :], 2 * gradient.matrix[1:3] + 1)
    assert gradient.matrix.square().sum(-1).max() <= bound * (1 + 1e-12)
    if len(gradient.factors() or ()) and x.numel():
        x.view(-1)[0] = torch.inf
        assert not gradient.rows_on_demand()[1].isfinite()
