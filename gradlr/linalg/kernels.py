"""Operators that run as one kernel on a GPU: known to torch by name, so that they can be compiled, counted and faked.

Each stands in for a plain way, which is taken where `tensors.has_kernels` says no.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MOST_NUMBERS = 2**31  # of a matrix whose entries a kernel numbers
NORMALIZED_ROWS = 16  # of a block that a kernel normalizes


@cache
def _triton() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


# Defined by schema: torch's decorator for operators costs as much host time as ten launches.
_LIBRARY = torch.library.Library("gradlr", "DEF")
_LIBRARY.define(
    "adam(Tensor gradient, Tensor mean, Tensor square, float beta, float beta2, float mean_weight, float square_weight, "
    "float eps) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("normalize_pass(Tensor x, Tensor norm, Tensor? energies, int block) -> (Tensor, Tensor)")
_LIBRARY.define("scales(Tensor first, Tensor rows, Tensor columns, Tensor norm, float size, float threshold) -> (Tensor, Tensor)")
_LIBRARY.define(
    "subtract_(Tensor(a!) weight, Tensor? left, Tensor? right, Tensor? row_scale, Tensor? dense, Tensor? dense_rows, "
    "Tensor? dense_columns, Tensor? check, float decay, float lr, int seed) -> ()"
)


def adam(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    beta: float,
    beta2: float,
    mean_weight: float,
    square_weight: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction, and its moments after this gradient.

    Args:
        gradient: Any shape, float32 or bfloat16.
        mean, square: The moments, the same shape, float32.
        beta, beta2: Their decays.
        mean_weight, square_weight: Sums of the weights so far, 1 − βᵗ, that they are divided by.
        eps: Added to the root.
    """
    return torch.ops.gradlr.adam(gradient, mean, square, beta, beta2, mean_weight, square_weight, eps)


def normalize_pass(x: Tensor, norm: Tensor, energies: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scaling of rows and columns to unit length, found from one reading of the matrix.

    Args:
        x: (b, m, n), float32 or bfloat16.
        norm: (b,), float32: what the entries are divided by first, so that squares are of ordinary size.
        energies: (b, n), squared lengths of the columns after the pass before, whose reciprocals are the columns' scales; None
            for scales of one.

    Returns:
        Squared lengths of the rows (b, m), and (b, blocks, n), whose sums over the blocks are those of the columns of the
        matrix whose rows are of unit length.
    """
    return torch.ops.gradlr.normalize_pass(x, norm, energies, NORMALIZED_ROWS)


def scales(first: Tensor, rows: Tensor, columns: Tensor, norm: Tensor, size: float, threshold: float) -> tuple[Tensor, Tensor]:
    """What rows (b, m) and columns (b, n) are multiplied with after the last pass, so that the norm of the whole is `size`.

    Args:
        first, rows: Squared lengths of the rows in the first and in the last pass, (b, m).
        columns: Those of the columns in the last one, (b, n).
        norm: As for `normalize_pass`.
        size: The Frobenius norm wanted.
        threshold: All scales are zero where the squared norm is not above it, in units of `norm` squared.
    """
    return torch.ops.gradlr.scales(first, rows, columns, norm, size, threshold)


def subtract_(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    row_scale: Tensor | None,
    dense: Tensor | None,
    dense_rows: Tensor | None,
    dense_columns: Tensor | None,
    check: Tensor | None,
    decay: float,
    lr: float,
    seed: int,
) -> None:
    """`W ← decay · W − lr · D` in one pass, with the parts of an `Update`; bfloat16 is rounded stochastically.

    Args:
        weight: (b, m, n), float32 or bfloat16, any strides.
        left, right, row_scale, dense, dense_rows, dense_columns: (b, m, r), (b, n, r), (b, m), (b, m, n), (b, m), (b, n).
        check: 0-dim number, floating: where it is not finite nothing is written.
        decay: Factor on the weight.
        lr: Factor on the direction.
        seed: Of the rounding.
    """
    torch.ops.gradlr.subtract_(weight, left, right, row_scale, dense, dense_rows, dense_columns, check, decay, lr, seed)


@torch.library.impl(_LIBRARY, "adam", "CompositeExplicitAutograd")
def _(gradient: Tensor, mean: Tensor, square: Tensor, *numbers: float) -> tuple[Tensor, Tensor, Tensor]:
    return _triton().adam(gradient, mean, square, *numbers)


@torch.library.register_fake("gradlr::adam", lib=_LIBRARY)
def _(gradient: Tensor, mean: Tensor, square: Tensor, *numbers: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.impl(_LIBRARY, "normalize_pass", "CompositeExplicitAutograd")
def _(x: Tensor, norm: Tensor, energies: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    return _triton().normalize_pass(x, norm, energies, block)


@torch.library.impl(_LIBRARY, "scales", "CompositeExplicitAutograd")
def _(first: Tensor, rows: Tensor, columns: Tensor, norm: Tensor, size: float, threshold: float) -> tuple[Tensor, Tensor]:
    return _triton().scales(first, rows, columns, norm, size, threshold)


@torch.library.impl(_LIBRARY, "subtract_", "CompositeExplicitAutograd")
def _(weight: Tensor, *parts: Any) -> None:
    _triton().subtract(weight, *parts)
    torch.autograd.graph.increment_version(weight)


@torch.library.register_fake("gradlr::normalize_pass", lib=_LIBRARY)
def _(x: Tensor, norm: Tensor, energies: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    b, m, n = x.shape
    return x.new_empty((b, m), dtype=torch.float32), x.new_empty((b, -(-m // block), n), dtype=torch.float32)


@torch.library.register_fake("gradlr::scales", lib=_LIBRARY)
def _(first: Tensor, rows: Tensor, columns: Tensor, norm: Tensor, size: float, threshold: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(columns)


@torch.library.register_fake("gradlr::subtract_", lib=_LIBRARY)
def _(weight: Tensor, *parts: Any) -> None:
    return None
