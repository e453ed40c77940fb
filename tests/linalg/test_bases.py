"""Bases: orthonormal, containing the range; the randomized decomposition is torch's."""

import numpy as np
import pytest
import torch
from shapes import MATRICES, matrix

from gradlr import tensors
from gradlr.errors import ArgumentError, ShapeError
from gradlr.linalg import orthonormalize, svd_lowrank

# With an asynchronous device, nobody looks at how good two passes are.
pytestmark = pytest.mark.also_asynchronous

DTYPES = (torch.float32, torch.float64)
# 1.2e-7 (2e-16 in float64) times the root of some hundred terms, with room. The last Cholesky shift, 1e-6 (1e-13) of a unit
# diagonal, shortens a column by half of it and leaves overlaps of that size, more where the spectrum falls by 1e-6.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-11}
# "Zero": a dependent column of the shifted factorization may keep the root of the last shift (1e-6, 1e-13) of its length.
ZERO_LENGTH = {torch.float32: 2e-3, torch.float64: 1e-6}
FULL_RANK = ("tall", "wide", "square", "one_row", "one_column", "batched")


def tall(name, dtype=torch.float64):
    x = matrix(name, dtype)
    return x if x.shape[-2] >= x.shape[-1] else x.mT.contiguous()


def decaying(shape, smallest, dtype):
    """A matrix whose singular values fall geometrically from 1 to `smallest`, in a random rotation, like a real gradient's."""
    *batch, m, r = shape
    left = torch.linalg.qr(torch.randn(*batch, m, r, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(*batch, r, r, dtype=torch.float64)).Q
    values = torch.logspace(0, float(np.log10(smallest)), r, dtype=torch.float64)
    return (left * values @ right.mT).to(dtype)


def gram_error(basis):
    basis = basis.double()
    return (basis.mT @ basis - torch.eye(basis.shape[-1], dtype=torch.float64)).abs().max().item()


def is_zero_or_unit(basis, tolerance):
    lengths = basis.double().norm(dim=-2)
    return bool(((lengths < ZERO_LENGTH[basis.dtype]) | ((lengths - 1).abs() < tolerance)).all())


def range_error(x, basis):
    """Largest part of a column of x outside the span of the basis, relative to the column."""
    x, basis = x.double(), basis.double()
    lengths = x.norm(dim=-2)
    outside = (x - basis @ (basis.mT @ x)).norm(dim=-2)
    return torch.where(lengths > 0, outside / lengths, outside).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL_RANK)
def test_columns_are_orthonormal_and_contain_the_range(name, dtype):
    x = tall(name, dtype)
    basis = orthonormalize(x)
    assert basis.shape == x.shape and basis.dtype == dtype
    assert gram_error(basis) < TOLERANCE[dtype]
    assert range_error(x, basis) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smallest", [1e-2, 1e-6])
@pytest.mark.parametrize("shape", [(1024, 64), (512, 256), (256, 256), (3, 128, 32)], ids=str)
def test_decaying_spectra_like_those_of_gradients_keep_orthonormality(shape, smallest, dtype):
    x = decaying(shape, smallest, dtype)
    basis = orthonormalize(x)
    # The shifts grow with the columns, from 32 on.
    tolerance = TOLERANCE[dtype] * max(1, x.shape[-1] / 32)
    assert gram_error(basis) < tolerance
    assert range_error(x, basis) < tolerance


@pytest.mark.parametrize("columns", [16, 64, 128, 256])
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_many_columns_in_few_directions_do_not_break_down(columns, directions):
    """As of a batch of few rows: most columns are rounding errors of the others."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((384, directions), (directions, 96), (96, columns))
        left, middle, right = (torch.randn(size, generator=generator) for size in sizes)
        x = left @ middle @ right
        basis = orthonormalize(x)
        values = torch.linalg.svdvals(basis.double())
        # A column without a direction of its own may be short; none is long.
        assert basis.isfinite().all() and values.max() < 1 + 1e-6
        assert range_error(x, basis) < 1e-4


def test_spectra_beyond_the_precision_of_float32_keep_orthonormality_roughly():
    # 1e-9 is below the rounding of float32, so the last directions are noise; 1e-2 is far from 1 but tells a breakdown.
    x = decaying((512, 64), 1e-9, torch.float32)
    basis = orthonormalize(x)
    assert gram_error(basis) < 1e-2
    assert range_error(x, basis) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("columns", [48, 64, 128])
@pytest.mark.parametrize("live", [5, 27, 44])
def test_more_columns_than_rows_that_are_not_zero_do_not_break_down(columns, live):
    """The gradient of a layer most of whose units are dead: no rounding error fills what the rows leave open."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.zeros(128, 128)
        rows = torch.randperm(128, generator=generator)[:live]
        gradient[rows] = torch.randn(live, 3, generator=generator) @ torch.randn(3, 128, generator=generator)
        basis = orthonormalize(gradient @ torch.randn(128, columns, generator=generator))
        assert basis.isfinite().all() and basis.norm(dim=0).max() < 1.01
        assert range_error(gradient, basis) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["deficient", "zero"])
