"""`python -m gradlr demo`: fine-tune a transformer on real text with tuned AdamW and with gradlr, and compare."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.atomic import write_atomically, write_json
from ..errors import ArgumentError
from ..optimizer import GradLR
from ..params.kinds import MATRIX
from ..report.summary import format_bytes
from .bench.environment import environment, require_device
from .bench.language import FineTuning
from .bench.memory import MIB, peak_of_steps
from .bench.train_steps import Baseline, TrainStep, adamw, gradlr
from .bench.workloads import rate_factor
from .progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERRUPTED_STATUS = 130
COLORS = {"adamw": "#8c8c8c", "gradlr": "#0b6e4f"}
VALIDATE_EVERY = 20

# AdamW's best rate (gradlr/apps/bench/results/quality.json, written by `python -m gradlr bench quality`), for both.
METHODS = (
    Baseline("adamw", "AdamW", adamw, (2e-3,)),
    Baseline("gradlr", "gradlr", gradlr(), (2e-3,)),
)


@dataclass(frozen=True)
class Plan:
    """What both methods share: the same data in the same order, the same schedule."""

    steps: int
    seed: int
    device: str


@dataclass
class Record:
    """What one run is remembered by.

    Attributes:
        method, label: Name of the method, for files and for people.
        losses: Training loss of each step, nats per byte.
        ranks: Largest rank over the matrices at each step; empty for AdamW.
        validation: (step, validation loss) pairs.
        seconds: Time in training steps.
        state_numbers, weights: Numbers of optimizer state, and of weights.
        state_bytes, peak_bytes: Bytes of state, and of everything above the weights at the worst moment of a step.
    """

    method: str
    label: str
    losses: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    state_numbers: int = 0
    weights: int = 0
    state_bytes: int = 0
    peak_bytes: int = 0


def train(method: Baseline, plan: Plan, folder: Path) -> Record:
    """Fine-tune the shipped transformer by one method, and write the result.

    Args:
        method: With the one learning rate that it trains at.
        plan: What all methods share.
        folder: Where its weights go.
    """
    workload = FineTuning(steps=plan.steps)
    model: Any = workload.model(plan.seed, plan.device)
    # As people do who are short of memory: what is left of it then is weights, gradients and state.
    model.is_checkpointing = True
    record, lr = Record(method.name, method.label), method.rates[0]
    copied = copy.deepcopy(model)
    first = next(workload.losses(copied, plan.seed))
    record.peak_bytes, _ = peak_of_steps(lambda: method.make(copied, lr), first, steps=2, device=plan.device)
    train_step = method.make(model, lr)
    record.validation.append((0, workload.evaluate(model)["loss"]))
    with Progress(record.label, plan.steps, 0) as progress:
        for step, compute in enumerate(workload.losses(model, plan.seed), 1):
            train_step.set_rate(rate_factor(workload, step - 1))
            _step(train_step, record, compute)
            rank = f", rank {record.ranks[-1]}" if record.ranks else ""
            progress.update(f"loss {record.losses[-1]:.3f}{rank}, state {format_bytes(record.state_bytes)}")
            if step % VALIDATE_EVERY == 0 or step == plan.steps:
                record.validation.append((step, workload.evaluate(model)["loss"]))
    parameters = list(model.parameters())
    record.weights, record.state_numbers = sum(p.numel() for p in parameters), train_step.state_numbers(parameters)
    fine_tuned = {"config": model.config, "model": model.state_dict(), "validation_loss": record.validation[-1][1]}
    write_atomically(folder / f"{method.name}-fine-tuned.pt", partial(torch.save, fine_tuned))
    return record


def _step(train_step: TrainStep, record: Record, compute: Callable[[], Tensor]) -> None:
    start = time.perf_counter()
    record.losses.append(train_step.step(compute).item())
    record.seconds += time.perf_counter() - start
    record.state_bytes = train_step.state_bytes()
    for optimizer in train_step.optimizers:
        if isinstance(optimizer, GradLR):
            record.ranks.append(max(one.rank for one in optimizer.records if one.plan.kind == MATRIX))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo; the defaults take about a minute on two CPU cores."""
    parser.add_argument("--out", type=Path, default=Path("gradlr-demo"), help="folder for the results (default gradlr-demo)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each method (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and random directions")


def run(arguments: argparse.Namespace) -> int:
    """Train with both methods, print the table, write report.png, results.json and the fine-tuned model.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        ArgumentError: an option is out of range, or the device is not there.
    """
    steps, seed, device, out = arguments.steps, arguments.seed, arguments.device, arguments.out
    if steps < 1 or seed < 0:
        raise ArgumentError(f"--steps {steps} --seed {seed}: steps must be at least 1, the seed at least 0")
    require_device(device)
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps, seed, device)
    try:
        records = [train(method, plan, out) for method in METHODS]
    except KeyboardInterrupt:
        print("\ninterrupted")
        return INTERRUPTED_STATUS
    print_table(records)
    print(f"wrote {write_figure(records, out)}\nwrote {write_results(records, plan, out)}")
    print(f"wrote {out / 'gradlr-fine-tuned.pt'}: load it with gradlr.apps.bench.pretrain.load_pretrained(path)")
    return 0


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
