"""A matrix of few tokens, through its Gram matrices: what the matrix itself gives."""

import pytest
import torch

from gradlr.linalg import multi_normalize
from gradlr.linalg.polar import newton_schulz_by_gram
from gradlr.linalg.token_space import (
    normalization_is_cheaper,
    polar_is_cheaper,
    token_energy,
    token_polar,
    token_scales,
)


def tokens(count=96, m=300, n=400, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, size, dtype=dtype, generator=generator) for size in (m, n))


# Rounding, times the condition of two Gram matrices, which is that of 96 random tokens, and of five polynomial steps.
@pytest.mark.parametrize(("dtype", "of_scales", "of_polar"), [(torch.float64, 1e-14, 1e-6), (torch.float32, 4e-7, 3e-5)])
def test_it_is_what_the_matrix_itself_gives(dtype, of_scales, of_polar):
    delta, x = tokens(dtype=dtype)
    matrix = delta.mT @ x
    rows, columns = token_scales(delta, x)
    torch.testing.assert_close(rows * matrix * columns.mT, multi_normalize(matrix), rtol=0, atol=of_scales)
    whole = newton_schulz_by_gram(matrix.mT)[0].mT
    torch.testing.assert_close(delta.mT @ token_polar(delta, x), whole, rtol=0, atol=of_polar)
    torch.testing.assert_close(token_energy(delta, x), matrix.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_it_does_not_depend_on_the_size_of_the_gradient(size):
    delta, x = tokens(dtype=torch.float32)
    rows, columns = token_scales(delta, x)
    scaled_rows, scaled_columns = token_scales(delta * size, x)
    torch.testing.assert_close(scaled_rows * size, rows, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled_columns, columns, rtol=1e-5, atol=0)
    # A few roundings, times the largest entry of δᵀ.
    torch.testing.assert_close(
        (delta * size).mT @ token_polar(delta * size, x), delta.mT @ token_polar(delta, x), rtol=0, atol=1e-4
    )


def test_zero_rows_columns_and_gradients_stay_zero():
    delta, x = tokens(count=8, m=5, n=6)
    delta[:, 2], x[:, 3] = 0, 0
    rows, columns = token_scales(delta, x)
    assert rows[2] == 0 and columns[3] == 0 and (rows[[0, 1, 3, 4]] > 0).all()
    rows, columns = token_scales(torch.zeros_like(delta), x)
    assert not rows.any() and not columns.any()
    assert not token_polar(torch.zeros_like(delta), x).any()


def test_small_rows_and_columns_have_a_length_as_well():
    delta, x = tokens(count=16, dtype=torch.float32)
    delta[:, 0] *= 1e-4
    x[:, 0] *= 1e-4
    rows, columns = token_scales(delta, x)
    matrix = delta.mT @ x
    torch.testing.assert_close(rows * matrix * columns.mT, multi_normalize(matrix), rtol=0, atol=1e-5)


def test_few_tokens_are_worked_on_in_token_space_and_many_are_not():
    # T ≤ mn / 3(m + n): 341 tokens of a square of width 2048.
    assert normalization_is_cheaper(341, 2048, 2048) and not normalization_is_cheaper(342, 2048, 2048)
    # At a quarter of the width T²(m + n) + 20 T³ is 0.44 d³; at the width itself 22 d³, more than 15 d³.
    assert polar_is_cheaper(512, 2048, 2048) and not polar_is_cheaper(2048, 2048, 2048)
