"""Gradients as operators: each is the explicit matrix that its docstring names."""

import pytest
import torch
from shapes import MATRICES, matrix

from gradlr.errors import ShapeError
from gradlr.gradient import Dense, Sketched

NAMES = list(MATRICES)
SKETCHES = ["one-sided", "two-sided"]
TOLERANCE = 1e-12  # float64 rounding of sums of some tens of products of order 1 to 10


def orthonormal(rows, columns, batch=()):
    return torch.linalg.qr(torch.randn(*batch, rows, columns, dtype=torch.float64)).Q


def bases(g, kind="two-sided", rank=3):
    """X and L for the gradient's shape; L has one column less than X where there is room."""
    *batch, m, n = g.shape
    right = orthonormal(n, min(rank, n), batch)
    left = orthonormal(m, max(1, min(rank - 1, m)), batch) if kind == "two-sided" else None
    return right, left


def explicit(g, right, left):
    """The projected gradient as a matrix: G Px, or Px and Pl as in Koch and Lubich."""
    on_right = right @ right.mT
    if left is None:
        return g @ on_right
    on_left = left @ left.mT
    return g @ on_right + on_left @ g - on_left @ g @ on_right


def operator_and_matrix(name, kind):
    g = matrix(name)
    if kind == "dense":
        return Dense(g), g
    right, left = bases(g, kind)
    return Sketched.of(Dense(g), right, left), explicit(g, right, left)


def probes(g, columns=4):
    *batch, m, n = g.shape
    return torch.randn(*batch, n, columns, dtype=g.dtype), torch.randn(*batch, m, columns, dtype=g.dtype)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


every_operator = pytest.mark.parametrize("kind", ["dense", *SKETCHES])
every_sketch = pytest.mark.parametrize("kind", SKETCHES)
every_shape = pytest.mark.parametrize("name", NAMES)


@every_operator
@every_shape
def test_both_products_are_those_of_the_explicit_matrix(name, kind):
    operator, expected = operator_and_matrix(name, kind)
    x, y = probes(expected)
    assert_near(operator @ x, expected @ x)
    assert_near(operator.mT @ y, expected.mT @ y)
    assert_near(operator.matmul(x), expected @ x)
    assert_near(operator.rmatmul(y), expected.mT @ y)


@every_operator
@every_shape
def test_the_products_are_adjoint(name, kind):
    operator, g = operator_and_matrix(name, kind)
    x, y = probes(g)
    forward, backward = (y * (operator @ x)).sum(), ((operator.mT @ y) * x).sum()
    assert forward.item() == pytest.approx(backward.item(), rel=1e-10, abs=1e-10)  # sums of a thousand terms of order 10


@every_operator
@every_shape
def test_the_transposed_operator_has_the_transposed_shape_and_its_transposed_is_the_first(name, kind):
    operator, g = operator_and_matrix(name, kind)
    assert operator.shape == g.shape and operator.mT.shape == g.mT.shape
    assert isinstance(operator.mT.shape, torch.Size)
    assert operator.mT.dtype == operator.dtype == g.dtype and operator.mT.device == operator.device == g.device
    assert operator.mT.mT is operator
    x, _ = probes(g)
    assert torch.equal(operator.mT.rmatmul(x), operator.matmul(x))


@every_operator
@every_shape
def test_products_change_nothing(name, kind):
    operator, g = operator_and_matrix(name, kind)
    x, y = probes(g)
    before = [t.clone() for t in (x, y, operator @ x)]
    operator @ x, operator.mT @ y, operator.is_finite()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, operator @ x), strict=True))


@every_operator
def test_products_are_linear(kind):
    operator, g = operator_and_matrix("tall", kind)
    (x, _), (z, _) = probes(g), probes(g)
    assert_near(operator @ (2 * x - 3 * z), 2 * (operator @ x) - 3 * (operator @ z))


