"""What the demo shows at the end: a table, a figure, a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.atomic import write_json
from ...report.summary import format_bytes
from ..bench.environment import environment
from ..bench.memory import MIB
from .training import Plan, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"adamw": "#8c8c8c", "gradlr": "#0b6e4f"}


def print_table(records: list[Record]) -> None:
    """Validation loss, state per weight, peak memory above the weights and seconds, one line per method."""
    print(f"\n{'':8s}{'validation loss':>18s}{'state per weight':>18s}{'state':>12s}{'peak extra memory':>20s}{'seconds':>9s}")
    print(f"{'before':8s}{records[0].validation[0][1]:>18.4f}")
    for record in records:
        share = f"{record.state_numbers / record.weights:.3f}"
        sizes = f"{format_bytes(record.state_bytes):>12s}{format_bytes(record.peak_bytes):>20s}"
        print(f"{record.label:8s}{record.validation[-1][1]:>18.4f}{share:>18s}{sizes}{record.seconds:>9.1f}")
    first, last = records[0], records[-1]
    difference = last.validation[-1][1] - first.validation[-1][1]
    word = "lower" if difference < 0 else "higher"
    print(
        f"\n{last.label} ends {abs(difference):.3f} nats per byte {word} than {first.label}, "
        f"with 1/{first.state_numbers / last.state_numbers:.0f} of its state.\n"
    )


def write_results(records: list[Record], plan: Plan, folder: Path) -> Path:
    """results.json: every number of the run, with its environment."""
    content = {"environment": environment(plan.device), "plan": asdict(plan), "records": [asdict(record) for record in records]}
    write_json(folder / "results.json", content)
    return folder / "results.json"


def write_figure(records: list[Record], folder: Path) -> Path:
    """report.png: loss against steps, rank against steps, memory bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra: the library does without it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    for draw, axes in zip((_draw_losses, _draw_ranks, _draw_memory), panels, strict=True):
        draw(axes, records)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "report.png", dpi=120)
    return folder / "report.png"


def _draw_losses(axes: Axes, records: list[Record]) -> None:
    for record in records:
        color = COLORS[record.method]
        axes.plot(range(1, len(record.losses) + 1), record.losses, color=color, linewidth=0.6, alpha=0.35)
        steps, losses = zip(*record.validation, strict=True)
        axes.plot(steps, losses, color=color, linewidth=2, marker="o", markersize=3, label=f"{record.label}: {losses[-1]:.3f}")
    axes.set(title="Fine-tuning: loss (thick: validation)", xlabel="step", ylabel="nats per byte")
    axes.legend(frameon=False)


def _draw_ranks(axes: Axes, records: list[Record]) -> None:
    for record in records:
        if record.ranks:
            axes.step(range(1, len(record.ranks) + 1), record.ranks, color=COLORS[record.method], where="mid")
            axes.set_ylim(0, 1.1 * max(record.ranks))
    axes.set(title="gradlr: the rank follows the loss", xlabel="step", ylabel="rank of gradient and update")


def _draw_memory(axes: Axes, records: list[Record]) -> None:
    for offset, (title, name) in enumerate({"optimizer state": "state_bytes", "peak above the weights": "peak_bytes"}.items()):
        values = [getattr(record, name) / MIB for record in records]
        for index, (record, value) in enumerate(zip(records, values, strict=True)):
            place = offset + 0.4 * (index - (len(records) - 1) / 2)
            axes.bar(place, value, width=0.36, color=COLORS[record.method], label=record.label if offset == 0 else None)
            axes.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom", fontsize=9)
        axes.text(offset, -0.04, title, ha="center", va="top", transform=axes.get_xaxis_transform())
    axes.set(title="Memory above the weights", ylabel="MiB", xticks=[])
    axes.legend(frameon=False, loc="upper left")
