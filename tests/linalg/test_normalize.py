"""Scaling rows and columns: unit lengths, zeros stay zeros, the same numbers as the plain loop."""

import pytest
import torch
from shapes import MATRICES, matrix
from torch.utils._python_dispatch import TorchDispatchMode

import gradlr
from gradlr.linalg import multi_normalize, normalize_columns
from gradlr.linalg.normalize import spread_scales

NAMES = list(MATRICES)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}  # rounding of sums of some tens of squares, over a few passes


def alternating(x, passes):
    """RowSparse, then columns, to unit length, in turn: the definition, in float64."""
    x = x.double().clone()
    for _ in range(passes):
        for axis in (-1, -2):
            lengths = x.norm(dim=axis, keepdim=True)
            x = torch.where(lengths > 0, x / lengths, x)
    return x


def lengths_are_unit_or_zero(result, x, tolerance):
    expected = (x != 0).any(dim=-2).to(result.dtype)
    return torch.allclose(result.norm(dim=-2), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_normalize_columns_gives_unit_columns_in_the_same_directions(name, dtype):
    x = matrix(name, dtype)
    result = normalize_columns(x)
    lengths = x.double().norm(dim=-2, keepdim=True)
    expected = torch.where(lengths > 0, x.double() / lengths, 0.0)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("function", [normalize_columns, multi_normalize])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", NAMES)
def test_huge_and_tiny_entries_give_what_ordinary_ones_give(name, scale, function):
    x = matrix(name, torch.float32)
    result = function(x * scale)
    assert result.isfinite().all()
    torch.testing.assert_close(result, function(x), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("function", [normalize_columns, multi_normalize])
def test_subnormal_entries_give_finite_numbers(function):
    # What an underflowing gradient leaves: the reciprocal of 1e-42 is no float32.
    assert function(matrix("tall", torch.float32) * 1e-42).isfinite().all()


@pytest.mark.parametrize("function", [normalize_columns, multi_normalize])
@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name, function):
    x = matrix(name)
    before = x.clone()
    assert function(x) is not x
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [normalize_columns, multi_normalize])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(half, function):
    x = matrix("tall", torch.float32).to(half)
    assert function(x).dtype == torch.float32
    torch.testing.assert_close(function(x), function(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("passes", [1, 2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_multi_normalize_is_the_alternating_loop(name, passes, dtype):
    x = matrix(name, dtype)
    result = multi_normalize(x, passes=passes)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), alternating(x, passes), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_columns_have_unit_length_after_any_number_of_passes(name, passes):
    x = matrix(name)
    assert lengths_are_unit_or_zero(multi_normalize(x, passes=passes), x, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["tall", "wide", "square", "one_row", "one_column", "batched"])
def test_rows_approach_equal_lengths_with_more_passes(name):
    x = matrix(name)
    m, n = x.shape[-2:]

    def unevenness(passes):
        # Columns of unit length leave rows √(n / m) of it: unit rows in a square.
        return (multi_normalize(x, passes=passes).norm(dim=-1) - (n / m) ** 0.5).abs().max().item()

    # Sinkhorn converges geometrically; 1e-4 is far below the unevenness of a few passes, about 1e-1.
    assert unevenness(60) < 1e-4
    assert unevenness(60) <= unevenness(3) + 1e-12 and unevenness(3) <= unevenness(1) + 1e-12


def test_transposition_commutes_only_after_many_passes():
    x = matrix("square")

    def difference(passes):
        return (multi_normalize(x.mT, passes=passes) - multi_normalize(x, passes=passes).mT).abs().max().item()

    assert difference(1) > 1e-3  # columns last: no symmetry yet
    assert difference(200) < 1e-6  # the fixed point is unique and symmetric; convergence is geometric


@pytest.mark.parametrize("name", ["tall", "wide", "square", "batched"])
def test_zero_rows_and_columns_stay_zero_and_the_others_are_normalized(name):
    x = matrix(name)
    x[..., 2, :] = 0
    x[..., :, 5] = 0
    result = multi_normalize(x)
    assert (result[..., 2, :] == 0).all() and (result[..., :, 5] == 0).all()
    assert lengths_are_unit_or_zero(result, x, TOLERANCE[torch.float64])


def test_zero_gives_zero():
    assert (multi_normalize(torch.zeros(2, 4, 3)) == 0).all() and (normalize_columns(torch.zeros(2, 4, 3)) == 0).all()


def test_the_scale_of_rows_and_columns_before_does_not_matter_in_the_end():
    x = matrix("square")
    scaled = torch.logspace(-2, 2, 16, dtype=torch.float64)[:, None] * x * torch.logspace(3, -3, 16, dtype=torch.float64)
    # The fixed point is unique; 400 passes reach it from far away.
    torch.testing.assert_close(multi_normalize(scaled, passes=400), multi_normalize(x, passes=400), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exponent", [-12, -18, -19, -20, -21, -22, -25, -30])
@pytest.mark.parametrize("is_row", [True, False])
def test_one_row_or_column_far_below_the_rest_leaves_the_rest_normalized(exponent, is_row):
    # Between 1e-19 and 1e-22 of the largest entry the squares are subnormal in float32, and their reciprocals no float32.
    x = matrix("tall", torch.float32)
    (x[2] if is_row else x[:, 2]).mul_(10.0**exponent)
    result = multi_normalize(x)
    kept = result if is_row else torch.cat([result[:, :2], result[:, 3:]], dim=1)
    assert result.isfinite().all()
    torch.testing.assert_close(kept.norm(dim=0), torch.ones(kept.shape[1]), rtol=0, atol=TOLERANCE[torch.float32])


def test_each_matrix_of_a_batch_is_treated_alone():
    x = matrix("batched") * torch.tensor([1.0, 1e8, 1e-8], dtype=torch.float64)[:, None, None]
    looped = torch.stack([multi_normalize(one) for one in x])
    torch.testing.assert_close(multi_normalize(x), looped, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_inplace_gives_the_same_numbers_in_the_same_buffer(name, dtype):
    x = matrix(name, dtype)
    expected, buffer = multi_normalize(x), x.data_ptr()
    result = multi_normalize(x, inplace=True)
    assert result.data_ptr() == buffer and torch.equal(result, x)
    assert torch.equal(result, expected)


def test_inplace_leaves_half_precision_alone():
    x = matrix("tall", torch.float32).bfloat16()
    before = x.clone()
    result = multi_normalize(x, inplace=True)
    assert torch.equal(x, before) and result.dtype == torch.float32


def test_no_pass_at_all_is_refused():
    with pytest.raises(gradlr.ArgumentError, match="passes=0"):
        multi_normalize(torch.ones(3, 2), passes=0)


class _LargestMade(TorchDispatchMode):
    """Number of entries of the largest tensor that an operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for one in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, one.numel())
        return made


@pytest.mark.parametrize("shape", [(700, 300), (3, 300, 500), (2, 200_000)])
def test_a_large_matrix_is_read_in_blocks_whose_squares_alone_are_kept(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    with _LargestMade() as made:
        rows, columns = spread_scales(x, norm, 2.0, 0.0)
    # A block of at least one row of each matrix, or 2^17 numbers.
    assert made.largest <= max(2**17, x.numel() // 32, x.numel() // shape[-2])
    expected = alternating(x, 3)
    expected *= 2.0 / torch.linalg.vector_norm(expected, dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(x * rows * columns, expected, rtol=1e-12, atol=0)


def test_a_large_matrix_that_requires_grad_is_scaled_in_blocks_as_well():
    x = torch.randn(700, 400)
    torch.testing.assert_close(multi_normalize(x.clone().requires_grad_()).detach(), multi_normalize(x), rtol=0, atol=0)