def test_a_dependent_column_becomes_a_completion_or_zero(name, dtype):
    x = tall(name, dtype)
    basis = orthonormalize(x)
    # Rounding noise becomes a direction like any other: within some 1e-5 in three passes of float32.
    assert is_zero_or_unit(basis, 1e-4 if dtype == torch.float32 else 1e-10)
    gram = basis.mT @ basis
    overlaps = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert overlaps.abs().max() < ZERO_LENGTH[dtype]
    assert range_error(x, basis) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_columns_give_one_direction_and_completions_or_zeros(dtype):
    x = torch.ones(12, 3, dtype=dtype)
    basis = orthonormalize(x)
    assert is_zero_or_unit(basis, TOLERANCE[dtype])
    assert abs(basis[:, 0].norm().item() - 1) < TOLERANCE[dtype]
    assert range_error(x, basis) < TOLERANCE[dtype]


def test_a_zero_column_does_not_disturb_the_others():
    x = tall("tall")
    x[:, 3] = 0
    basis = orthonormalize(x)
    assert is_zero_or_unit(basis, TOLERANCE[torch.float64])
    assert range_error(x, basis) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", FULL_RANK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_unique_factor_of_a_decomposition_with_a_positive_diagonal(name, dtype):
    x = tall(name, dtype)
    q, triangle = np.linalg.qr(x.double().numpy())
    expected = torch.from_numpy(q * np.sign(np.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :])
    # Rounding and shifts, times the condition of these matrices, below 30.
    torch.testing.assert_close(orthonormalize(x).double(), expected, rtol=0, atol=30 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", FULL_RANK)
def test_the_span_is_that_of_the_left_singular_vectors(name):
    x = tall(name)
    left, _, _ = np.linalg.svd(x.numpy(), full_matrices=False)
    basis = orthonormalize(x).numpy()
    projector, expected = (b @ b.swapaxes(-1, -2) for b in (basis, left))
    # A projector's error is twice that of its basis.
    np.testing.assert_allclose(projector, expected, atol=2 * TOLERANCE[torch.float64])


def test_each_matrix_of_a_batch_is_treated_alone():
    x = torch.stack([tall("batched")[0], 1e6 * tall("batched")[1], torch.zeros(12, 9, dtype=torch.float64)])
    batched = orthonormalize(x)
    for one, expected in zip(batched, x, strict=True):
        # Batched kernels may sum in another order: some ulps.
        torch.testing.assert_close(one, orthonormalize(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", list(MATRICES))
def test_huge_and_tiny_entries_are_harmless(name, scale):
    x = tall(name, torch.float32) * scale
    basis = orthonormalize(x)
    assert basis.isfinite().all() and is_zero_or_unit(basis, 1e-4)
    assert range_error(x, basis) < TOLERANCE[torch.float32]


def test_a_column_of_subnormal_numbers_is_harmless():
    # What an underflowing gradient leaves: the reciprocal of 1e-42 is no float32.
    x = tall("tall", torch.float32)
    x[:, 3] *= 1e-42
    basis = orthonormalize(x)
    assert basis.isfinite().all()


def test_columns_of_very_different_length_count_alike():
    x = tall("tall", torch.float32) * torch.logspace(-30, 30, 10)
    basis = orthonormalize(x)
    assert gram_error(basis) < TOLERANCE[torch.float32]


def test_half_precision_is_widened():
    x = tall("tall", torch.bfloat16)
    basis = orthonormalize(x)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis, orthonormalize(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", list(MATRICES))
def test_orthonormalize_leaves_its_input_alone(name):
    x = tall(name)
    before = x.clone()
    orthonormalize(x)
    assert torch.equal(x, before)


def test_a_wide_matrix_is_refused_with_its_shape():
    with pytest.raises(ShapeError, match=r"\(3, 4, 7\)"):
        orthonormalize(torch.zeros(3, 4, 7))


def test_a_vector_is_refused_with_its_shape():
    with pytest.raises(ShapeError, match=r"\(5,\)"):
        orthonormalize(torch.zeros(5))


class Products:
    """An operator that can only multiply."""

    def __init__(self, a):
        self._a, self.shape, self.dtype, self.device = a, a.shape, a.dtype, a.device

    def matmul(self, x):
        return self._a @ x

    @property
    def mT(self):  # noqa: N802 (torch's name)
        return Products(self._a.mT)


def torchs_and_ours(x, rank, power_steps=2, seed=7):
    torch.manual_seed(seed)
    theirs = torch.svd_lowrank(x, q=rank, niter=power_steps)
    ours = svd_lowrank(x, rank, power_steps=power_steps, generator=torch.Generator().manual_seed(seed))
    return theirs, ours


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("power_steps", [0, 2])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16), (3, 12, 9), (3, 9, 12), (2, 2, 7, 5)], ids=str)
def test_svd_lowrank_gives_torchs_numbers_for_the_same_random_numbers(shape, power_steps, dtype, tolerance):
    x = torch.randn(shape, dtype=dtype)
    theirs, ours = torchs_and_ours(x, 4, power_steps)
    for expected, found in zip(theirs, ours, strict=True):
        # The same operations on the same numbers; only a product is written transposed: rounding over the spectral gaps.
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(MATRICES))
def test_svd_lowrank_at_rank_one_gives_torchs_rank_one_matrix(name):
    theirs, ours = torchs_and_ours(matrix(name), 1)
    expected, found = (u * s.unsqueeze(-2) @ v.mT for u, s, v in (theirs, ours))
    # float64 rounding; the product hides the signs and a zero matrix' arbitrary vectors.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_svd_lowrank_without_a_generator_draws_from_torchs():
    x = matrix("tall")
    torch.manual_seed(3)
    implicit = svd_lowrank(x, 3)
    explicit = svd_lowrank(x, 3, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(implicit, explicit, strict=True))


