"""A report as a figure: one line per compressed parameter, a panel per question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .contents import ParameterReport, Report

_COLOR, _OPEN, _MARK = "#1f5fa8", "#dde6f0", "#c8501e"
# Inches: a line that can be read, and a page that can still be shown.
_LINE_HEIGHT, _LARGEST_HEIGHT = 0.26, 24.0


def draw(report: Report, axes: Sequence[Any] | None) -> Figure:
    """The figure of `Report.plot`."""
    rows = [row for row in report.rows if row.rank is not None]
    if not rows:
        raise ArgumentError("report.plot(): no parameter has a rank; every rule here works on the gradient's entries")
    panels = [_draw_ranks, _draw_energy, _draw_updates] if report.is_observed else [_draw_ranks]
    axes = _new_axes(len(rows), len(panels)) if axes is None else _given(axes, len(panels))
    for panel, one in zip(panels, axes, strict=True):
        panel(one, rows)
        one.spines[["top", "right"]].set_visible(False)
        one.set_ylim(len(rows) - 0.4, -0.6)
        one.tick_params(axis="y", length=0)
        one.set_yticks(range(len(rows)), [row.name for row in rows] if one is axes[0] else [], fontsize=_font_size(len(rows)))
    return axes[0].figure


def _new_axes(lines: int, panels: int) -> list[Any]:
    try:
        import matplotlib.pyplot as plt  # an extra: the library does without it
    except ImportError as error:
        raise ImportError("report.plot() needs matplotlib: pip install 'gradlr[notebook]'") from error
    height = min(1.3 + _LINE_HEIGHT * lines, _LARGEST_HEIGHT)
    return list(plt.subplots(1, panels, figsize=(3.4 * panels + 2.0, height), layout="constrained", squeeze=False)[1][0])


def _font_size(lines: int) -> float:
    return min(8.0, 0.8 * 72 * _LARGEST_HEIGHT / lines)


def _given(axes: Sequence[Any], panels: int) -> list[Any]:
    axes = list(axes) if hasattr(axes, "__len__") else [axes]
    if len(axes) != panels:
        why = "updates were observed" if panels == 3 else "no update was observed"
        raise ArgumentError(f"report.plot(axes): {len(axes)} axes for {panels} panels ({why}): give {panels}, or none")
    return axes


def _draw_ranks(axes: Any, rows: list[ParameterReport]) -> None:
    places = range(len(rows))
    axes.barh(places, [row.largest_rank for row in rows], height=0.7, color=_OPEN, label="largest rank")
    axes.barh(places, [row.rank for row in rows], height=0.7, color=_COLOR, label="rank r")
    for values, color, label in (
        ([row.stable_rank for row in rows], _MARK, "stable rank of the gradient"),
        ([row.momentum_stable_rank for row in rows], "white", "stable rank of the momentum"),
    ):
        known = [(value, place) for place, value in enumerate(values) if value is not None]
        if known:
            axes.scatter(*zip(*known, strict=True), s=20, color=color, edgecolor=_MARK, linewidth=1, zorder=3, label=label)
    axes.set_title("Rank", fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)


def _draw_energy(axes: Any, rows: list[ParameterReport]) -> None:
    axes.barh(range(len(rows)), 100, height=0.7, color=_OPEN)
    for place, row in enumerate(rows):
        if row.energy is not None:
            axes.barh(place, 100 * row.energy, height=0.7, color=_COLOR)
            _write(axes, f"{100 * row.energy:.1f}", 2, place, len(rows), color="white" if row.energy > 0.2 else "black")
    axes.set_xlim(0, 100)
    axes.set_title("Captured energy of the gradient, %", fontsize=10)


def _draw_updates(axes: Any, rows: list[ParameterReport]) -> None:
    for place, row in enumerate(rows):
        if row.relative_update is not None:
            axes.barh(place, 100 * row.relative_update, height=0.7, color=_COLOR)
            _write(axes, f" {100 * row.relative_update:.2g}", 100 * row.relative_update, place, len(rows), color="black")
    axes.margins(x=0.12)
    axes.set_title("Update, % of the weight's norm", fontsize=10)


def _write(axes: Any, text: str, x: float, place: int, lines: int, *, color: str) -> None:
    axes.text(x, place, text, va="center", fontsize=min(7.0, _font_size(lines)), color=color)
