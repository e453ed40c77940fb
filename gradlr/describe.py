"""What `repr(opt)` shows: every parameter with what it became, and the totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .optimizer import GradLR
    from .slots import Slot


def describe(optimizer: GradLR) -> str:
    """A table with one line per parameter: name, shape, kind, view, rule, rank, momentum rank, capture, lr, bytes of state."""
    rows = [("parameter", "shape", "kind", "view", "rule", "rank/most", "k", "capture", "lr", "state")]
    rows += [_row(optimizer, slot) for slot in optimizer.slots]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f'GradLR(apply="{optimizer.apply}")', *("  " + line for line in lines), "  " + _totals(optimizer)])


def _row(optimizer: GradLR, slot: Slot) -> tuple[str, ...]:
    state = optimizer.state[slot.plan.parameter]
    size = sum(value.numel() * value.element_size() for key, value in state.items() if key not in ("step", "spectrum"))
    is_matrix = not slot.rule.needs_dense
    shape = " x ".join(str(axis) for axis in slot.plan.parameter.shape) or "scalar"
    view = " x ".join(str(axis) for axis in slot.plan.shape) if slot.plan.view.pattern else "as it is"
    ranks = (f"{slot.rank}/{slot.largest_rank}", str(slot.momentum_rank), slot.capture) if is_matrix else ("", "", slot.capture)
    rate = f"{float(optimizer.param_groups[slot.group_index]['lr']):.3g}"
    return slot.plan.name, shape, slot.plan.kind, view, slot.rule.name, *ranks, rate, format_bytes(size)


def _totals(optimizer: GradLR) -> str:
    weights = sum(slot.plan.parameter.numel() for slot in optimizer.slots)
    state = optimizer.state_bytes()
    adamw = 8 * weights
    share = f", {state / adamw:.1%} of AdamW's {format_bytes(adamw)}" if adamw else ""
    return f"{len(optimizer.slots)} parameters, {weights:,} weights, state {format_bytes(state)}{share}"


def format_bytes(count: float) -> str:
    """A number of bytes for reading: 1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
