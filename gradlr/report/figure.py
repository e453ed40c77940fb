"""A report as a figure: one line per compressed parameter, a panel per question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOR, _OPEN, _MARK = "#1f5fa8", "#dde6f0", "#c8501e"
# Inches: a line that can be read, and a page that can still be shown.
_LINE_HEIGHT, _LARGEST_HEIGHT = 0.26, 24.0


def draw(parameters: Mapping[str, Mapping[str, float]]) -> Figure:
    """The figure of `Report.plot`, which documents it, from each parameter's numbers by name."""
    if not parameters:
        raise ArgumentError("report.plot(): no parameter has a rank; every rule here works on the gradient's entries")
    try:
        import matplotlib.pyplot as plt  # an extra: the library does without it
    except ImportError as error:
        raise ImportError("report.plot() needs matplotlib: pip install 'gradlr[notebook]'") from error
    lines, rows = len(parameters), list(parameters.values())
    panels = 3 if any("step" in row for row in rows) else 1
    size = (3.4 * panels + 2.0, min(1.3 + _LINE_HEIGHT * lines, _LARGEST_HEIGHT))
    # Points: four fifths of a line, where so many are squeezed into the largest height.
    font_size = min(8.0, 0.8 * 72 * _LARGEST_HEIGHT / lines)
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False, sharey=True)
    _draw_ranks(axes[0, 0], rows)
    if panels > 1:
        axes[0, 1].barh(range(lines), 100, height=0.7, color=_OPEN)
        _draw_shares(axes[0, 1], rows, "energy", "Captured energy of the gradient, %", font_size)
        _draw_shares(axes[0, 2], rows, "relative_update", "Update, % of the weight's norm", font_size)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(lines), list(parameters), fontsize=font_size)
    axes[0, 0].set_ylim(lines - 0.4, -0.6)
    return figure


def _draw_ranks(axes: Any, rows: list[Mapping[str, float]]) -> None:
    axes.barh(range(len(rows)), [row["largest_rank"] for row in rows], height=0.7, color=_OPEN, label="largest rank")
    axes.barh(range(len(rows)), [row["rank"] for row in rows], height=0.7, color=_COLOR, label="rank r")
    for name, color, label in (("stable_rank", _MARK, "gradient"), ("momentum_stable_rank", "white", "momentum")):
        places = [place for place, row in enumerate(rows) if name in row]
        values, label = [rows[place][name] for place in places], f"stable rank of the {label}"
        axes.scatter(values, places, s=20, color=color, edgecolor=_MARK, linewidth=1, zorder=3, label=label if places else None)
    axes.set_title("Rank", fontsize=10)
    axes.figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=7)


def _draw_shares(axes: Any, rows: list[Mapping[str, float]], name: str, title: str, font_size: float) -> None:
    for place, row in enumerate(rows):
        if name in row:
            axes.barh(place, 100 * row[name], height=0.7, color=_COLOR)
            axes.text(100 * row[name], place, f" {100 * row[name]:.3g} ", va="center", fontsize=min(7.0, font_size))
    axes.margins(x=0.15)  # room for the number behind the longest bar
    axes.set_title(title, fontsize=10)
