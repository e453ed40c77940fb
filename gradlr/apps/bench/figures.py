"""Pictures of results of `bench quality`: what a loss costs in state and time, and what ranks are worth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]
Row = dict[str, Any]

OURS, OTHERS, FRONT = "#c1272d", "#4a5a6a", "#c8ccd0"
TITLES = {
    "pretrained": "Fine-tuning a byte transformer, 1,024 bytes a step",
    "small-batches": "The same with 256 bytes a step",
    "scratch": "A byte transformer from scratch",
    "minilm": "Fine-tuning MiniLM on source code, one epoch",
    "digits": "A convolutional net on 8 × 8 digits, ten epochs",
    "smollm2": "SmolLM2-135M learns eight languages",
    "smollm2-chat": "SmolLM2-135M learns to translate",
}
# What every row is drawn from.
_ROW = {"name", "label", "mean", "spread", "step_ms", "state_bytes"}
_NOT_OURS = ("AdamW", "Muon", "GaLore", "APOLLO", "AdaLomo", "LoRA", "SinkGD", "MLorc", "Rows normalized")
_SHORTER = {
    "LowRankPolar ": "",
    ", a quarter of full rank": "",
    " (bitsandbytes)": "",
    "gradlr, default (k4, r ≤ 64 by loss)": "gradlr (default)",
    'capture="adaptor"': "adaptor",
    " (the notebook's)": "",
    ", gradient release (optimi)": ", optimi",
    "AdamW, embeddings at lr / 4": "AdamW, slow embeddings",
}


def write(kind: str, paths: Sequence[Path], out: Path) -> None:
    """Draw the reports in the given JSON files, as PNG or whatever the name of `out` says, whole or not at all.

    Args:
        kind: "pareto", "front" or "study", see `draw`.
        paths: Reports of one workload and of the same seeds are drawn as one.
        out: The picture.

    Raises:
        ArgumentError: a file is no report of `bench quality`, or cannot be drawn.
    """
    figure = draw(kind, joined([read_report(path) for path in paths]))
    write_atomically(out, lambda file: figure.savefig(file, format=out.suffix[1:] or "png", dpi=110))


def read_report(path: Path) -> Report:
    """The report of `bench quality` in a JSON file.

    Raises:
        ArgumentError: it is none, or one without rows, or a row without its loss, state or time.
    """
    reason = "no loss, state and time of each row"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [report["results"][0], *report["results"]]  # no row is no report
        if report["bench"] == "quality" and report["workload"]["name"] and all(set(row) >= _ROW for row in rows):
            return report
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = repr(error)
    raise ArgumentError(f"{path}: {reason}; give JSON that `python -m gradlr bench quality --out` wrote")


def joined(reports: Sequence[Report]) -> list[Report]:
    """The reports, those on one workload and the same seeds in one; a row that comes again takes the first's place."""
    found: dict[str, Report] = {}
    for report in reports:
        key = repr((report["workload"], report.get("seeds")))
        rows = {row["name"]: row for row in (*found.get(key, report)["results"], *report["results"])}
        found[key] = {**report, "results": list(rows.values())}
    return list(found.values())


def draw(kind: str, reports: Sequence[Report]) -> Figure:
    """One row of two panels per report of `bench quality`.

    Args:
        kind: "pareto" for the loss against state and against the time of a step; "front" for the loss against what is forgotten,
            a line for each optimizer over its learning rates, and against state; "study" for the loss over the rank, a line for
            each momentum rank, and against the mean rank of schedules.
        reports: As `read_report` gives them.

    Raises:
        ArgumentError: matplotlib or adjustText is not installed, or a report holds nothing to draw.
    """
    try:
        import adjustText  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"the plot needs {error.name}: pip install 'gradlr[bench]'") from error
    figure = Figure(figsize=(11, 4.4 * len(reports)), layout="constrained")
    for (left, right), report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        name = report["workload"]["name"]
        left.set_title(TITLES.get(name, name), loc="left", fontsize=11)
        _PANELS[kind](figure, left, right, [row for row in report["results"] if row["mean"] is not None])
    return figure


def _draw_pareto(figure: Figure, left: Axes, right: Axes, rows: list[Row]) -> None:
    if not rows:
        raise ArgumentError("the report holds no run that did not diverge: there is nothing to draw")
    times = {row["name"]: row["step_ms"] for row in rows}
    reference = times.get("adamw", min(times.values()))
    _draw_costs(figure, left, rows, [row["state_bytes"] / 2**20 for row in rows])
    _draw_costs(figure, right, rows, [row["step_ms"] / reference for row in rows])
    left.set(xlabel="optimizer state, MiB", ylabel="validation loss, nats")
    right.set(xlabel="time of one step, AdamW = 1")


