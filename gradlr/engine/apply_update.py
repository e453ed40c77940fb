"""Writing an update into a weight: in place, in float32 or wider, rounded stochastically where the weight is narrower."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..layers import View
from ..linalg import stochastic_round
from ..rules import Rule, State, Update
from ..tensors import share_memory

# Entries of a weight that are widened, or of a product that is scaled, at one time: 4 MiB in float32.
_BLOCK_NUMBERS = 2**20


def write(
    parameter: Tensor, view: View, update: Update, *, lr: float, weight_decay: float | Tensor, generator: torch.Generator
) -> None:
    """`W ← (1 − ηλ) W − η (diag(row_scale) left rightᵀ + dense)`, in place.

    Args:
        parameter: W, any floating dtype; bfloat16 and float16 are updated in float32 and rounded stochastically, since updates
            far below half a unit in the last place vanish under rounding to nearest.
        view: How W becomes the update's (..., m, n).
        update: The direction; its `dense` part is overwritten.
        lr: η.
        weight_decay: λ, decoupled; a 0-dim tensor on W's device where only the device knows it.
        generator: Random numbers for the rounding, on W's device.
    """
    decay = 1 - lr * weight_decay
    weight = view.of(parameter)
    if update.rows is not None:
        _write_rows(weight, update, lr, decay, generator)
    else:
        for rows in _row_blocks(weight, is_whole=not _is_narrow(weight) and update.row_scale is None):
            _write_block(weight[rows], _block(update, rows), lr, decay, generator)
    if not share_memory(weight, parameter):
        parameter.copy_(view.back(weight, parameter.shape))


def _is_narrow(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _row_blocks(weight: Tensor, *, is_whole: bool) -> list[tuple]:
    # Indices of blocks of rows, so that what is widened or scaled on the way never has the size of the weight.
    if is_whole or weight.ndim < 2 or weight.numel() <= _BLOCK_NUMBERS:
        return [(...,)]
    size = max(1, _BLOCK_NUMBERS * weight.shape[-2] // weight.numel())
    return [(..., slice(start, start + size), slice(None)) for start in range(0, weight.shape[-2], size)]


def _block(update: Update, rows: tuple) -> Update:
    left, scale, dense = (None if part is None else part[rows] for part in (update.left, update.row_scale, update.dense))
    if scale is not None:
        left = left * scale
    return Update(left=left, right=update.right, dense=dense)


def _write_block(weight: Tensor, update: Update, lr: float, decay: float | Tensor, generator: torch.Generator) -> None:
    wide = weight.float() if _is_narrow(weight) else weight
    _subtract(wide, update, lr, decay)
    if wide is not weight:
        weight.copy_(stochastic_round(wide, weight.dtype, generator=generator))


def _write_rows(table: Tensor, update: Update, lr: float, decay: float | Tensor, generator: torch.Generator) -> None:
    if isinstance(decay, Tensor) or decay != 1:
        for rows in _row_blocks(table, is_whole=not _is_narrow(table)):
            _write_block(table[rows], Update(), lr, decay, generator)
    if not _is_narrow(table) or not len(update.rows):
        table.index_add_(0, update.rows, update.dense.to(table.dtype), alpha=-lr)
        return
    wide = table[update.rows].float().add_(update.dense, alpha=-lr)
    rounded = stochastic_round(wide, table.dtype, generator=generator)
    # The first row may come again with zeros in `dense`: it is written with one and the same value each time.
    is_again = (update.rows == update.rows[:1]).index_fill_(0, update.rows.new_zeros(1), False)
    places = torch.arange(len(update.rows), device=table.device).masked_fill_(is_again, 0)
    table.index_copy_(0, update.rows, rounded[places])


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast: products of sketches stay in float32 or wider, wherever the user calls backward or step."""
    return torch.autocast(device.type, enabled=False)


def checked(rule: Rule, result: tuple[Update, State], shape: torch.Size) -> tuple[Update, State]:
    """What a rule's `update` returned, where it belongs to a parameter whose view has the given shape.

    Raises:
        ArgumentError: it is no pair of an Update and a state.
        ShapeError: the update's parts have other shapes.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not (is_pair and isinstance(result[0], Update) and isinstance(result[1], dict)):
        found = type(result).__name__
        raise ArgumentError(f"rule {rule.name!r}: update() must return (gradlr.rules.Update(...), state), not {found}")
    update = result[0]
    found = {key: None if part is None else tuple(part.shape) for key, part in vars(update).items()}
    *batch, rows, columns = (1, 1, *shape) if len(shape) < 2 else shape
    dense_shape = shape if update.rows is None else (*update.rows.shape, columns)
    is_dense_right = update.dense is None or update.dense.shape == dense_shape
    is_low_rank_right = update.left is None and update.right is None
    if update.left is not None and update.right is not None:
        r = update.left.shape[-1]
        is_low_rank_right = found["left"] == (*batch, rows, r) and found["right"] == (*batch, columns, r)
    if not (is_dense_right and is_low_rank_right):
        tale = f"an update with parts of shapes {found} for a parameter seen as {tuple(shape)}"
        raise ShapeError(f"rule {rule.name!r} made {tale}; gradlr.rules.Update says what they must be")
    return result


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """0-dim boolean: whether the sums of all tensors are finite, and with them every entry. No synchronization on CUDA."""
    finite = [tensor.sum().isfinite() for tensor in tensors]
    return torch.stack(finite).all() if finite else torch.tensor(True, device="cpu")


def keep_where(is_finite: Tensor, update: Update, new_state: State, old_state: State) -> tuple[Update, State]:
    """The update and the new state, or zeros and the old state, without asking the host which; for CUDA.

    Args:
        is_finite: 0-dim boolean on the device: whether the gradient was finite.
        update: What the rule made of it.
        new_state: The rule's new state.
        old_state: The state before; an entry that has changed its shape stays the new one.
    """
    parts = {key: getattr(update, key) for key in ("left", "right", "row_scale")}
    kept = {key: None if value is None else torch.where(is_finite, value, 0.0) for key, value in parts.items()}
    if update.dense is not None:
        update.dense.masked_fill_(~is_finite, 0.0)
    state = {
        key: torch.where(is_finite, value, old_state[key]) if value.shape == old_state[key].shape else value
        for key, value in new_state.items()
    }
    return replace(update, **kept), state


def _subtract(weight: Tensor, update: Update, lr: float, decay: float | Tensor) -> None:
    if isinstance(decay, Tensor):
        weight.mul_(decay)
        decay = 1.0
    if update.dense is None and update.left is not None:
        _add_product(weight, update.left, update.right, decay, -lr)
        return
    if update.left is not None:
        _add_product(update.dense, update.left, update.right, 1.0, 1.0)
    if decay != 1:
        weight.mul_(decay)
    if update.dense is not None:
        weight.add_(update.dense, alpha=-lr)


def _add_product(target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    # target ← beta · target + alpha · left rightᵀ, without a temporary of the target's size.
    if target.ndim == 2:
        target.addmm_(left, right.mT, beta=beta, alpha=alpha)
    else:
        flat = target.reshape(-1, *target.shape[-2:])
        flat.baddbmm_(left.reshape(-1, *left.shape[-2:]), right.mT.reshape(-1, *right.mT.shape[-2:]), beta=beta, alpha=alpha)
