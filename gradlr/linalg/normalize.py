"""Scaling rows and columns of a matrix to unit length."""

import torch
from torch import Tensor

from ..errors import ArgumentError


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or untouched where it is already that wide."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def largest_entry(x: Tensor) -> Tensor:
    """Largest absolute entry of each matrix, shape (..., 1, 1); 0 for a matrix without entries."""
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-2], 1, 1))
    # Two reductions without a temporary: on the CPU many times faster than the infinity norm.
    return torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))


def safe_reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or subnormal: there the reciprocal would be infinite."""
    return torch.where(x >= torch.finfo(x.dtype).tiny, x.reciprocal(), torch.zeros_like(x))


def normalize_columns(x: Tensor) -> Tensor:
    """`x` with every column scaled to unit length; a zero column stays zero.

    Args:
        x: Shape (..., m, r), floating, entries up to about 1e37 in float32; not modified.

    Returns:
        Shape (..., m, r), float32 or wider. Two scalings, so that squares neither overflow nor vanish.
    """
    x = widen(x)
    x = x * safe_reciprocal(x.abs().amax(dim=-2, keepdim=True))
    return x * safe_reciprocal(x.square().sum(dim=-2, keepdim=True)).sqrt()


def multi_normalize(x: Tensor, *, passes: int = 3, inplace: bool = False) -> Tensor:
    """Scale rows, then columns, to unit length, in turn.

    The scalings are found as two vectors from the squared entries (a Sinkhorn iteration) and applied once at the end, so
    that a pass costs two matrix-vector products instead of two reads and writes of the matrix.

    Args:
        x: Shape (..., m, n), floating.
        passes: How often rows and columns are normalized, at least once. Columns come last, so their lengths are exact.
        inplace: Whether the result may overwrite `x` (float32 or wider only).

    Returns:
        Shape (..., m, n), float32 or wider: `diag(a) x diag(b)` with columns of unit length, or zero where `x` is zero.

    Raises:
        ArgumentError: `passes` is below 1.

    Source: gradient multi-normalization, arXiv 2502.06742, algorithm 2 with row and column norms.
    """
    if passes < 1:
        raise ArgumentError(f"multi_normalize: passes={passes}; it must be at least 1")
    y = widen(x)
    peak = safe_reciprocal(largest_entry(y))
    squares = (y * peak).square_()
    columns = squares.new_ones((*x.shape[:-2], x.shape[-1], 1))
    for _ in range(passes):
        rows = safe_reciprocal(squares @ columns)
        columns = safe_reciprocal(squares.mT @ rows)
    row_scale, column_scale = rows.sqrt() * peak, columns.sqrt().mT
    if inplace and y is x:
        return x.mul_(row_scale).mul_(column_scale)
    return torch.mul(y, row_scale).mul_(column_scale)
