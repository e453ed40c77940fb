"""A report as a table: plain text, `rich`, HTML. One list of columns for all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from math import hypot
from typing import TYPE_CHECKING, Any

from .summary import aligned, format_bytes, state_message, written_shape

if TYPE_CHECKING:
    from .contents import ParameterReport, Report

NOT_OBSERVED = "Captured energy, gradient and update are seen at an update only: put `with opt.observe():` around a step."
LEGEND = (
    "energy: share of the squared gradient norm inside the r directions; stable rank: of the gradient G, and of the momentum M; "
    "update: norm of the change, and relative to the weight's."
)
PROJECTED = "(p): of a projection of the gradient, which is all that is known."


@dataclass(frozen=True)
class Column:
    """One column: what a cell says, the share of its bar in [0, 1] where it has one, and whether a narrow terminal has it."""

    title: str
    cell: Callable[[ParameterReport], str]
    share: Callable[[ParameterReport], float | None] = lambda row: None
    is_text: bool = False
    is_narrow: bool = True


def _number(name: str) -> Callable[[ParameterReport], str]:
    def cell(row: ParameterReport) -> str:
        value = getattr(row, name)
        return "" if value is None else f"{value:.3g}"

    return cell


def _rank(row: ParameterReport) -> str:
    return "" if row.rank is None else f"{row.rank}/{row.largest_rank}"


def _gradient_norm(row: ParameterReport) -> str:
    return _number("gradient_norm")(row) + (" (p)" if row.is_projected else "")


_STANDING = (
    Column("parameter", lambda row: row.name, is_text=True),
    Column("shape", lambda row: written_shape(row.shape), is_text=True, is_narrow=False),
    Column("rank/most", _rank, lambda row: None if row.rank is None else row.rank / row.largest_rank),
    Column("k", lambda row: "" if row.momentum_rank is None else str(row.momentum_rank)),
)
_SEEN = (
    Column("energy", lambda row: "" if row.energy is None else f"{row.energy:.1%}", lambda row: row.energy),
    Column("stable rank G", _number("stable_rank")),
)
_MOMENTUM = Column("M", _number("momentum_stable_rank"))
_SIZES = (
    Column("norm of G", _gradient_norm, is_narrow=False),
    Column("update", _number("update_norm"), is_narrow=False),
    Column("relative", _number("relative_update")),
)
_LAST = (
    Column("norm of W", _number("weight_norm"), is_narrow=False),
    Column("state", lambda row: format_bytes(row.state_bytes)),
)


def columns_of(report: Report) -> list[Column]:
    """The columns that have something to say."""
    seen, sizes = (_SEEN, _SIZES) if report.is_observed else ((), ())
    momentum = _MOMENTUM if seen else Column("stable rank M", _MOMENTUM.cell)
    return [*_STANDING, *seen, momentum, *sizes, *_LAST]


def rows_of(report: Report) -> list[ParameterReport]:
    """A line per matrix and table; one for all vectors together, which are many and small."""
    vectors = [row for row in report.rows if row.kind == "vector"]
    rows = [row for row in report.rows if row.kind != "vector"]
    return [*rows, _together(vectors)] if len(vectors) > 1 else [*rows, *vectors]


def _together(rows: list[ParameterReport]) -> ParameterReport:
    whole = replace(
        rows[0],
        name=f"{len(rows)} vectors",
        shape=(sum(row.weights for row in rows),),
        state_bytes=sum(row.state_bytes for row in rows),
        is_projected=False,
        relative_update=None,
    )
    norms = ("weight_norm", "gradient_norm", "update_norm")
    known = {name: [value for row in rows if (value := getattr(row, name)) is not None] for name in norms}
    return replace(whole, **{name: hypot(*values) if values else None for name, values in known.items()})


def totals_of(report: Report) -> str:
    """The last line."""
    parts = [state_message(len(report.rows), report.weights, report.state_bytes)]
    if report.rank_mean is not None:
        parts.append(f"mean rank {report.rank_mean:.3g}")
    if report.energy is not None:
        parts.append(f"captured energy {report.energy:.1%}")
    if report.update_norm is not None:
        parts.append(f"norm of the update {report.update_norm:.3g}")
    return ", ".join(parts)


def notes_of(report: Report) -> list[str]:
    """What the columns mean, and why some are missing."""
    if not report.is_observed:
        return [NOT_OBSERVED]
    return [LEGEND, *([PROJECTED] if any(row.is_projected for row in report.rows) else [])]


def as_text(report: Report) -> str:
    """An aligned table in plain text."""
    columns = columns_of(report)
    rows = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows_of(report))]
    return "\n".join([*aligned(rows), totals_of(report), *notes_of(report)])


def as_rich(report: Report) -> Any:
    """A `rich.table.Table`; only rich asks for it."""
    from rich import box  # not needed otherwise
    from rich.markup import escape as plain
    from rich.table import Table

    caption = plain("\n".join([totals_of(report), *notes_of(report)]))
    table = Table(title="gradlr", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in columns_of(report) if column.is_narrow]
    for column in columns:
        table.add_column(column.title, justify=_side(column), overflow="fold" if column.is_text else "ellipsis")
    for row in rows_of(report):
        table.add_row(*(plain(column.cell(row)) for column in columns), style=None if row.rank else "dim")
    return table


def as_html(report: Report) -> str:
    """An HTML table with a bar behind rank and energy; readable on light and dark ground."""
    columns = columns_of(report)
    head = "".join(f'<th style="text-align:{_side(column)}">{escape(column.title)}</th>' for column in columns)
    lines = "".join(f"<tr>{''.join(_html_cell(column, row) for column in columns)}</tr>" for row in rows_of(report))
    notes = "<br>".join(escape(line) for line in [totals_of(report), *notes_of(report)])
    return f'<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table><p style="font-size:90%">{notes}</p>'


def _html_cell(column: Column, row: ParameterReport) -> str:
    share, style = column.share(row), f"text-align:{_side(column)};white-space:nowrap"
    if share is not None:
        filled = f"{100 * min(max(share, 0.0), 1.0):.1f}%"
        style += f";min-width:5em;background:linear-gradient(to right,rgba(31,95,168,.35) {filled},transparent {filled})"
    return f'<td style="{style}">{escape(column.cell(row))}</td>'


def _side(column: Column) -> str:
    return "left" if column.is_text else "right"
