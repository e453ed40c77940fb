"""Newton–Schulz steps: Muon's own function, the polynomial of the singular values, and close to the polar factor."""

import numpy as np
import pytest
import torch
from reference.decompositions import polar_factor
from shapes import MATRICES, matrix

from gradlr.linalg import newton_schulz
from gradlr.linalg.polar import newton_schulz_by_gram

NAMES = list(MATRICES)


def zeropower_via_newtonschulz5(G, steps):  # noqa: N803 (as published: kellerjordan.github.io/posts/muon)
    assert G.ndim >= 2
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()  # noqa: N806
    if G.size(-2) > G.size(-1):
        X = X.mT  # noqa: N806
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # noqa: N806
    for _ in range(steps):
        A = X @ X.mT  # noqa: N806
        B = b * A + c * A @ A  # noqa: N806
        X = a * X + B @ X  # noqa: N806
    if G.size(-2) > G.size(-1):
        X = X.mT  # noqa: N806
    return X


def polynomial_of_svd(x, steps=5):
    """Newton–Schulz on the singular values alone, in float64."""
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    s = s / (np.linalg.norm(s, axis=-1, keepdims=True) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return torch.from_numpy((u * s[..., None, :]) @ vh)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_newton_schulz_is_muons_function_bit_for_bit(name, steps, scale):
    x = matrix(name, torch.float32) * scale
    result, expected = newton_schulz(x, steps=steps), zeropower_via_newtonschulz5(x, steps)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_newton_schulz_in_float64_is_the_polynomial_of_the_singular_values(name, steps):
    x = matrix(name)
    result = newton_schulz(x, steps=steps, dtype=torch.float64)
    # Rounding 1e-16, enlarged by at most 3.5 a step.
    torch.testing.assert_close(result, polynomial_of_svd(x, steps), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_arithmetic(dtype):
    assert newton_schulz(matrix("tall"), dtype=dtype).dtype == dtype


@pytest.mark.parametrize("name", ["tall", "wide", "one_row", "one_column"])
def test_singular_values_end_near_one(name):
    values = torch.linalg.svdvals(newton_schulz(matrix(name), dtype=torch.float64))
    # The polynomial's own band, about 0.68 to 1.21.
    assert values.min() > 0.65 and values.max() < 1.25


@pytest.mark.parametrize("name", NAMES)
def test_newton_schulz_commutes_with_transposition(name):
    x = matrix(name)
    # Exact for a rectangle but for the order of sums; rounding 1e-16 times 3.5 a step.
    torch.testing.assert_close(
        newton_schulz(x.mT, dtype=torch.float64), newton_schulz(x, dtype=torch.float64).mT, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_newton_schulz_of_a_batch_is_that_of_each(dtype, tolerance):
    x = matrix("batched") * torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)[:, None, None]
    batched = newton_schulz(x, dtype=dtype)
    looped = torch.stack([newton_schulz(one, dtype=dtype) for one in x])
    # Another order of sums: some roundings (4e-3 in bfloat16), enlarged over five steps.
    torch.testing.assert_close(batched, looped, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_newton_schulz_of_zero_is_zero(dtype):
    assert (newton_schulz(torch.zeros(2, 5, 3), dtype=dtype) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", NAMES)
def test_newton_schulz_is_finite_for_huge_and_tiny_entries(name, scale, dtype):
    assert newton_schulz(matrix(name, torch.float32) * scale, dtype=dtype).isfinite().all()


@pytest.mark.parametrize("scale", [1e15, 1e30])
def test_newton_schulz_of_huge_entries_is_that_of_ordinary_ones(scale):
    x = matrix("tall", torch.float32)
    # float32 rounding over five steps.
    torch.testing.assert_close(
        newton_schulz(x * scale, dtype=torch.float32), newton_schulz(x, dtype=torch.float32), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("scale", [1e3, 6e3, 2e4, 1e6])
def test_newton_schulz_in_float16_survives_entries_and_norms_beyond_its_range(scale):
    # The largest float16 is 65504; the norm of this matrix at 6e3 is about 1e5.
    x = matrix("tall", torch.float32)
    result, expected = newton_schulz(x * scale, dtype=torch.float16), newton_schulz(x, dtype=torch.float32)
    # float16 rounding, 1e-3, over five steps.
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name):
    # bfloat16 too: there nothing need be converted.
    for dtype in (torch.float64, torch.bfloat16):
        x = matrix(name, dtype)
        before = x.clone()
        newton_schulz(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["tall", "wide", "one_row", "one_column"])
def test_the_polar_factor_of_the_result_is_that_of_the_matrix(name):
    x = matrix(name)
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    # Singular vectors stay where they are: rounding, times the condition.
    torch.testing.assert_close(polar_factor(newton_schulz(x, dtype=torch.float64)), polar_factor(x), rtol=0, atol=1e-9)


# --- on the Gram matrix ---------------------------------------------------------------------------------------------------


def of_unit_peak(name, dtype=torch.float64):
    x = matrix(name, dtype)
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    return x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_steps_on_the_gram_matrix_are_those_on_the_matrix(name, steps):
    x = of_unit_peak(name)
    # Large enough that the notebook's 1e-7 beside the norm is none.
    (found, *_), expected = newton_schulz_by_gram(x, steps=steps), newton_schulz(x * 2.0**30, steps=steps, dtype=torch.float64)
    # Values near zero grow by 3.4 a step, their squares in the Gram matrix by 12, and its rounding of 1e-16 with them.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_they_stay_near_those_in_float64(name):
    x = of_unit_peak(name, torch.float32)
    # As above, from a rounding of 6e-8.
    torch.testing.assert_close(newton_schulz_by_gram(x)[0].double(), newton_schulz_by_gram(x.double())[0], rtol=0, atol=1e-3)


def test_values_far_below_the_largest_do_not_leave_the_band_in_float32():
    u = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    x = (u * torch.logspace(0, -7, 8, dtype=torch.float64) @ v.mT).float()
    values = torch.linalg.svdvals(newton_schulz_by_gram(x)[0].double())
    assert values.isfinite().all() and values.max() < 1.25
