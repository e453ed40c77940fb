"""What `repr(opt)` and `opt.report()` show: a line per parameter, and the totals beside AdamW's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.record import ParamRecord, rule_entries, state_bytes
from ..gradient import Dense
from ..linalg.normalize import squared_norm
from ..params.kinds import KINDS, VECTOR
from ..tensors import widest
from .figure import draw
from .metrics import mean_stable_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two moments in float32.
ADAMW_BYTES_PER_WEIGHT = 8

# What a logger needs not see.
_CONSTANTS = ("weights", "largest_rank", "momentum_rank", "steps", "step")

_NOT_OBSERVED = "Captured energy, gradient and update are seen at an update only: put `with opt.observe():` around a step."
_LEGEND = (
    "energy: share of the squared gradient norm inside the r directions; stable rank: of the gradient G, and of the momentum M; "
    "update: norm of the change, and relative to the weight's."
)
_PROJECTED = "(p): of a projection of the gradient, which is all that is known."


@dataclass(frozen=True)
class ParameterReport:
    """One parameter at the moment of asking.

    Attributes:
        name, shape, kind: As `print(opt)` shows them.
        is_projected: Whether the gradient's numbers are those of a projection of it.
        numbers: By name, what there is and is finite. Always "state_bytes" of its rule, "steps", and "weight_norm" ‖W‖. Where the
            rule compresses "rank" r of the next update, "largest_rank" and "momentum_rank" k, and "momentum_stable_rank"
            ‖M‖_F² / ‖M‖₂² of the momentum, in [1, k]. Of the last observed update what `UpdateMetrics` documents: "step",
            "gradient_norm", "stable_rank", "energy", "update_norm", "relative_update".
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    is_projected: bool
    numbers: dict[str, float]


@dataclass(frozen=True)
class Report:
    """All parameters of an optimizer, in the order of `param_groups`: print it, `plot()` it, or log its `scalars()`."""

    rows: tuple[ParameterReport, ...]

    @property
    def totals(self) -> dict[str, float]:
        """Over all parameters, by name; what nothing is known of is left out.

        Returns:
            "weights", "state_bytes", "state_share" of what AdamW would keep, and "rank_mean" of those that have a rank; of the
            observed ones "gradient_norm", "update_norm", and "energy", the captured share of all their squared gradients.
        """
        weights, size = sum(math.prod(row.shape) for row in self.rows), sum(_known(self.rows, "state_bytes"))
        share = {"state_share": size / (ADAMW_BYTES_PER_WEIGHT * weights)} if weights else {}
        ranks = _known(self.rows, "rank")
        # Shares do not add; the energies that they are shares of do.
        captured = [row.numbers for row in self.rows if "energy" in row.numbers]
        whole = math.fsum(one["gradient_norm"] ** 2 for one in captured)
        part = math.fsum(one["energy"] * one["gradient_norm"] ** 2 for one in captured)
        means = {"rank_mean": sum(ranks) / len(ranks)} if ranks else {}
        means |= {"energy": part / whole} if whole else {}
        return {"weights": weights, "state_bytes": size, **share, **means, **_joint(self.rows, "gradient_norm", "update_norm")}

    def scalars(self) -> dict[str, float]:
        """Finite floats by name, for `SummaryWriter.add_scalar` one by one, or `wandb.log` at once.

        Returns:
            The totals as `"gradlr/state_bytes"` and the like, and each parameter's numbers: `"gradlr/rank/blocks.0.qkv.weight"`.
        """
        found = {f"gradlr/{name}": value for name, value in self.totals.items()}
        found |= {f"gradlr/{name}/{row.name}": value for row in self.rows for name, value in row.numbers.items()}
        return {name: float(value) for name, value in found.items() if name.split("/")[1] not in _CONSTANTS}

    def plot(self) -> Figure:
        """Draw ranks, and where updates were observed captured energy and relative size of the update, with matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            ArgumentError: no parameter has a rank.
        """
        return draw({row.name: row.numbers for row in self.rows if "rank" in row.numbers})

    def __str__(self) -> str:
        # Vectors are many and small: one line for all of them.
        vectors = [row for row in self.rows if KINDS[row.kind].is_vector]
        rows = [row for row in self.rows if not KINDS[row.kind].is_vector] + ([_joined(vectors)] if len(vectors) > 1 else vectors)
        totals = self.totals
        ends = {"rank_mean": "mean rank {:.3g}", "energy": "captured energy {:.1%}", "update_norm": "norm of the update {:.3g}"}
        last = [_state_message(len(self.rows), int(totals["weights"]), totals["state_bytes"])]
        last += [text.format(totals[name]) for name, text in ends.items() if name in totals]
        notes = [_LEGEND if _known(self.rows, "step") else _NOT_OBSERVED]
        notes += [_PROJECTED] if any(row.is_projected for row in self.rows) else []
        table = aligned(list(_COLUMNS), [[cell(row) for cell in _COLUMNS.values()] for row in rows])
        return "\n".join([*table, ", ".join(last), *notes])

    __repr__ = __str__


def report(records: Iterable[ParamRecord], state: Mapping[Tensor, dict[str, Tensor]]) -> Report:
    """What the optimizer with these records and this state holds now."""
    return Report(tuple(_row(record, state[record.plan.parameter]) for record in records))


