"""Orthonormal bases of the range of a matrix, a randomized decomposition, and the largest singular value: from products."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..tensors import is_async, widest
from .axes import REPLICATED, Axis
from .normalize import normalize_columns, widen

# Shifts of the diagonal, as shares of it, one per pass: shifted Cholesky-QR, Fukaya et al. 2020 (arXiv 1809.11085). Unshifted,
# twice-applied Cholesky-QR broke down within a few steps on real gradients, whose spectra decay.
_SHIFTS = {torch.float32: (1e-5, 1e-6, 1e-6), torch.float64: (1e-12, 1e-13, 1e-13)}
# The rounding errors of a Gram matrix grow with its columns, and the shift must exceed them. Where 64 columns span two
# directions, as of a batch of two rows, shifts that did not grow broke down in one of twenty random cases; these in none of
# 5,040 with up to 128 columns. In the last pass, too: where most rows are zero, as of units that are dead, r columns lie in fewer
# than r dimensions to the bit, no rounding error fills the others, and one in ten of 1,740 cases broke down there.
_SHIFT_COLUMNS = 32
# Two passes are enough where the diagonal of the second factor stays above this: the first has left columns of about unit length
# that hardly overlap, and the second's result is as orthonormal as a third one's, to its shift. So it is in 95 of 100 sketches of
# SmolLM2's gradients, and above 0.8 in all; but at 0.7 training in four micro-batches ended 7e-5 away from training in one.
_WELL_CONDITIONED = 0.9
# Of a Gram matrix whose largest eigenvalue is wanted: its 2^42-nd power.
_SQUARINGS = 42


class Products(Protocol):
    """A matrix (..., m, n) that is known by its products only; a tensor is one as well."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def matmul(self, x: Tensor, /) -> Tensor: ...

    @property
    def mT(self) -> Any: ...  # noqa: N802 (torch's name)


def orthonormalize(x: Tensor, *, axis: Axis = REPLICATED, is_scaled: bool = False) -> Tensor:
    """Orthonormal columns that span the columns of `x`: three shifted Cholesky-QR passes, or two where the host may look.

    Only products of matrices, r × r factorizations and triangular solves, so that no device waits for the host. Each row of the
    result is the row of `x` times one r × r matrix: small rows keep their relative precision, and zero ones stay zero, as they
    do not with Householder's reflections.

    Args:
        x: Shape (..., m, r) with r ≤ m, floating; not modified.
        axis: How its rows are spread; where other processes hold some, r × r numbers are summed in each pass.
        is_scaled: Whether the squares of its entries are numbers of its dtype, so that nothing has to be scaled.

    Returns:
        Shape (..., m, r), float32 or wider. A column of `x` that depends on the others becomes an arbitrary orthonormal
        completion or zero.

    Raises:
        ShapeError: `x` has fewer rows than columns.
    """
    if x.ndim < 2 or (x.shape[-2] < x.shape[-1] and axis.size(x.shape[-2]) < x.shape[-1]):
        raise ShapeError(f"orthonormalize: x has shape {tuple(x.shape)}; it needs at least as many rows as columns")
    wide = x.dtype if x.dtype in _SHIFTS else torch.float32
    tiny, growth = torch.finfo(wide).tiny, max(1.0, x.shape[-1] / _SHIFT_COLUMNS)
    # Squares leave float32 where entries are above 1e18 or below 1e-19; after one pass all lengths are about one. A quotient with
    # a wide divisor is wide.
    x = x if is_scaled else x / axis.column_peaks(x).to(wide).clamp_(min=tiny)
    rows, least = x.mT, torch.scalar_tensor(tiny, dtype=wide, device="cpu")
    may_look = axis.is_whole and x.numel() > 0 and not is_async(x) and not torch.compiler.is_compiling()
    for number, least_shift in enumerate(_SHIFTS[wide]):
        shift = least_shift * growth
        products = rows @ rows.mT if axis.is_whole else axis.inner(rows.mT, rows.mT)
        # The shift is relative: what comes of it is the same for columns of any length. A zero column stays zero.
        lengths = products.diagonal(dim1=-2, dim2=-1)
        if torch.compiler.is_compiling():  # which knows no `out=` of a view, and makes one kernel of two
            lengths.mul_(1 + shift).add_(tiny)
        else:
            torch.add(least, lengths, alpha=1 + shift, out=lengths)
        # cholesky_ex, since cholesky asks the device whether it has succeeded.
        factor = torch.linalg.cholesky_ex(products).L
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        if number == 1 and may_look and factor.diagonal(dim1=-2, dim2=-1).amin() > _WELL_CONDITIONED:
            break
    return rows.mT


