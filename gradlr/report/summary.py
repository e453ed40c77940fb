"""What `repr(opt)` shows: every parameter with what it became, and the totals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..engine.record import ParamRecord, state_bytes

if TYPE_CHECKING:
    from ..optimizer import GradLR

# Two moments in float32.
ADAMW_BYTES_PER_WEIGHT = 8


def describe(optimizer: GradLR) -> str:
    """A table with one line per parameter: name, shape, kind, view, rule, rank, momentum rank, capture, lr, bytes of state.

    Weight decay is a column where any parameter has it.
    """
    header = ("parameter", "shape", "kind", "view", "rule", "rank/most", "k", "capture", "lr", "state")
    rows = [header, *(_row(optimizer, record) for record in optimizer.records)]
    decays = [float(optimizer.param_groups[record.group_index]["weight_decay"]) for record in optimizer.records]
    if any(decays):
        decays = ["decay", *(f"{decay:.3g}" if decay else "" for decay in decays)]
        rows = [(*row[:-1], decay, row[-1]) for row, decay in zip(rows, decays, strict=True)]
    return "\n".join([_title(optimizer), *("  " + line for line in aligned(rows)), "  " + _totals(optimizer)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _title(optimizer: GradLR) -> str:
    options = {"apply": f'"{optimizer.apply}"'}
    if optimizer.processes > 1:
        options["processes"] = str(optimizer.processes)
    limits = {"max_grad_norm": optimizer.clipper.max_norm}
    options |= {name: f"{value:g}" for name, value in limits.items() if value is not None}
    return f"GradLR({', '.join(f'{name}={value}' for name, value in options.items())})"


def written_shape(sizes: Iterable[int]) -> str:
    """A shape for reading: (4, 8) → '4 x 8'."""
    return " x ".join(map(str, sizes)) or "scalar"


def _row(optimizer: GradLR, record: ParamRecord) -> tuple[str, ...]:
    size = state_bytes(optimizer.state[record.plan.parameter])
    is_matrix = not record.rule.is_elementwise
    shape = written_shape(record.plan.parameter.shape)
    view = written_shape(record.plan.shape) if record.plan.view.pattern else "as it is"
    ranks = (
        (f"{record.rank}/{record.largest_rank}", str(record.momentum_rank), record.capture)
        if is_matrix
        else ("", "", record.capture)
    )
    rate = f"{float(optimizer.param_groups[record.group_index]['lr']):.3g}"
    return record.plan.name, shape, record.plan.kind, view, record.rule.name, *ranks, rate, format_bytes(size)


def _totals(optimizer: GradLR) -> str:
    weights = sum(record.plan.here.numel() for record in optimizer.records)
    is_sharded = any(not record.plan.layout.is_whole for record in optimizer.records)
    return state_message(len(optimizer.records), weights, optimizer.state_bytes()) + (" (in this process)" if is_sharded else "")


def state_message(parameters: int, weights: int, state: int) -> str:
    """How many parameters and weights there are, and what their state takes beside AdamW's."""
    adamw = ADAMW_BYTES_PER_WEIGHT * weights
    share = f", {state / adamw:.1%} of AdamW's {format_bytes(adamw)}" if adamw else ""
    return f"{parameters} parameters, {weights:,} weights, state {format_bytes(state)}{share}"


def format_bytes(count: float) -> str:
    """A number of bytes for reading: 1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