# --- Dense --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_gradient_is_widened_once(half):
    g = matrix("tall", torch.float32).to(half)
    operator = Dense(g)
    x = torch.randn(10, 3)
    assert operator.dtype == torch.float32 and (operator @ x).dtype == torch.float32
    assert torch.equal(operator @ x, g.float() @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_enough_gradient_is_not_copied(dtype):
    g = matrix("tall", dtype)
    assert Dense(g).matrix.data_ptr() == g.data_ptr() and Dense(g).dtype == dtype


def test_consume_of_a_borrowed_gradient_is_a_copy():
    g = matrix("tall")
    before, buffer = g.clone(), Dense(g).consume()
    assert torch.equal(buffer, before)
    buffer.zero_()
    assert torch.equal(g, before)


def test_consume_of_an_owned_gradient_is_its_own_buffer():
    g = matrix("tall")
    buffer = Dense(g, is_owned=True).consume()
    assert buffer.data_ptr() == g.data_ptr() and torch.equal(buffer, g)


def test_consume_of_a_widened_gradient_leaves_the_original_alone():
    g = matrix("tall", torch.float32).bfloat16()
    before, operator = g.clone(), Dense(g)
    buffer = operator.consume()
    assert buffer.data_ptr() == operator.matrix.data_ptr()  # the widened copy is the operator's own
    buffer.zero_()
    assert torch.equal(g, before)


@every_shape
def test_dense_gradients_add(name):
    g, other = matrix(name), matrix(name, seed=1)
    total = Dense(g).add_(Dense(other))
    assert torch.equal(total.matrix, g + other)
    total.consume().zero_()  # the sum owns its buffer, not its terms
    assert torch.equal(g, matrix(name)) and torch.equal(other, matrix(name, seed=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["dense", "one-sided", "two-sided"])
def test_a_bad_entry_is_not_finite(kind, bad):
    g = matrix("tall")
    right, left = bases(g, kind)
    g[3, 4] = bad
    operator = Dense(g) if kind == "dense" else Sketched.of(Dense(g), right, left)
    for side in (operator, operator.mT):
        assert side.is_finite().dtype == torch.bool and side.is_finite().ndim == 0
        assert not side.is_finite()


def test_infinities_of_both_signs_are_not_finite():
    g = matrix("tall")
    g[0, 0], g[1, 1] = float("inf"), float("-inf")
    assert not Dense(g).is_finite()


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@every_shape
def test_ordinary_huge_and_tiny_gradients_are_finite(name, scale):
    g = matrix(name, torch.float32) * scale
    right, left = (basis.float() for basis in bases(g))
    sketch = Sketched.of(Dense(g), right, left)
    assert Dense(g).is_finite() and sketch.is_finite() and sketch.mT.is_finite()
    x, y = probes(g)
    assert (sketch @ x).isfinite().all() and (sketch.mT @ y).isfinite().all()


def test_finite_entries_whose_sum_overflows_are_finite():
    g = torch.full((200, 200), 1e35)
    assert g.sum().isinf()
    assert Dense(g).is_finite()


def test_a_bad_entry_of_one_side_only_is_seen():
    g = matrix("tall")
    right, left = bases(g)
    sketch = Sketched.of(Dense(g), right, left)
    assert sketch.is_finite()
    sketch.left_sketch[0, 0] = float("nan")
    assert not sketch.is_finite()


# --- Sketched -----------------------------------------------------------------------------------------------------------


@every_sketch
@every_shape
def test_sketches_of_several_gradients_add_to_the_sketch_of_the_sum(name, kind):
    gradients = [matrix(name, seed=seed) for seed in range(3)]
    right, left = bases(gradients[0], kind)
    whole = Sketched.of(Dense(sum(gradients)), right, left)
    first, second, third = (Sketched.of(Dense(g), right, left) for g in gradients)
    accumulated = Sketched.of(Dense(gradients[0]), right, left)
    for g in gradients[1:]:
        assert accumulated.add_(Dense(g)) is accumulated
    x, y = probes(gradients[0])
    for total in (first.add_(second).add_(third), accumulated):
        assert_near(total @ x, whole @ x)
        assert_near(total.mT @ y, whole.mT @ y)
        assert_near(total @ x, explicit(sum(gradients), right, left) @ x)


@every_sketch
@every_shape
def test_sketching_a_sketch_changes_nothing(name, kind):
    g = matrix(name)
    right, left = bases(g, kind)
    once = Sketched.of(Dense(g), right, left)
    twice = Sketched.of(once, right, left)
    x, _ = probes(g)
    assert_near(twice @ x, once @ x)  # a projection


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_two_sided_sketch_is_exact_in_the_tangent_space(batch):
    m, n, rank = 14, 11, 3
    right, left = orthonormal(n, rank, batch), orthonormal(m, rank, batch)
    a, b = torch.randn(*batch, m, rank, dtype=torch.float64), torch.randn(*batch, n, rank, dtype=torch.float64)
    g = a @ right.mT + left @ b.mT
    sketch = Sketched.of(Dense(g), right, left)
    x, y = probes(g)
    assert_near(sketch @ x, g @ x)
    assert_near(sketch.mT @ y, g.mT @ y)


def test_a_one_sided_sketch_is_exact_in_the_span_of_its_basis():
    right = orthonormal(11, 3)
    g = torch.randn(14, 3, dtype=torch.float64) @ right.mT
    x, _ = probes(g)
    assert_near(Sketched.of(Dense(g), right) @ x, g @ x)


@every_sketch
def test_a_sketch_in_complete_bases_is_the_gradient(kind):
    g = matrix("tall")
    left = orthonormal(24, 24) if kind == "two-sided" else None
    x, _ = probes(g)
    assert_near(Sketched.of(Dense(g), orthonormal(10, 10), left) @ x, g @ x)


def test_a_zero_column_of_a_basis_counts_for_nothing():
    g = matrix("tall")
    right, left = bases(g)
    padded = [torch.cat([basis, torch.zeros(len(basis), 1, dtype=torch.float64)], dim=1) for basis in (right, left)]
    x, _ = probes(g)
    assert_near(Sketched.of(Dense(g), *padded) @ x, explicit(g, right, left) @ x)


def test_a_two_sided_sketch_is_nearer_than_a_one_sided():
    g = matrix("tall")
    right, left = bases(g)
    eye = torch.eye(10, dtype=torch.float64)
    errors = [(Sketched.of(Dense(g), right, basis) @ eye - g).norm() for basis in (None, left)]
    assert errors[1] < errors[0] < g.norm()


def test_a_sketch_of_a_half_precision_gradient_is_in_float32():
    g = matrix("tall", torch.float32).bfloat16()
    right, left = (basis.float() for basis in bases(g))
    sketch = Sketched.of(Dense(g), right, left)
    x, _ = probes(g.float())
    assert sketch.dtype == torch.float32 and (sketch @ x).dtype == torch.float32


# Shapes of X, A1, L, A2 for m, n, r, l = 6, 5, 3, 2.
RIGHT_SHAPES = ((5, 3), (6, 3), (6, 2), (5, 2))
WRONG_SHAPES = {
    "A1 of other rank": ((5, 3), (6, 4), (6, 2), (5, 2)),
    "L of other height": ((5, 3), (6, 3), (7, 2), (5, 2)),
    "A2 of other rank": ((5, 3), (6, 3), (6, 2), (5, 3)),
    "A2 of other height": ((5, 3), (6, 3), (6, 2), (6, 2)),
    "L without A2": ((5, 3), (6, 3), (6, 2), None),
    "A2 without L": ((5, 3), (6, 3), None, (5, 2)),
    "one-sided, A1 of other rank": ((5, 3), (6, 2), None, None),
    "A2 of another batch": ((4, 5, 3), (4, 6, 3), (4, 6, 2), (2, 5, 2)),
    "A1 of another batch": ((4, 5, 3), (2, 6, 3), None, None),
    "L of another batch": ((4, 5, 3), (4, 6, 3), (2, 6, 2), (4, 5, 2)),
}


def zeros(shapes):
    return [None if shape is None else torch.zeros(shape) for shape in shapes]


def test_shapes_that_belong_together_are_accepted():
    assert Sketched(*zeros(RIGHT_SHAPES)).shape == (6, 5)
    assert Sketched(*zeros(RIGHT_SHAPES[:2])).shape == (6, 5)


@pytest.mark.parametrize("shapes", list(WRONG_SHAPES.values()), ids=list(WRONG_SHAPES))
def test_shapes_that_do_not_belong_together_are_refused_and_repeated(shapes):
    with pytest.raises(ShapeError) as caught:
        Sketched(*zeros(shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


@every_operator
def test_a_product_with_the_wrong_number_of_rows_raises(kind):
    operator, _ = operator_and_matrix("tall", kind)
    with pytest.raises((RuntimeError, ShapeError), match="shape"):
        operator @ torch.zeros(24, 2, dtype=torch.float64)
    with pytest.raises((RuntimeError, ShapeError), match="shape"):
        operator.mT @ torch.zeros(10, 2, dtype=torch.float64)