def svd_lowrank(
    matrix: Products,
    rank: int,
    *,
    power_steps: int = 2,
    generator: torch.Generator | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized singular value decomposition from products with the matrix only.

    Args:
        matrix: Shape (..., m, n): a floating tensor, or any operator with these products.
        rank: Number r of singular triples, 1 ≤ r ≤ min(m, n).
        power_steps: Subspace iterations (dimensionless).
        generator: Source of the Gaussian test matrix; torch's default generator where None.
        columns: The test matrix itself, (min(m, n), r), of any scale; drawn where None.

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
    if m < n:  # the small matrix whose decomposition is taken has the shorter side
        u, s, v = svd_lowrank(matrix.mT, rank, power_steps=power_steps, generator=generator, columns=columns)
        return v, s, u
    if columns is None:
        columns = torch.randn(n, rank, dtype=matrix.dtype, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(matrix.matmul(columns.to(matrix.dtype))).Q
    for _ in range(power_steps):
        # Orthonormal at each half step: powers of a matrix bury its small singular values in rounding errors.
        basis = torch.linalg.qr(matrix.mT.matmul(basis)).Q
        basis = torch.linalg.qr(matrix.matmul(basis)).Q
    u, s, vh = torch.linalg.svd(matrix.mT.matmul(basis).mT, full_matrices=False)
    return basis @ u, s, vh.mT


def spectral_norm(matrix: Products, *, columns: int = 8, steps: int = 8) -> Tensor:
    """Largest singular value of each matrix, from 2 · steps products with `columns` columns.

    Args:
        matrix: Shape (..., m, n): a floating tensor, or any operator with these products.
        columns: Of a block.
        steps: Number of blocks.

    Returns:
        Shape (...), float64, NaN where an entry is not finite: never above the true value but for rounding. Exact where
        columns · steps reaches min(m, n); beyond, Gaussian matrices, whose singular values lie densely, are met to 4e-3 up to
        1000 × 1000, and decaying spectra far better.

    Draws from a generator of its own: other random numbers stay as they were.

    Source: randomized block Krylov iteration, Musco and Musco 2015, arXiv 1504.05477, algorithm 2.
    """
    matrix = widen(matrix) if isinstance(matrix, Tensor) else matrix
    *batch, m, n = matrix.shape
    if m > n:
        return spectral_norm(matrix.mT, columns=columns, steps=steps)
    generator = torch.Generator(matrix.device).manual_seed(0)
    width = min(columns, m)
    draw = torch.randn((*batch, n, width), dtype=matrix.dtype, device=matrix.device, generator=generator)
    blocks = [orthonormalize(matrix.matmul(draw))]
    while len(blocks) < steps and len(blocks) * width < m:
        # Unit columns on the way: squares of large entries would overflow, and the span is what counts.
        block = normalize_columns(matrix.matmul(normalize_columns(matrix.mT.matmul(blocks[-1]))))
        known = torch.cat(blocks, dim=-1)
        blocks.append(orthonormalize(block - known @ (known.mT @ block)))
    # Where the span is exhausted a block is rounding errors: only orthonormal columns bound the value from above.
    basis = torch.linalg.qr(torch.cat(blocks, dim=-1)[..., :m]).Q
    # Its Gram matrix squares the condition: in float64, half of whose digits are more than float32 has.
    image = widest(matrix.mT.matmul(basis))
    gram = image.mT @ image
    is_finite = gram.isfinite()
    largest = _largest_eigenvalue(torch.where(is_finite, gram, 0.0)).sqrt()
    return torch.where(is_finite.all(dim=-1).all(dim=-1), largest, torch.nan)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Of positive semidefinite matrices (..., b, b): the Rayleigh quotient of a high power, so never above the true value.

    By squaring, since GPUs' eigenvalue solvers make the host wait. Of eigenvalues that lie closely together it gives a mean, less
    than b / 2^43 of the largest below it.
    """
    tiny = torch.finfo(gram.dtype).tiny

    def with_unit_trace(power: Tensor) -> tuple[Tensor, Tensor]:
        trace = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
        return power / trace.clamp(min=tiny), trace

    gram, scale = with_unit_trace(gram)
    power = gram
    for _ in range(_SQUARINGS):
        power, _ = with_unit_trace(power @ power)
    quotient = (power * (gram @ power)).sum(dim=(-2, -1)) / power.square().sum(dim=(-2, -1)).clamp(min=tiny)
    return quotient.clamp(min=0) * scale[..., 0, 0]