@pytest.mark.parametrize("name", list(MATRICES))
def test_svd_lowrank_at_full_rank_is_the_decomposition(name):
    x = matrix(name)
    u, s, v = svd_lowrank(x, min(x.shape[-2:]))
    # Backward stable: 1e-15 times the norm (about 10) and some tens of terms.
    torch.testing.assert_close(u * s.unsqueeze(-2) @ v.mT, x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(x.numpy(), compute_uv=False), atol=1e-12)
    assert gram_error(u) < 1e-12 and gram_error(v) < 1e-12
    assert (s.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("name", ["tall", "wide", "batched"])
def test_svd_lowrank_needs_products_only(name):
    x = matrix(name)
    dense = svd_lowrank(x, 3, generator=torch.Generator().manual_seed(1))
    operator = svd_lowrank(Products(x), 3, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(dense, operator, strict=True))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", list(MATRICES))
def test_svd_lowrank_is_finite_for_huge_and_tiny_entries(name, scale):
    assert all(part.isfinite().all() for part in svd_lowrank(matrix(name, torch.float32) * scale, 1))


@pytest.mark.parametrize("rank", [0, -2, 11])
@pytest.mark.parametrize("name", ["tall", "wide"])
def test_svd_lowrank_refuses_an_impossible_rank_with_the_numbers(name, rank):
    x = matrix(name)
    with pytest.raises(ArgumentError, match=rf"rank {rank} .*{x.shape[0]} x {x.shape[1]}.* 10"):
        svd_lowrank(x, rank)


def test_svd_lowrank_leaves_its_input_alone():
    x = matrix("tall")
    before = x.clone()
    svd_lowrank(x, 3)
    assert torch.equal(x, before)


@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_two_passes_are_as_good_as_three_where_they_are_enough(smallest, monkeypatch):
    x, solve, passes = decaying((300, 64), smallest, torch.float32), torch.linalg.solve_triangular, []
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *args, **how: passes.append(1) or solve(*args, **how))
    error = gram_error(orthonormalize(x))
    # Two shifts of 64 columns, 2e-6, and some rounding.
    assert error < 4e-6
    is_asynchronous = tensors.is_async(x)
    assert len(passes) == (2 if smallest >= 1e-2 and not is_asynchronous else 3)


def test_rows_of_any_length_keep_their_relative_precision_and_zero_ones_stay_zero():
    """As masks of whole rows need it, and the residual, which gives all rows one length."""
    x = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(0, -12, 200, dtype=torch.float64).unsqueeze(1)
    x[50] = 0
    basis, expected = orthonormalize(x.float()), orthonormalize(x)
    assert (basis[50] == 0).all()
    rest = expected.norm(dim=1) > 0
    # Rounding of float32 times the condition of x, some tens.
    assert ((basis - expected).norm(dim=1)[rest] / expected.norm(dim=1)[rest]).max() < 1e-4


@pytest.mark.parametrize("shape", [(0, 12, 4), (12, 0)], ids=str)
def test_no_matrix_and_no_column_give_none(shape):
    """As where a process holds no expert."""
    assert orthonormalize(torch.ones(shape)).shape == shape