def _draw_costs(figure: Figure, axes: Axes, rows: list[Row], costs: list[float]) -> None:
    from adjustText import adjust_text  # an extra, as matplotlib
    from matplotlib.ticker import LogLocator

    points = [(cost, row["mean"]) for cost, row in zip(costs, rows, strict=True)]
    axes.step(*zip(*front(points), strict=True), where="post", color=FRONT, linewidth=5, zorder=1, solid_capstyle="round")
    names = []
    for point, row in zip(points, rows, strict=True):
        color = OTHERS if row["label"].startswith(_NOT_OURS) else OURS
        axes.errorbar(*point, yerr=row["spread"], fmt="o", color=color, markersize=5, elinewidth=0.6)
        names.append(axes.text(*point, short(row["label"]), fontsize=8, color=color))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.margins(x=0.15, y=0.1)
    figure.draw_without_rendering()  # the places of texts are known only then
    adjust_text(names, *zip(*points, strict=True), ax=axes, expand=(1.15, 1.5), arrowprops={"arrowstyle": "-", "color": FRONT})


def _draw_front(figure: Figure, left: Axes, right: Axes, rows: list[Row]) -> None:
    from adjustText import adjust_text  # an extra, as matplotlib

    # Of gradlr the default alone: its variants, which the table has, lie along its line.
    rows = [row for row in rows if row["label"].startswith(_NOT_OURS) or row["name"] == "default"]
    rows = [row for row in rows if row.get("general_sweep")]
    if not rows:
        raise ArgumentError("the report tells no general loss: run `bench quality --workload smollm2`")
    names = []
    for row in rows:
        color = OTHERS if row["label"].startswith(_NOT_OURS) else OURS
        points = [(row["general_sweep"][lr], loss) for lr, loss in row["sweep"].items() if loss is not None]
        left.plot(*zip(*points, strict=True), "o-", color=color, alpha=0.8, markersize=4, linewidth=1)
        best = min(points, key=lambda point: point[1])
        names.append(left.text(*best, short(row["label"]), fontsize=8, color=color))
    left.margins(x=0.15, y=0.1)
    left.set(xlabel="loss on English that no run sees, nats (forgetting)", ylabel="validation loss, nats")
    figure.draw_without_rendering()  # the places of texts are known only then
    adjust_text(names, ax=left, arrowprops={"arrowstyle": "-", "color": FRONT})
    # No state is a place on the axis, which a logarithm has none for.
    _draw_costs(figure, right, rows, [max(row["state_bytes"] / 2**20, 0.1) for row in rows])
    right.set(xlabel="optimizer state, MiB (0.1 and less at 0.1)")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def short(label: str) -> str:
    """The label of a table row, short enough to stand beside its point."""
    for long, brief in _SHORTER.items():
        label = label.replace(long, brief)
    return label


def _draw_study(figure: Figure, left: Axes, right: Axes, rows: list[Row]) -> None:
    lines = grid(rows)
    for index, (k, pairs) in enumerate(lines.items()):
        shade = 0.25 + 0.75 * index / max(1, len(lines) - 1)
        left.plot(*zip(*pairs, strict=True), "o-", color=OURS, alpha=shade, markersize=4, label=f"k = {k}")
    ranks = sorted({rank for pairs in lines.values() for rank, _ in pairs})
    left.set_xscale("log", base=2)
    left.set_xticks(ranks, [str(rank) for rank in ranks])
    left.set(xlabel="rank r of gradient and update, fixed", ylabel="validation loss, nats")
    if 4 in lines:
        right.plot(*zip(*lines[4], strict=True), "o-", color=OURS, markersize=4, label="fixed, k = 4")
    for row in rows:
        if row["name"] == "default" or row["name"].startswith("k4_loss"):
            right.plot(row["mean_rank"], row["mean"], "D", color=OTHERS, markersize=6)
            right.annotate(f" {short(row['label'])}", (row["mean_rank"], row["mean"]), fontsize=8, color=OTHERS, va="bottom")
    right.set(xlabel="mean rank over the run")
    for axes in (left, right):
        axes.ticklabel_format(axis="y", useOffset=False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)


def grid(rows: Sequence[Row]) -> dict[int, list[tuple[int, float]]]:
    """(r, mean loss) pairs of every k that rows such as k4_r64 hold, by rising r.

    Raises:
        ArgumentError: there is no such row.
    """
    found: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if match := re.fullmatch(r"k(\d+)_r(\d+)", row["name"]):
            found.setdefault(int(match[1]), []).append((int(match[2]), row["mean"]))
    if not found:
        raise ArgumentError("the report holds no baseline such as k4_r64: run `bench quality --baselines k1_r16 k4_r16 ...`")
    return {k: sorted(pairs) for k, pairs in sorted(found.items())}


_PANELS: dict[str, Callable[[Figure, Axes, Axes, list[Row]], None]] = {
    "pareto": _draw_pareto,
    "front": _draw_front,
    "study": _draw_study,
}
