"""spectral_norm against the exact singular values."""

import pytest
import torch

from gradlr.linalg import spectral_norm


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 12, 9), (1, 12), (12, 1), (64, 64)])
@pytest.mark.parametrize("kind", ["dense", "deficient", "zero"])
def test_spectral_norm_is_exact_up_to_64_rows_or_columns(shape, kind):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    if kind == "deficient":
        matrix = matrix[..., :1] @ matrix[..., :1, :]
    matrix = 0 * matrix if kind == "zero" else matrix
    expected = torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(spectral_norm(matrix), expected, rtol=1e-10, atol=1e-14)
    # float32 at the end of its range: squares would overflow.
    huge = (matrix * 1e30).float()
    torch.testing.assert_close(spectral_norm(huge), torch.linalg.matrix_norm(huge.double(), ord=2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("decay", "rtol"), [(1.0, 4e-3), (0.97, 1e-6)])  # as documented; decaying spectra measured at 2e-9
def test_spectral_norm_of_large_matrices(decay, rtol):
    torch.manual_seed(0)
    matrix = torch.randn(500, 300, dtype=torch.float64)
    if decay < 1:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u * decay ** torch.arange(300)) @ vh
    ratio = (spectral_norm(matrix) / torch.linalg.matrix_norm(matrix, ord=2)).item()
    assert 1 - rtol < ratio <= 1 + 1e-12


def test_spectral_norm_of_what_is_not_finite():
    matrix = torch.ones(2, 4, 5)
    matrix[0, 1, 2] = torch.inf
    norms = spectral_norm(matrix)
    assert norms[0].isnan() and norms[1].item() == pytest.approx(20**0.5)
