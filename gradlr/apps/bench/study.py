"""What rank and momentum rank are worth: loss over r for each k, and what schedules reach with their mean rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from .pareto import OTHERS, OURS, TITLES, read_report, save_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = re.compile(r"k(?P<k>\d+)_r(?P<r>\d+)")


def draw(reports: Sequence[dict[str, Any]]) -> Figure:
    """One row of two panels per report of `bench quality`: the grid of k and r, and schedules of the rank at k = 4.

    Raises:
        ArgumentError: matplotlib is not installed, or a report holds no grid.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"the plot needs {error.name}: pip install 'gradlr[bench]'") from error
    figure = Figure(figsize=(11, 4.2 * len(reports)), layout="constrained")
    for row, report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        name = report["workload"]["name"]
        _draw_grid(row[0], report)
        _draw_schedules(row[1], report)
        row[0].set_title(TITLES.get(name, name), loc="left", fontsize=11)
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.ticklabel_format(axis="y", useOffset=False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
    return figure


def write(paths: Sequence[Path], out: Path) -> None:
    """Draw the reports in the given JSON files, those of one workload and of the same seeds together, whole or not at all."""
    save_figure(draw(propagate_errors([read_report(path) for path in paths])), out)


def propagate_errors(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports, those on one workload and the same seeds in one; a row that comes again takes the first's place."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        key = repr((report["workload"], report.get("seeds")))
        rows = {row["name"]: row for row in (*found.get(key, report)["results"], *report["results"])}
        found[key] = {**report, "results": list(rows.values())}
    return list(found.values())


def grid(report: dict[str, Any]) -> dict[int, list[tuple[int, float]]]:
    """(r, mean loss) pairs of every k that a report holds, by rising r.

    Raises:
        ArgumentError: it holds none.
    """
    found: dict[int, list[tuple[int, float]]] = {}
    for row in report["results"]:
        match = _GRID.fullmatch(row["name"])
        if match and row["mean"] is not None:
            found.setdefault(int(match["k"]), []).append((int(match["r"]), row["mean"]))
    if not found:
        raise ArgumentError("the report holds no baseline such as k4_r64: run `bench quality --baselines k1_r16 k4_r16 ...`")
    return {k: sorted(pairs) for k, pairs in sorted(found.items())}


def _draw_grid(axes: Axes, report: dict[str, Any]) -> None:
    lines = grid(report)
    for index, (k, pairs) in enumerate(lines.items()):
        shade = 0.25 + 0.75 * index / max(1, len(lines) - 1)
        axes.plot(*zip(*pairs, strict=True), "o-", color=OURS, alpha=shade, markersize=4, label=f"k = {k}")
    ranks = sorted({rank for pairs in lines.values() for rank, _ in pairs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set(xlabel="rank r of gradient and update, fixed", ylabel="validation loss, nats")


def _draw_schedules(axes: Axes, report: dict[str, Any]) -> None:
    fixed = grid(report).get(4, [])
    if fixed:
        axes.plot(*zip(*fixed, strict=True), "o-", color=OURS, markersize=4, label="fixed, k = 4")
    for row in report["results"]:
        is_scheduled = row["name"] == "default" or re.match(r"k4_(loss|energy)", row["name"])
        if is_scheduled and row["mean"] is not None:
            mark = "s" if "energy" in row["name"] else "D"
            axes.plot(row["mean_rank"], row["mean"], mark, color=OTHERS, markersize=6)
            axes.annotate(f" {short(row['label'])}", (row["mean_rank"], row["mean"]), fontsize=8, color=OTHERS, va="bottom")
    axes.set(xlabel="mean rank over the run")
