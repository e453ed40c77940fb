"""Writing an update into a weight: in place, in float32 or wider, rounded stochastically where the weight is narrower."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gradient import RowsOnDemand
from ..layers import View
from ..linalg import kernels, stochastic_round
from ..linalg.blocks import pieces
from ..linalg.int8 import Int8Weight, subtracted
from ..linalg.normalize import widen
from ..rules import Update
from ..tensors import has_kernels, share_memory

# Entries of a weight that are widened, or of a product that is scaled, at one time: 4 MiB in float32.
_BLOCK_NUMBERS = 2**20
# The same where a kernel writes them: fewer launches, 32 MiB.
_KERNEL_NUMBERS = 2**23
# The same of int8 codes, which are widened three times over: or a part of a larger weight, so that no GPU is asked too often.
_CODE_NUMBERS = 2**15
_NARROW = (torch.bfloat16, torch.float16)


def apply_update(
    parameter: Tensor,
    view: View,
    update: Update,
    *,
    lr: float,
    weight_decay: float,
    generator: torch.Generator | None,
    check: Tensor | None = None,
    is_mirrored: bool = False,
) -> None:
    """`W ← (1 − ηλ) W − η D` with the direction D of an `Update`, in place: one kernel on a GPU with Triton.

    Args:
        parameter: W, any floating dtype; bfloat16 and float16 are updated in float32 and rounded stochastically, since updates
            far below half a unit in the last place vanish under rounding to nearest.
        view: How W becomes the update's (..., m, n).
        update: The direction; its `dense` part is overwritten. What is made on demand is made once.
        lr: η.
        weight_decay: λ, decoupled.
        generator: Random numbers for the rounding, on W's device; None where nothing is rounded.
        check: 0-dim number that only the device knows: W stays as it is where it is not finite. None where all is well.
        is_mirrored: Whether int8 codes are rounded by 1 − θ in the place of each random number θ.
    """
    decay = 1 - lr * weight_decay
    weight = parameter if view.pattern is None else view.of(parameter)
    if isinstance(weight, Int8Weight):
        _write_codes(weight, update, lr, decay, generator, check, is_mirrored)
    elif has_kernels(weight) and _suits_kernel(weight, update):
        _subtract_by_kernel(weight, update, lr, decay, generator, check)
    elif isinstance(update.dense, RowsOnDemand) and has_kernels(weight):
        for number, rows in enumerate(_row_blocks(weight, update, _KERNEL_NUMBERS)):
            _subtract_by_kernel(weight[rows], update.block(rows), lr, decay, generator, check, number)
    else:
        factor: float | Tensor = decay
        if check is not None:
            update, factor = _masked(weight, update, decay, check.isfinite())
        if update.rows is not None and isinstance(update.dense, Tensor):
            _write_rows(weight, update.rows, update.dense, lr, factor, generator)
        elif weight.dtype in _NARROW or update.row_scale is not None or isinstance(update.dense, RowsOnDemand):
            _write_in_blocks(weight, update, lr, factor, generator)
        else:
            _subtract(weight, update, lr, factor)
    if view.pattern is not None and not share_memory(weight, parameter):
        parameter.copy_(view.back(weight, parameter.shape))


def _suits_kernel(weight: Tensor, update: Update) -> bool:
    return (
        update.rows is None
        and not isinstance(update.left, RowsOnDemand)
        and not isinstance(update.dense, RowsOnDemand)
        and 0 < weight.numel() < kernels.MOST_NUMBERS
        and all(part.dtype in (torch.float32, torch.bfloat16) for part in update.parts())
    )


def _subtract_by_kernel(
    weight: Tensor,
    update: Update,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    check: Tensor | None,
    number: int = 0,
) -> None:
    seed = 0 if generator is None else (generator.initial_seed() + number) % 2**31  # of each block its own

    def matrices(part: Tensor | RowsOnDemand | None) -> Tensor | None:
        return _batched(part) if isinstance(part, Tensor) else None

    def vectors(part: Tensor | None) -> Tensor | None:
        return None if part is None else _batched(part).flatten(1)

    kernels.subtract_(
        _batched(weight), matrices(update.left), matrices(update.right), vectors(update.row_scale), matrices(update.dense),
        vectors(update.dense_rows), vectors(update.dense_columns), check, decay, lr, seed,
    )  # fmt: skip


def _batched(part: Tensor) -> Tensor:
    """A part with one axis for the batch before its last two."""
    part = torch.atleast_2d(part)
    return part.unsqueeze(0) if part.ndim == 2 else part.flatten(0, -3)


def _masked(weight: Tensor, update: Update, decay: float, is_finite: Tensor) -> tuple[Update, float | Tensor]:
    """The update and the factor on the weight, or zeros and one where the flag says so, without asking the host which."""
    parts = {key: getattr(update, key) for key in ("left", "right", "row_scale", "dense_rows", "dense_columns")}
    kept = {key: None if value is None else _where(is_finite, value) for key, value in parts.items()}
    if isinstance(update.dense, RowsOnDemand):
        kept |= {"dense": _scaled_rows(update.dense, update.dense_rows).where(is_finite), "dense_rows": None}
    elif update.dense is not None:
        update.dense.masked_fill_(~is_finite, 0.0)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return replace(update, **kept), decay if decay == 1 else 1 - (1 - decay) * is_finite.to(wide)


def _scaled_rows(dense: RowsOnDemand, scale: Tensor | None) -> RowsOnDemand:
    # Read once the rows are made, which may fill it.
    return dense if scale is None else dense.mapped(lambda rows, block: block.mul_(scale[rows]))


def _where(is_finite: Tensor, part: Tensor | RowsOnDemand) -> Any:
    return part.where(is_finite) if isinstance(part, RowsOnDemand) else torch.where(is_finite, part, 0.0)


def _write_in_blocks(weight: Tensor, update: Update, lr: float, decay: float | Tensor, generator: torch.Generator | None) -> None:
    """A block of rows at a time, so that what is widened or scaled on the way never has the size of the weight."""
    if update.row_scale is not None and update.right is not None:
        update = replace(update, right=widen(update.right))  # as the other factor is once it is scaled
    for rows in _row_blocks(weight, update, _BLOCK_NUMBERS):
        block, part = weight[rows], _scaled_block(update, rows)
        wide = block.float() if weight.dtype in _NARROW else block
        _subtract(wide, part, lr, decay)
        if wide is not block:
            block.copy_(stochastic_round(wide, weight.dtype, generator=generator))


def _scaled_block(update: Update, rows: tuple[Any, ...]) -> Update:
    part = update.block(rows)
    if isinstance(part.left, Tensor) and part.row_scale is not None:
        part.left = part.left * part.row_scale
    return part


def _row_blocks(weight: Tensor, update: Update, most: int) -> list[tuple[Any, ...]]:
    """Blocks in which neither the weight nor what an update has on its left, or makes on demand, has more numbers than that."""
    if weight.ndim < 2 or not weight.numel():
        return [(...,)]
    rank = 0 if update.left is None else update.left.shape[-1]
    rank = max(rank, update.dense.row_numbers) if isinstance(update.dense, RowsOnDemand) else rank
    numbers = weight.numel() * max(1, rank / weight.shape[-1])
    if numbers <= most:
        return [(...,)]
    return [(..., piece, slice(None)) for piece in pieces(weight.shape[-2], numbers / weight.shape[-2], most)]


def _write_codes(
    weight: Int8Weight,
    update: Update,
    lr: float,
    decay: float | Tensor,
    generator: torch.Generator | None,
    check: Tensor | None,
    is_mirrored: bool,
) -> None:
    """Into int8 codes, in their own unit, a block of rows at a time."""
    if check is not None:
        update, decay = _masked(weight, update, float(decay), check.isfinite())
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    direction, write = weight.direction.to(wide), partial(subtracted, generator=generator, is_mirrored=is_mirrored)
    if update.rows is None or isinstance(decay, Tensor) or decay != 1:
        parts = update if update.rows is None else Update()
        parts = parts if parts.right is None else replace(parts, right=parts.right.to(wide))
        for rows in _row_blocks(weight.codes, parts, max(_CODE_NUMBERS, weight.numel() // 32)):
            codes, scales = weight.codes[rows], weight.scales[rows]
            change, part = torch.zeros(codes.shape, dtype=wide, device=codes.device), _scaled_block(parts, rows)
            part.left = part.left.to(wide) if isinstance(part.left, Tensor) else None
            _subtract(change, part, -lr, 1.0)
            new_codes, new_scales, error = write(codes, scales, change, weight.group, decay=decay)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
            weight.correction[rows].mul_(decay).sub_(error @ direction)
    if update.rows is not None and isinstance(update.dense, Tensor) and len(update.rows):
        places, change = _places_of_equal(update.rows), update.dense.to(wide) * lr
        codes, scales = weight.codes[update.rows], weight.scales[update.rows]
        new_codes, new_scales, error = write(codes, scales, change, weight.group, decay=1.0)
        correction = weight.correction[update.rows].sub_(error @ direction)
        for old, new in ((weight.codes, new_codes), (weight.scales, new_scales), (weight.correction, correction)):
            old.index_copy_(0, update.rows, new[places])
    torch.autograd.graph.increment_version(weight)


def _places_of_equal(rows: Tensor) -> Tensor:
    """For each row number the place of its first: the first may come again with zeros in its values."""
    # It is written with one and the same value each time.
    is_again = rows.eq(rows[:1]).index_fill_(0, rows.new_zeros(1), False)
    return torch.arange(len(rows), device=rows.device).masked_fill_(is_again, 0)


def _write_rows(
    table: Tensor, rows: Tensor, values: Tensor, lr: float, decay: float | Tensor, generator: torch.Generator | None
) -> None:
    is_narrow = table.dtype in _NARROW
    if isinstance(decay, Tensor) or decay != 1:
        if is_narrow:
            _write_in_blocks(table, Update(), lr, decay, generator)
        else:
            table.mul_(decay)
    if not is_narrow or not len(rows):
        table.index_add_(0, rows, values.to(table.dtype), alpha=-lr)
        return
    wide = table[rows].float().add_(values, alpha=-lr)
    rounded = stochastic_round(wide, table.dtype, generator=generator)
    table.index_copy_(0, rows, rounded[_places_of_equal(rows)])


def _subtract(weight: Tensor, update: Update, lr: float, decay: float | Tensor) -> None:
    left, right, dense = update.left, update.right, update.dense
    if isinstance(decay, Tensor):
        weight.mul_(decay)
        decay = 1.0
    if isinstance(dense, Tensor) and update.dense_rows is not None:
        # In place where no wider numbers come of it; rounding errors of a narrow dense part are its rule's affair.
        dense = dense.mul_(update.dense_rows)
    if isinstance(left, Tensor) and right is not None:
        if isinstance(dense, Tensor) and weight.ndim == 2 and decay == 1 and weight.dtype == dense.dtype == left.dtype:
            # All of the direction in the dense part's buffer: the weight, which no cache holds, is read once, not twice.
            dense = dense if update.dense_columns is None else dense.mul_(update.dense_columns)
            weight.add_(dense.addmm_(left, right.mT), alpha=-lr)
            return
        _add_product(weight, left, right, decay, -lr)
    elif decay != 1:
        weight.mul_(decay)
    if not isinstance(dense, Tensor):
        return
    if update.dense_columns is not None:
        weight.addcmul_(dense, update.dense_columns, value=-lr)
    else:
        weight.add_(dense, alpha=-lr)


def _add_product(target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    # target ← beta · target + alpha · left rightᵀ, without a temporary of the target's size.
    if target.ndim == 2:
        target.addmm_(left, right.mT, beta=beta, alpha=alpha)
    else:
        flat = target.reshape(-1, *target.shape[-2:])
        flat.baddbmm_(left.reshape(-1, *left.shape[-2:]), right.mT.reshape(-1, *right.mT.shape[-2:]), beta=beta, alpha=alpha)
