"""Polar factors: against a float64 singular value decomposition, and Newton–Schulz against Muon's own function."""

import numpy as np
import pytest
import torch
from shapes import MATRICES, matrix

from gradlr.errors import ShapeError
from gradlr.linalg import leading_directions, newton_schulz, polar_factor

NAMES = list(MATRICES)
# Result within float64 rounding over the ratio of singular values (≤ 1e3 here), or within float32 rounding of entries ≤ 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def tall(name, dtype=torch.float64):
    x = matrix(name, dtype)
    return x if x.shape[-2] >= x.shape[-1] else x.mT.contiguous()


def from_svd(x, function=np.ones_like, rtol=1e-5):
    """U diag(function(s)) Vᵀ with masked null directions, in float64."""
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    values = np.where(s > rtol * s.max(-1, keepdims=True), function(s), 0)
    return torch.from_numpy((u * values[..., None, :]) @ vh)


def with_singular_values(values, rows=20):
    values = torch.tensor(values, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return u * values @ v.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_polar_factor_is_that_of_the_decomposition(name, dtype):
    x = tall(name, dtype)
    result = polar_factor(x)
    assert result.dtype == dtype and result.shape == x.shape
    torch.testing.assert_close(result.double(), from_svd(x), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["tall", "square", "one_row", "one_column", "batched"])
def test_a_full_rank_matrix_gives_orthonormal_columns(name):
    result = polar_factor(tall(name))
    eye = torch.eye(result.shape[-1], dtype=torch.float64).expand(*result.shape[:-2], -1, -1)
    torch.testing.assert_close(result.mT @ result, eye, rtol=0, atol=TOLERANCE[torch.float64])


def test_zero_gives_zero():
    assert torch.equal(polar_factor(torch.zeros(2, 12, 9)), torch.zeros(2, 12, 9))


def test_a_zero_matrix_in_a_batch_stays_zero_and_the_others_do_not_notice():
    x = tall("batched")
    x[1] = 0
    result = polar_factor(x)
    assert (result[1] == 0).all()
    torch.testing.assert_close(result, from_svd(x), rtol=0, atol=TOLERANCE[torch.float64])


def test_null_directions_are_masked():
    x = with_singular_values([3.0, 1.0, 0.03, 3e-7, 0.0])
    values = torch.linalg.svdvals(polar_factor(x))
    expected = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize(("rtol", "kept"), [(1e-4, 4), (1e-2, 3), (0.2, 2), (0.9, 1)])
def test_rtol_decides_which_directions_count(rtol, kept):
    x = with_singular_values([1.0, 0.5, 0.1, 1e-3])
    assert torch.linalg.svdvals(polar_factor(x, rtol=rtol)).sum().item() == pytest.approx(kept, abs=1e-9)


def test_a_masked_direction_of_float32_noise_is_masked_too():
    x = tall("deficient", torch.float32)
    assert torch.linalg.matrix_rank(polar_factor(x), rtol=1e-3) == 2


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-3])
@pytest.mark.parametrize("name", NAMES)
def test_the_polar_factor_does_not_depend_on_the_scale(name, scale):
    x = tall(name, torch.float32)
    result = polar_factor(x * scale)
    assert result.isfinite().all()
    torch.testing.assert_close(result, polar_factor(x), rtol=0, atol=TOLERANCE[torch.float32])


def test_rotating_the_rows_rotates_the_result():
    x = tall("tall")
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    torch.testing.assert_close(polar_factor(rotation @ x), rotation @ polar_factor(x), rtol=0, atol=TOLERANCE[torch.float64])


def saturating(s):
    return s / (1 + s)


@pytest.mark.parametrize("name", NAMES)
def test_weights_set_the_singular_values(name):
    x = tall(name)
    result, expected = polar_factor(x, weights=saturating), from_svd(x, saturating)
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE[torch.float64])


def test_weights_of_one_change_nothing():
    x = tall("batched")
    torch.testing.assert_close(polar_factor(x, weights=torch.ones_like), polar_factor(x), rtol=0, atol=0)


def test_weights_equal_to_the_values_give_back_the_matrix():
    x = tall("tall")
    torch.testing.assert_close(polar_factor(x, weights=lambda s: s), x, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["deficient", "zero"])
def test_weights_do_not_revive_masked_directions(name):
    x = tall(name)
    torch.testing.assert_close(polar_factor(x, weights=torch.ones_like), from_svd(x), rtol=0, atol=TOLERANCE[torch.float64])


def test_weights_see_the_singular_values_descending_in_float64():
    seen = []
    x = tall("batched", torch.float32)
    polar_factor(x, weights=lambda s: seen.append(s) or torch.ones_like(s))
    (values,) = seen
    assert values.dtype == torch.float64
    # Values from float64 arithmetic on the same float32 entries.
    np.testing.assert_allclose(values.numpy(), np.linalg.svd(x.double().numpy(), compute_uv=False), rtol=1e-10)


def test_half_precision_comes_out_in_float32():
    x = tall("tall", torch.bfloat16)
    assert polar_factor(x).dtype == torch.float32
    torch.testing.assert_close(polar_factor(x), polar_factor(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("function", [polar_factor, leading_directions, newton_schulz])
@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name, function):
    # bfloat16 too: there newton_schulz need not convert.
    for dtype in (torch.float64, torch.bfloat16):
        x = tall(name, dtype)
        before = x.clone()
        function(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (7,)], ids=str)
def test_a_matrix_that_is_not_tall_is_refused_with_its_shape(shape):
    with pytest.raises(ShapeError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        polar_factor(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_leading_directions_are_orthogonal_and_diagonalize(name):
    x = tall(name)
    q, energies = leading_directions(x)
    eye = torch.eye(x.shape[-1], dtype=torch.float64).expand_as(q)
    # float64 rounding; the energies of these matrices are of order 100.
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close((x @ q).mT @ (x @ q), torch.diag_embed(energies), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_energies_are_the_squared_singular_values_descending(name, dtype):
    x = tall(name, dtype)
    q, energies = leading_directions(x)
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    assert energies.dtype == torch.float64 and q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Absolute: the Gram matrix knows squares to 1e-16 of the largest, which is of order 100.
    np.testing.assert_allclose(energies.numpy(), expected, atol=1e-11)
    assert (energies >= 0).all() and (energies.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", NAMES)
def test_leading_directions_of_huge_and_tiny_entries_are_finite_and_ordered(name, scale):
    q, energies = leading_directions(tall(name, torch.float32) * scale)
    _, unscaled = leading_directions(tall(name, torch.float32))
    assert q.isfinite().all() and energies.isfinite().all()
    # float32 rounding of the scaled entries.
    torch.testing.assert_close(energies / scale**2, unscaled, rtol=1e-5, atol=1e-4)


# --- Newton–Schulz ------------------------------------------------------------------------------------------------------


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
