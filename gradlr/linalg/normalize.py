"""Scaling rows and columns of a matrix to unit length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..tensors import device_traits, has_kernels, is_async, widest
from . import kernels
from .axes import REPLICATED, UNSHARDED, Axis, Layout

_PASSES = 3
# Entries whose squares are made at one time on a CPU: half a megabyte in float32, or a part of a larger matrix.
_BLOCK_NUMBERS = 2**17
_MOST_BLOCKS = 32


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or untouched where it is already that wide."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def largest_entry(x: Tensor) -> Tensor:
    """Largest absolute entry of each matrix of (..., m, n), of what lies in this process: (..., 1, 1), 0 where there is none."""
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-2], 1, 1))
    # Two reductions without a temporary: on the CPU many times faster than the infinity norm.
    return torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))


def squared_norm(x: Tensor) -> Tensor:
    """Sum of squares, 0-dim, in the widest dtype of the device; of numbers in float16 as well, whose squares would overflow."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return widest(norm).square()


def frobenius_norm(x: Tensor, axis: Axis = REPLICATED) -> Tensor:
    """Frobenius norm of each matrix of (..., m, r), of entries of any size: (..., 1, 1), float32 or wider, never below `tiny`.

    Args:
        x: Floating.
        axis: How its rows are spread.
    """
    # Squares of float32 neither overflow nor vanish in float64.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=device_traits(x.device).widest_float)
    if not axis.is_whole:
        norm = axis.all_reduce_sum(norm.square_()).sqrt_()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Never zero, in one operation with the cast: of what is larger the smallest normal number changes nothing.
    return torch.add(norm, torch.finfo(wide).tiny, out=torch.empty(norm.shape, dtype=wide, device=norm.device))


def normalize_columns(x: Tensor, axis: Axis = REPLICATED) -> Tensor:
    """`x` with every column scaled to unit length; a zero column stays zero.

    Args:
        x: Shape (..., m, r), floating, entries up to about 1e37 in float32; not modified.
        axis: How its rows are spread.

    Returns:
        Shape (..., m, r), float32 or wider.
    """
    x = widen(x)
    tiny = torch.finfo(x.dtype).tiny
    # Two scalings, so that squares neither overflow nor vanish.
    x = x / axis.column_peaks(x).clamp_(min=tiny)
    return x * axis.all_reduce_sum(x.square().sum(dim=-2, keepdim=True)).clamp_(min=tiny).rsqrt_()


def multi_normalize(x: Tensor, *, passes: int = _PASSES, inplace: bool = False, layout: Layout = UNSHARDED) -> Tensor:
    """Scale rows, then columns, to unit length, in turn.

    The scalings are found as two vectors from the squared entries (a Sinkhorn iteration) and applied once at the end, so
    that a pass costs two matrix-vector products instead of two reads and writes of the matrix.

    Args:
        x: Shape (..., m, n), floating.
        passes: How often rows and columns are normalized, at least once. Columns come last, so their lengths are exact.
        inplace: Whether the result may overwrite `x` (float32 or wider only).
        layout: How rows and columns are spread.

    Returns:
        Shape (..., m, n), float32 or wider: `diag(a) x diag(b)` with columns of unit length, or zero where `x` is zero.

    Raises:
        ArgumentError: `passes` is below 1.

    Source: gradient multi-normalization, arXiv 2502.06742, algorithm 2 with row and column norms.
    """
    if passes < 1:
        raise ArgumentError(f"multi_normalize: passes={passes}; it must be at least 1")
    y = widen(x)
    peak = layout.all_reduce_max(largest_entry(y))
    # What is subnormal counts as zero: its reciprocal would be infinite.
    unit = torch.where(peak >= torch.finfo(y.dtype).tiny, peak.reciprocal(), 0.0)
    rows, columns, _ = normalizing_scales(y, unit, layout, passes=passes)
    row_scale, column_scale = rows.sqrt_().mul_(unit), columns.sqrt_().mT
    return (y.mul_(row_scale) if inplace or y is not x else y * row_scale).mul_(column_scale)


