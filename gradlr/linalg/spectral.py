"""The largest singular value, for matrices that may be known by their products only."""

import torch
from torch import Tensor

from .bases import orthonormalize
from .normalize import normalize_columns, widen


def spectral_norm(matrix, *, columns: int = 8, steps: int = 8) -> Tensor:
    """Largest singular value of each matrix, from 2 · steps products with `columns` columns.

    Args:
        matrix: Shape (..., m, n): a floating tensor, or any operator with `shape`, `dtype`, `device`, `@` and `.mT`.
        columns: Columns of a block.
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
    blocks = [orthonormalize(matrix @ draw)]
    while len(blocks) < steps and len(blocks) * width < m:
        # Unit columns on the way: squares of large entries would overflow, and the span is what counts.
        block = normalize_columns(matrix @ normalize_columns(matrix.mT @ blocks[-1]))
        known = torch.cat(blocks, dim=-1)
        blocks.append(orthonormalize(block - known @ (known.mT @ block)))
    # Where the span is exhausted a block is rounding errors: only orthonormal columns bound the value from above.
    basis = torch.linalg.qr(torch.cat(blocks, dim=-1)[..., :m]).Q
    image = (matrix.mT @ basis).double()
    gram = image.mT @ image
    is_finite = gram.isfinite()
    largest = torch.linalg.eigvalsh(torch.where(is_finite, gram, 0.0))[..., -1].clamp(min=0).sqrt()
    return torch.where(is_finite.all(dim=-1).all(dim=-1), largest, torch.nan)
