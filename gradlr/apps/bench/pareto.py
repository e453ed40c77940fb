"""What a validation loss costs: one point per optimizer, against its bytes of state and against the time of its step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, FRONT = "#c1272d", "#4a5a6a", "#c8ccd0"
TITLES = {
    "pretrained": "Fine-tuning a byte transformer, 1,024 bytes a step",
    "small-batches": "The same with 256 bytes a step",
    "scratch": "A byte transformer from scratch",
    "minilm": "Fine-tuning MiniLM on source code, one epoch",
    "digits": "A convolutional net on 8 × 8 digits, ten epochs",
}
# What every row is drawn from.
_ROW = {"name", "label", "mean", "spread", "step_ms", "state_bytes"}
_NOT_OURS = ("AdamW", "Muon", "GaLore", "APOLLO", "AdaLomo", "LoRA")


def draw(reports: Sequence[dict[str, Any]]) -> Figure:
    """One row of two panels per report of `bench quality`: loss against state, loss against the time of a step.

    Raises:
        ArgumentError: matplotlib or adjustText is not installed, or every run of a report diverged.
    """
    try:
        import adjustText  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(f"the plot needs {error.name}: pip install 'gradlr[bench]'") from error
    figure = Figure(figsize=(11, 4.4 * len(reports)), layout="constrained")
    for row, report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        rows = [entry for entry in report["results"] if entry["mean"] is not None]
        if not rows:
            raise ArgumentError("the report holds no run that did not diverge: there is nothing to draw")
        times = {entry["name"]: entry["step_ms"] for entry in rows}
        reference = times.get("adamw", min(times.values()))
        _panel(row[0], rows, [entry["state_bytes"] / 2**20 for entry in rows])
        _panel(row[1], rows, [entry["step_ms"] / reference for entry in rows])
        row[0].set(xlabel="optimizer state, MiB", ylabel="validation loss, nats")
        row[1].set(xlabel="time of one step, AdamW = 1")
        name = report["workload"]["name"]
        row[0].set_title(TITLES.get(name, name), loc="left", fontsize=11)
    return figure


def write(paths: Sequence[Path], out: Path) -> None:
    """Draw the reports in the given JSON files, as PNG or whatever the name of `out` says, whole or not at all.

    Raises:
        ArgumentError: a file is no report of `bench quality`.
    """
    save_figure(draw([read_report(path) for path in paths]), out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write the picture, as PNG or whatever the name of `out` says, whole or not at all."""
    write_atomically(out, lambda file: figure.savefig(file, format=out.suffix[1:] or "png", dpi=110))


def read_report(path: Path) -> dict[str, Any]:
    """The report of `bench quality` in a JSON file.

    Raises:
        ArgumentError: it is none, or one without rows, or a row without its loss, state or time.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [report["results"][0], *report["results"]]  # no row is no report
        if report["bench"] == "quality" and report["workload"]["name"] and all(set(row) >= _ROW for row in rows):
            return report
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ArgumentError(f"{path}: {error!r}; give JSON that `python -m gradlr bench quality --out` wrote") from None
    what = f"{path} holds no loss, state and time of each row"
    raise ArgumentError(f"{what}; give JSON that `python -m gradlr bench quality --out` wrote")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _panel(axes: Axes, rows: list[dict[str, Any]], costs: list[float]) -> None:
    from adjustText import adjust_text  # an extra, as matplotlib
    from matplotlib.ticker import LogLocator

    points = [(cost, entry["mean"]) for cost, entry in zip(costs, rows, strict=True)]
    axes.step(*zip(*front(points), strict=True), where="post", color=FRONT, linewidth=5, zorder=1, solid_capstyle="round")
    for (cost, loss), entry in zip(points, rows, strict=True):
        axes.errorbar(cost, loss, yerr=entry["spread"], fmt="o", color=_color(entry), markersize=5, elinewidth=0.6)
    axes.set_xscale("log")
    for each in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        each("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15, y=0.1)
    names = [
        axes.text(*point, short(row["label"]), fontsize=8, color=_color(row)) for point, row in zip(points, rows, strict=True)
    ]
    axes.figure.draw_without_rendering()
    adjust_text(names, *zip(*points, strict=True), ax=axes, expand=(1.15, 1.5), arrowprops={"arrowstyle": "-", "color": FRONT})


def _color(row: dict[str, Any]) -> str:
    return OTHERS if row["label"].startswith(_NOT_OURS) else OURS


def short(label: str) -> str:
    """The label of a table row, short enough to stand beside its point."""
    for long, brief in (
        ("TrackedMomentum ", ""),
        (", a quarter of full rank", ""),
        (" (bitsandbytes)", ""),
        ("gradlr, default (k4, r ≤ 64 by loss)", "gradlr (default)"),
        ('capture="adaptor"', "adaptor"),
        (" (the notebook's)", ""),
        (", gradient release (optimi)", ", optimi"),
        ("AdamW, tables at lr / 4", "AdamW, slow tables"),
    ):
        label = label.replace(long, brief)
    return label