def normalizing_scales(
    x: Tensor, unit: Tensor, layout: Layout = UNSHARDED, *, passes: int = _PASSES
) -> tuple[Tensor, Tensor, Tensor]:
    """What `multi_normalize` scales rows and columns of `x · unit` with, squared, and the sum of its squares.

    On a CPU the squares are made anew, a block of rows at a time, in each pass: what fits the cache costs less than a second
    matrix, which would be written and read five times and whose pages the system has to hand out.

    Args:
        x: Shape (..., m, n), floating.
        unit: (..., 1, 1), float32 or wider, so that squares are of ordinary size.
        layout: How rows and columns are spread.
        passes: How often rows and columns are normalized.

    Returns:
        (..., m, 1) and (..., n, 1), zero where a row or column is, and (..., 1, 1).
    """
    blocks, whole = _row_blocks(x, layout), layout.is_whole
    only = (x * unit).square_() if len(blocks) == 1 else None
    # One buffer for all of them: what a cache holds is written again for less than what the system hands out.
    buffer = None if only is not None or x.requires_grad else torch.empty_like(blocks[0], dtype=unit.dtype)
    tiny, columns, rows = torch.finfo(unit.dtype).tiny, unit, unit
    energies: list[Tensor] = []
    for number in range(passes):
        found, sums = [], []
        for block in blocks:
            squares = only
            if squares is None:
                out = None if buffer is None else buffer.narrow(-2, 0, block.shape[-2])
                squares = torch.mul(block, unit, out=out).square_()
            lengths = squares @ columns if number else squares.sum(dim=-1, keepdim=True)
            lengths = lengths if whole else layout.columns.all_reduce_sum(lengths)
            # Reciprocals of squared lengths, whose roots are taken once, by the caller. What is subnormal counts as zero.
            found.append(torch.threshold(lengths, tiny, torch.inf).reciprocal_())
            sums.append(squares.mT @ found[-1])
            if number == 0:
                energies.append(lengths.sum(dim=-2, keepdim=True))
        total = reduce(torch.add, sums)
        total = total if whole else layout.rows.all_reduce_sum(total)
        columns = torch.threshold(total, tiny, torch.inf).reciprocal_()
        rows = found[0] if len(found) == 1 else torch.cat(found, dim=-2)
    energy = reduce(torch.add, energies)
    return rows, columns, energy if whole else layout.rows.all_reduce_sum(energy)


def _row_blocks(x: Tensor, layout: Layout) -> Sequence[Tensor]:
    # One where each block would ask other processes, or where launches cost more than bytes.
    size = max(_BLOCK_NUMBERS, x.numel() // _MOST_BLOCKS)
    is_one = x.numel() <= size or not layout.columns.is_whole or is_async(x) or torch.compiler.is_compiling()
    return (x,) if is_one else x.split(max(1, size * x.shape[-2] // x.numel()), dim=-2)


def spread_scales(
    x: Tensor, norm: Tensor, size: float | Tensor, threshold: float, layout: Layout = UNSHARDED
) -> tuple[Tensor, Tensor]:
    """What rows and columns of a matrix are multiplied with, so that it is spread over them and has the Frobenius norm `size`.

    The scales of `multi_normalize`; all zero where the squared norm of the matrix is not above `threshold` times that of `norm`.

    Args:
        x: Shape (..., m, n), floating.
        norm: A norm (..., 1, 1), float32 or wider, that the matrix is measured by: with it, squares are of ordinary size.
        size: The norm wanted.
        threshold: Share of the squared norm, below which the matrix is rounding errors.
        layout: How rows and columns are spread.

    Returns:
        Scales of the rows (..., m, 1) and of the columns (..., 1, n).
    """
    if layout.is_whole and not isinstance(size, Tensor) and has_kernels(x):
        return _spread_scales_by_kernel(x, norm, size, threshold)
    unit = norm.reciprocal()
    rows, columns, energy = normalizing_scales(x, unit, layout)
    # Columns are of unit length or zero: the norm of order 0 counts those that are not. Where none is, neither is there energy.
    count = torch.linalg.vector_norm(columns, 0, dim=(-2, -1), keepdim=True)
    count = count if layout.is_whole else layout.columns.all_reduce_sum(count)
    factor = torch.where(energy > threshold, size * count.rsqrt_(), 0.0)
    return rows.sqrt_().mul_(unit * factor), columns.sqrt_().mT


def _spread_scales_by_kernel(x: Tensor, norm: Tensor, size: float, threshold: float) -> tuple[Tensor, Tensor]:
    batch, (m, n) = x.shape[:-2], x.shape[-2:]
    x, norm = x.reshape(-1, m, n), norm.reshape(-1)
    first, partial = kernels.normalize_pass(x, norm, None)
    for _ in range(_PASSES - 1):
        rows, partial = kernels.normalize_pass(x, norm, partial.sum(1))
    of_rows, of_columns = kernels.scales(first, rows, partial.sum(1), norm, size, threshold)
    return of_rows.reshape(*batch, m, 1), of_columns.reshape(*batch, 1, n)