def describe(
    records: Sequence[ParamRecord],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    **options: str | float | None,
) -> str:
    """A table with one line per parameter, of the optimizer's records, `param_groups` and state; its title names the options."""
    rows, sizes = [], [state_bytes(state[record.plan.parameter]) for record in records]
    for record, size in zip(records, sizes, strict=True):
        plan, group = record.plan, groups[record.group_index]
        view = _format_shape(plan.shape) if plan.view.pattern else "as it is"
        ranks = (f"{record.rank}/{record.largest_rank}", f"{record.momentum_rank or ''}") if record.rule.has_rank else ("", "")
        scale = "" if group["lr_scale"] == 1 else f" x {group['lr_scale']:.3g}"
        rates = (f"{float(group['lr']):.3g}{scale}", f"{float(group['weight_decay']):.3g}" if group["weight_decay"] else "")
        what = (plan.name, _format_shape(plan.parameter.shape), plan.kind, view, record.rule.name)
        rows.append((*what, *ranks, record.capture, *rates, format_bytes(size)))
    header = ("parameter", "shape", "kind", "view", "rule", "rank/most", "k", "capture", "lr", "decay", "state")
    given = {name: value for name, value in options.items() if value is not None}
    texts = [f'{name}="{value}"' if isinstance(value, str) else f"{name}={value:g}" for name, value in given.items()]
    title = f"GradLR({', '.join(texts)})"
    totals = _state_message(len(records), sum(record.plan.here.numel() for record in records), sum(sizes))
    totals += "" if all(record.plan.layout.is_whole for record in records) else " (in this process)"
    return "\n  ".join([title, *aligned(header, rows), totals])


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell; a column with nothing below its title is left out."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def format_bytes(count: float) -> str:
    """A number of bytes for reading: 1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _state_message(parameters: int, weights: int, state: float) -> str:
    adamw = ADAMW_BYTES_PER_WEIGHT * weights
    share = f", {state / adamw:.1%} of AdamW's {format_bytes(adamw)}" if adamw else ""
    return f"{parameters} parameters, {weights:,} weights, state {format_bytes(state)}{share}"


def _format_shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "scalar"


def _number(name: str, spec: str = ".3g") -> Callable[[ParameterReport], str]:
    return lambda row: format(row.numbers[name], spec) if name in row.numbers else ""


_COLUMNS: dict[str, Callable[[ParameterReport], str]] = {
    "parameter": lambda row: row.name,
    "shape": lambda row: _format_shape(row.shape),
    "rank/most": lambda row: "{rank}/{largest_rank}".format(**row.numbers) if "rank" in row.numbers else "",
    "k": _number("momentum_rank", "d"),
    "energy": _number("energy", ".1%"),
    "stable rank G": _number("stable_rank"),
    "stable rank M": _number("momentum_stable_rank"),
    "norm of G": lambda row: _number("gradient_norm")(row) + (" (p)" if row.is_projected else ""),
    "update": _number("update_norm"),
    "relative": _number("relative_update"),
    "norm of W": _number("weight_norm"),
    "state": lambda row: format_bytes(row.numbers["state_bytes"]),
}


def _row(record: ParamRecord, state: dict[str, Tensor]) -> ParameterReport:
    plan, steps = record.plan, int(state["step"])
    numbers: dict[str, Any] = {"steps": steps, "state_bytes": state_bytes(state)}
    numbers["weight_norm"] = squared_norm(plan.parameter.detach()).sqrt()
    if record.rule.has_rank:
        numbers |= {"rank": record.rank, "largest_rank": record.largest_rank, "momentum_rank": record.momentum_rank}
    factors = record.rule.momentum(rule_entries(state))
    if factors is not None and steps:
        # The singular values of left rightᵀ are those of the k × k product of the two triangular factors.
        left, right = (torch.linalg.qr(widest(factor), mode="r").R for factor in factors)
        numbers["momentum_stable_rank"] = mean_stable_rank(Dense(left @ right.mT))
    numbers |= {} if record.metrics is None else vars(record.metrics)
    is_projected = bool(numbers.pop("is_projected", False))
    read = {name: float(value) if isinstance(value, Tensor) else value for name, value in numbers.items() if value is not None}
    finite = {name: value for name, value in read.items() if math.isfinite(value)}
    return ParameterReport(plan.name, tuple(plan.parameter.shape), plan.kind, is_projected, finite)


def _joined(rows: Sequence[ParameterReport]) -> ParameterReport:
    norms = _joint(rows, "weight_norm", "gradient_norm", "update_norm")
    weights = sum(math.prod(row.shape) for row in rows)
    numbers = {"state_bytes": sum(_known(rows, "state_bytes")), **norms}
    return ParameterReport(f"{len(rows)} vectors", (weights,), VECTOR, is_projected=False, numbers=numbers)


def _known(rows: Iterable[ParameterReport], name: str) -> list[float]:
    return [row.numbers[name] for row in rows if name in row.numbers]


def _joint(rows: Sequence[ParameterReport], *norms: str) -> dict[str, float]:
    known = {name: _known(rows, name) for name in norms}
    return {name: math.hypot(*values) for name, values in known.items() if values}
