"""Kernels in Triton: what torch would read a matrix several times for, in one pass. To be imported where Triton is.

All work on a batch of matrices, (b, m, n) with any strides; the plain ways that give the same are in `normalize` and `rounding`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256  # of a block that is normalized
_BLOCK = 64  # rows and columns of a block of a weight
_INNER = 32  # columns of the factors that are multiplied at a time
_VECTOR = 1024


@triton.jit
def _normalize_pass(
    x, norm, energies, rows, partial, m, n, stride_b, stride_m, stride_n, tiny,
    IS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    start = x + batch.to(tl.int64) * stride_b + row[:, None].to(tl.int64) * stride_m
    unit = 1.0 / tl.load(norm + batch)
    lengths = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, n, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_in = (row < m)[:, None] & (column < n)[None, :]
        value = tl.load(start + column[None, :].to(tl.int64) * stride_n, mask=is_in, other=0.0).to(tl.float32) * unit
        square = value * value
        if not IS_FIRST:
            energy = tl.load(energies + batch * n + column, mask=column < n, other=0.0)
            square *= tl.where(energy >= tiny, 1.0 / tl.maximum(energy, tiny), 0.0)[None, :]
        lengths += tl.sum(square, axis=1)
    tl.store(rows + batch * m + row, lengths, mask=row < m)
    scale = tl.where(lengths >= tiny, 1.0 / tl.maximum(lengths, tiny), 0.0)
    # The same rows once more, from the cache.
    for first in range(0, n, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_in = (row < m)[:, None] & (column < n)[None, :]
        value = tl.load(start + column[None, :].to(tl.int64) * stride_n, mask=is_in, other=0.0).to(tl.float32) * unit
        found = tl.sum(value * value * scale[:, None], axis=0)
        tl.store(partial + (batch * tl.num_programs(0) + block) * n + column, found, mask=column < n)


def normalize_pass(x: Tensor, norm: Tensor, energies: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    b, m, n = x.shape
    blocks = triton.cdiv(m, block)
    rows = torch.empty((b, m), dtype=torch.float32, device=x.device)
    # Each block's own sums, so that the order of additions is always the same one.
    partial = torch.empty((b, blocks, n), dtype=torch.float32, device=x.device)
    _normalize_pass[(blocks, b)](
        x, norm, norm if energies is None else energies, rows, partial, m, n, *x.stride(), torch.finfo(torch.float32).tiny,
        IS_FIRST=energies is None, ROWS=block, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return rows, partial


@triton.jit
def _adam(
    gradient, mean, square, direction, new_mean, new_square, count, beta, beta2, mean_weight, square_weight, eps,
    VECTOR: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * VECTOR + tl.arange(0, VECTOR)
    is_in = place < count
    g = tl.load(gradient + place, mask=is_in, other=0.0).to(tl.float32)
    m = beta * tl.load(mean + place, mask=is_in, other=0.0) + (1.0 - beta) * g
    s = beta2 * tl.load(square + place, mask=is_in, other=0.0) + (1.0 - beta2) * g * g
    tl.store(direction + place, m / mean_weight / (tl.sqrt(s / square_weight) + eps), mask=is_in)
    tl.store(new_mean + place, m, mask=is_in)
    tl.store(new_square + place, s, mask=is_in)


def adam(gradient: Tensor, mean: Tensor, square: Tensor, *numbers: float) -> tuple[Tensor, Tensor, Tensor]:
    gradient, mean, square = gradient.contiguous(), mean.contiguous(), square.contiguous()
    made = torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)
    _adam[(triton.cdiv(mean.numel(), _VECTOR),)](gradient, mean, square, *made, mean.numel(), *numbers, VECTOR=_VECTOR)
    return made


@triton.jit
def _scales(
    first, rows, columns, norm, row_scale, column_scale, m, n, size, threshold, tiny, VECTOR: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(0)
    place = tl.arange(0, VECTOR)
    energy, count = tl.zeros((VECTOR,), dtype=tl.float32), tl.zeros((VECTOR,), dtype=tl.float32)
    for start in range(0, m, VECTOR):
        energy += tl.load(first + batch * m + start + place, mask=start + place < m, other=0.0)
    for start in range(0, n, VECTOR):
        length = tl.load(columns + batch * n + start + place, mask=start + place < n, other=0.0)
        count += tl.where(length >= tiny, 1.0, 0.0)
        found = tl.where(length >= tiny, tl.rsqrt(tl.maximum(length, tiny)), 0.0)
        tl.store(column_scale + batch * n + start + place, found, mask=start + place < n)
    factor = size / tl.load(norm + batch) * tl.rsqrt(tl.maximum(tl.sum(count, axis=0), 1.0))
    factor = tl.where(tl.sum(energy, axis=0) > threshold, factor, 0.0)
    for start in range(0, m, VECTOR):
        length = tl.load(rows + batch * m + start + place, mask=start + place < m, other=0.0)
        found = tl.where(length >= tiny, tl.rsqrt(tl.maximum(length, tiny)), 0.0) * factor
        tl.store(row_scale + batch * m + start + place, found, mask=start + place < m)


def scales(first: Tensor, rows: Tensor, columns: Tensor, norm: Tensor, size: float, threshold: float) -> tuple[Tensor, Tensor]:
    (b, m), n = rows.shape, columns.shape[-1]
    made = torch.empty_like(rows), torch.empty_like(columns)
    _scales[(b,)](first, rows, columns, norm, *made, m, n, size, threshold, torch.finfo(torch.float32).tiny, VECTOR=_VECTOR)
    return made


@triton.jit
def _subtract(
    weight, left, right, row_scale, dense, dense_rows, dense_columns, check, decay, m, n, r, lr, seed,
    weight_b, weight_m, weight_n, left_b, left_m, left_r, right_b, right_n, right_r, dense_b, dense_m, dense_n,
    HAS_PRODUCT: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_CHECK: tl.constexpr, IS_NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(n, BLOCK)
    batch = tl.program_id(1)
    row = tl.program_id(0) // column_blocks * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    row_in, column_in = row < m, column < n
    is_in = row_in[:, None] & column_in[None, :]
    wide_row, wide_column = row[:, None].to(tl.int64), column[None, :].to(tl.int64)
    change = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if HAS_PRODUCT:
        for first in range(0, r, INNER):
            inner = first + tl.arange(0, INNER)
            inner_in = inner < r
            a = tl.load(
                left + batch.to(tl.int64) * left_b + wide_row * left_m + inner[None, :] * left_r,
                mask=row_in[:, None] & inner_in[None, :], other=0.0,
            )  # fmt: skip
            c = tl.load(
                right + batch.to(tl.int64) * right_b + wide_column * right_n + inner[:, None] * right_r,
                mask=column_in[None, :] & inner_in[:, None], other=0.0,
            )  # fmt: skip
            change += tl.dot(a.to(tl.float32), c.to(tl.float32), input_precision=PRECISION)
        if HAS_ROW_SCALE:
            change *= tl.load(row_scale + batch * m + row, mask=row_in, other=0.0)[:, None]
    if HAS_DENSE:
        value = tl.load(dense + batch.to(tl.int64) * dense_b + wide_row * dense_m + wide_column * dense_n, mask=is_in, other=0.0)
        value = value.to(tl.float32)
        if HAS_ROWS:
            value *= tl.load(dense_rows + batch * m + row, mask=row_in, other=0.0)[:, None]
        if HAS_COLUMNS:
            value *= tl.load(dense_columns + batch * n + column, mask=column_in, other=0.0)[None, :]
        change += value
    place = weight + batch.to(tl.int64) * weight_b + wide_row * weight_m + wide_column * weight_n
    # Where the update is not finite nothing is written: neither its direction nor the decay.
    if HAS_CHECK:
        is_in = is_in & (
            tl.abs(tl.zeros((BLOCK, BLOCK), dtype=tl.float32) + tl.load(check).to(tl.float32)) <= 3.4028234663852886e38
        )
    new = tl.load(place, mask=is_in, other=0.0).to(tl.float32) * decay - lr * change
    if IS_NARROW:
        # A bfloat16 is the upper half of a float32: noise below the cut carries into it with the right probability.
        number = batch.to(tl.int64) * m * n + wide_row * n + wide_column
        noise = (tl.randint(seed, number.to(tl.int32)) & 0xFFFF).to(tl.int32)
        cut = ((new.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        largest = 3.3895313892515355e38
        cut = tl.minimum(tl.maximum(cut, -largest), largest)
        # What is not finite, as weights that already were not, stays so.
        is_number = tl.abs(new) <= 3.4028234663852886e38
        tl.store(place, tl.where(is_number, cut, new).to(tl.bfloat16), mask=is_in)
    else:
        tl.store(place, new, mask=is_in)


def subtract(
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
    b, m, n = weight.shape
    is_narrow = weight.dtype == torch.bfloat16
    # A bfloat16 is a tf32 number: nothing is rounded where both factors are in it.
    is_half = left is not None and right is not None and left.dtype == right.dtype == torch.bfloat16

    def strides(part: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if part is None else part.stride()

    def pointer(part: Tensor | None) -> Tensor:
        return weight if part is None else part

    _subtract[(triton.cdiv(m, _BLOCK) * triton.cdiv(n, _BLOCK), b)](
        weight, pointer(left), pointer(right), pointer(row_scale), pointer(dense), pointer(dense_rows), pointer(dense_columns),
        pointer(check), decay, m, n, 0 if left is None else left.shape[-1], lr, seed,
        *weight.stride(), *strides(left), *strides(right), *strides(dense),
        HAS_PRODUCT=left is not None, HAS_ROW_SCALE=row_scale is not None, HAS_DENSE=dense is not None,
        HAS_ROWS=dense_rows is not None, HAS_COLUMNS=dense_columns is not None, HAS_CHECK=check is not None,
        IS_NARROW=is_narrow, PRECISION="tf32" if is_narrow or is_half else "ieee", BLOCK=_BLOCK, INNER=_INNER,
    )  # fmt: skip
