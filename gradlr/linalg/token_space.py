"""A matrix `δᵀ x` of few tokens, worked on through its T × T Gram matrices, without ever being formed."""

from __future__ import annotations

import torch
from torch import Tensor

from .polar import NEWTON_SCHULZ_COEFFICIENTS

PASSES, STEPS = 3, 5


def normalization_is_cheaper(tokens: int, m: int, n: int) -> bool:
    """Whether row and column scales are found in token space with less work than by forming the m × n matrix.

    A pass makes two Gram matrices, T²(m + n) multiplications, and multiplies them back, as many again: 2 · 3 · T²(m + n) in all.
    The matrix takes T m n, and reading it six times about as long again.
    """
    return 2 * PASSES * tokens * (m + n) <= 2 * m * n


def polar_is_cheaper(tokens: int, m: int, n: int) -> bool:
    """Whether the polar factor takes less work in token space: T²(m + n) + 20 T³ multiplications against 15 d² max(m, n)."""
    d = min(m, n)
    return tokens**2 * (m + n) + 20 * tokens**3 <= 15 * d * d * max(m, n)


def token_scales(delta: Tensor, x: Tensor, *, passes: int = PASSES) -> tuple[Tensor, Tensor]:
    """The scales that `multi_normalize` gives rows and columns of G = δᵀ x.

    The squared length of row i of G diag(b) is δᵢᵀ (x b² xᵀ) δᵢ, that of column j of diag(a) G likewise.

    Args:
        delta: δ, (T, m), float32 or wider.
        x: (T, n), the same dtype.
        passes: How often rows and columns are normalized.

    Returns:
        a (m, 1) and b (n, 1), so that diag(a) G diag(b) has columns of unit length; zero where G has a zero row or column.

    Source: gradient multi-normalization, arXiv 2502.06742, algorithm 2, in token space.
    """
    # Entries of ordinary size, so that squares neither overflow nor vanish.
    peaks = [part.abs().amax().clamp(min=torch.finfo(part.dtype).tiny) for part in (delta, x)]
    delta, x = delta / peaks[0], x / peaks[1]
    tiny, rows, columns = torch.finfo(x.dtype).tiny, x, x
    for number in range(passes):
        # Reciprocals of squared lengths, whose roots are taken once, at the end. What is subnormal counts as zero.
        lengths = _energies((x * columns.mT if number else x) @ x.mT, delta)
        rows = torch.threshold(lengths, tiny, torch.inf).reciprocal_()
        lengths = _energies(delta * rows.mT @ delta.mT, x)
        columns = torch.threshold(lengths, tiny, torch.inf).reciprocal_()
    return rows.sqrt() / peaks[0] / peaks[1], columns.sqrt()


def token_energy(delta: Tensor, x: Tensor) -> Tensor:
    """‖δᵀ x‖², Frobenius, 0-dim: ⟨δ δᵀ, x xᵀ⟩."""
    return ((delta @ delta.mT) * (x @ x.mT)).sum()


def _energies(gram: Tensor, other: Tensor) -> Tensor:
    """δᵢᵀ K δᵢ of every column of `other`, with the Gram matrix K of the other side's tokens: (columns, 1)."""
    energies = (gram @ other).mul_(other).sum(dim=0)
    # What is left where terms cancel is rounding: no length, and below zero as often as not. It is measured against the
    # column's own largest energy |δᵢ|² tr K, since a column that is small as a whole has a length like any other.
    rounding = torch.finfo(energies.dtype).eps * gram.trace() * other.square().sum(dim=0)
    return energies.where(energies > rounding, 0.0).unsqueeze(-1)


def token_polar(delta: Tensor, x: Tensor, *, steps: int = STEPS) -> Tensor:
    """C x with δᵀ (C x) the approximate polar factor of G = δᵀ x, as `newton_schulz` has it.

    Of X = δᵀ C x, X Xᵀ X is δᵀ (C Kx Cᵀ Kδ C) x with Kx = x xᵀ and Kδ = δ δᵀ: all steps are on T × T coefficients.

    Args:
        delta: δ, (T, m), float32 or wider.
        x: (T, n), the same dtype.
        steps: Newton–Schulz steps.

    Returns:
        (T, n); zero where G is zero. To be multiplied with δᵀ as it was given.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tiny = torch.finfo(x.dtype).tiny
    peaks = [part.abs().amax().clamp(min=tiny) for part in (delta, x)]
    scaled, x = delta / peaks[0], x / peaks[1]
    of_delta, of_x = scaled @ scaled.mT, x @ x.mT
    norm = (of_delta * of_x).sum().clamp(min=0).sqrt()
    first = torch.where(norm > tiny, 1 / (norm * (1 + 1e-7)), 0.0)
    coefficients = torch.eye(len(x), dtype=x.dtype, device=x.device) * first
    for _ in range(steps):
        product = coefficients @ of_x @ coefficients.mT @ of_delta
        step = product @ coefficients
        coefficients = a * coefficients + b * step + c * product @ step
    return (coefficients @ x) / peaks[0]
