"""Orthonormal bases of the range of a matrix, exact and randomized."""

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from .axes import REPLICATED, Axis, gram, largest_in_columns
from .normalize import normalize_columns, safe_reciprocal, widen

# Shifts of a unit diagonal, one per pass: shifted Cholesky-QR, Fukaya et al. 2020 (arXiv 1809.11085). Unshifted, twice-applied
# Cholesky-QR broke down within a few steps on real gradients, whose spectra decay.
_SHIFTS = {torch.float32: (1e-5, 1e-6, 1e-6), torch.float64: (1e-12, 1e-13, 1e-13)}


def orthonormalize(x: Tensor, *, method: str = "auto", axis: Axis = REPLICATED) -> Tensor:
    """Orthonormal columns that span the columns of `x`.

    Args:
        x: Shape (..., m, r) with r ≤ m, floating; not modified.
        method: "qr" (Householder), "cholesky" (three shifted Cholesky-QR passes: products and triangular solves only, no
            synchronization on CUDA), or "auto": cholesky on CUDA, qr elsewhere.
        axis: How its rows are spread; where other processes hold some, the method is "cholesky", with sums of r × r numbers.

    Returns:
        Shape (..., m, r), float32 or wider. A column of `x` that depends on the others becomes an arbitrary orthonormal
        completion or zero.

    Raises:
        ShapeError: `x` has fewer rows than columns.
        ArgumentError: `method` is none of the three.
    """
    if x.ndim < 2 or axis.size(x.shape[-2]) < x.shape[-1]:
        raise ShapeError(f"orthonormalize: x has shape {tuple(x.shape)}; it needs at least as many rows as columns")
    if method not in ("auto", "qr", "cholesky"):
        raise ArgumentError(f"orthonormalize: method {method!r} is unknown; use 'auto', 'qr' or 'cholesky'")
    if method == "auto":
        method = "cholesky" if x.is_cuda else "qr"
    return _shifted_cholesky_qr(x, axis) if method == "cholesky" or not axis.is_whole else _householder_qr(x)


def _householder_qr(x: Tensor) -> Tensor:
    # LAPACK's reflections square entries; unit columns keep 1e30 and 1e-30 inside the range of float32.
    return torch.linalg.qr(normalize_columns(x)).Q


def _shifted_cholesky_qr(x: Tensor, axis: Axis) -> Tensor:
    x = widen(x)
    # Squares leave float32 where entries are above 1e18; after one pass all lengths are about one.
    x = x * safe_reciprocal(largest_in_columns(x, axis))
    for shift in _SHIFTS[x.dtype]:
        products = gram(x, axis)
        # Columns of unit length, whose lengths are on the diagonal already.
        scale = safe_reciprocal(products.diagonal(dim1=-2, dim2=-1)).sqrt().unsqueeze(-2)
        x, products = x * scale, products * scale * scale.mT
        products.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor = torch.linalg.cholesky_ex(products).L
        x = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    return x


def svd_lowrank(matrix, rank: int, *, power_steps: int = 2, generator: torch.Generator | None = None):
    """Randomized singular value decomposition from products with the matrix only.

    Args:
        matrix: Shape (..., m, n): a floating tensor, or any operator with `shape`, `dtype`, `device`, `@` and `.mT`.
        rank: Number r of singular triples, 1 ≤ r ≤ min(m, n).
        power_steps: Subspace iterations (dimensionless).
        generator: Source of the Gaussian test matrix; torch's default generator where None.

    Returns:
        U (..., m, r), S (..., r) descending, V (..., n, r), float32 or wider, with `matrix ≈ U diag(S) Vᵀ`: the very numbers that
        `torch.svd_lowrank(matrix, q=rank, niter=power_steps)` gives for the same random numbers.

    Raises:
        ArgumentError: `rank` is outside [1, min(m, n)].

    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    matrix = widen(matrix) if isinstance(matrix, Tensor) else matrix
    m, n = matrix.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ArgumentError(f"svd_lowrank: rank {rank} for a {m} x {n} matrix; it must be between 1 and {min(m, n)}")
    if m < n:
        u, s, v = svd_lowrank(matrix.mT, rank, power_steps=power_steps, generator=generator)
        return v, s, u
    test = torch.randn(n, rank, dtype=matrix.dtype, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(power_steps):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd((matrix.mT @ basis).mT, full_matrices=False)
    return basis @ u, s, vh.mT
