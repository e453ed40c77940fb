"""One method's training run in the demo: progress, checkpoints, and going on after an interruption."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.atomic import write_atomically
from ...errors import GradlrError
from ...optimizer import GradLR
from ...params.kinds import MATRIX
from ...report.summary import format_bytes
from ..bench.language import FineTuning
from ..bench.memory import peak_bytes
from ..bench.train_steps import Baseline, TrainStep, adamw, gradlr
from ..bench.workloads import rate_factor
from ..progress import Progress
from ..signals import deferred_signals

SAVE_EVERY = 20

# Learning rates: the best of AdamW's row and of the TrackedMomentum rows in gradlr/apps/bench/results/quality.json, written by
# `python -m gradlr bench quality`. Momentum of rank 3: at this width a fortieth of AdamW's state, the vectors' Adam included.
METHODS = (
    Baseline("adamw", "AdamW", adamw, (2e-3,)),
    Baseline("gradlr", "gradlr", gradlr(momentum_rank=3), (1.6e-2,)),
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


def resume_path(folder: Path, method: str) -> Path:
    """Where an interrupted run is continued from."""
    return folder / f"{method}-resume.pt"


def train(method: Baseline, plan: Plan, folder: Path, *, is_fresh: bool) -> Record:
    """Fine-tune the shipped transformer by one method, or go on where it was interrupted.

    Args:
        method: With the one learning rate that it trains at.
        plan: What all methods share.
        folder: Where its files are kept.
        is_fresh: Whether to start anew, whatever is there.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything up to the last whole step is saved.
        GradlrError: the file to continue from cannot be read.
    """
    workload = FineTuning(steps=plan.steps)
    model: Any = workload.model(plan.seed, plan.device)
    path, record = resume_path(folder, method.name), Record(method.name, method.label)
    saved = None if is_fresh else _load_resume_point(path, plan)
    if saved is None:
        record.peak_bytes = _measure_peak(method, model, workload, plan)
    train_step = method.make(model, method.rates[0])
    if saved is not None:
        record = Record(**saved["record"])
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(train_step.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    _run(model, train_step, record, workload, plan, path)
    parameters = list(model.parameters())
    record.weights = sum(parameter.numel() for parameter in parameters)
    record.state_numbers, record.state_bytes = train_step.state_numbers(parameters), train_step.state_bytes()
    fine_tuned = {"config": model.config, "model": model.state_dict(), "validation_loss": record.validation[-1][1]}
    write_atomically(folder / f"{method.name}-fine-tuned.pt", partial(torch.save, fine_tuned))
    return record


def _run(model: nn.Module, train_step: TrainStep, record: Record, workload: FineTuning, plan: Plan, path: Path) -> None:
    """The steps that are left, validated and saved to `path` every so often."""
    start, validate = len(record.losses), lambda: workload.evaluate(model)["loss"]
    if not record.validation:
        record.validation.append((0, validate()))
    losses = islice(workload.losses(model, plan.seed), start, None)
    with deferred_signals(signal.SIGINT) as interrupts, Progress(record.label, plan.steps, start) as progress:
        for step, compute in enumerate(losses, start + 1):
            train_step.set_rate(rate_factor(workload, step - 1))
            _step(train_step, record, compute)
            rank = f", rank {record.ranks[-1]}" if record.ranks else ""
            progress.update(f"loss {record.losses[-1]:.3f}{rank}, state {format_bytes(record.state_bytes)}")
            is_due = step % SAVE_EVERY == 0 or step == plan.steps
            if is_due:
                record.validation.append((step, validate()))
            if is_due or interrupts:
                optimizers = [optimizer.state_dict() for optimizer in train_step.optimizers]
                weights, facts = model.state_dict(), {"plan": asdict(plan), "record": asdict(record)}
                write_atomically(path, partial(torch.save, {**facts, "model": weights, "optimizers": optimizers}))
            if interrupts:
                raise KeyboardInterrupt(f"{record.label} after {step} of {plan.steps} steps")


def _step(train_step: TrainStep, record: Record, compute: Callable[[], Tensor]) -> None:
    start = time.perf_counter()
    record.losses.append(train_step.step(compute).item())
    record.seconds += time.perf_counter() - start
    record.state_bytes = train_step.state_bytes()
    for optimizer in train_step.optimizers:
        if isinstance(optimizer, GradLR):
            record.ranks.append(max(one.rank for one in optimizer.records if one.plan.kind == MATRIX))


def _measure_peak(method: Baseline, model: nn.Module, workload: FineTuning, plan: Plan) -> int:
    """Bytes above the weights at the worst moment of two steps on a copy of the model, state included."""
    copied = copy.deepcopy(model)
    compute = next(workload.losses(copied, plan.seed))

    def work() -> TrainStep:
        train_step = method.make(copied, method.rates[0])
        for _ in range(2):
            train_step.step(compute)
        return train_step

    return peak_bytes(work, plan.device)


def _load_resume_point(path: Path, plan: Plan) -> dict[str, Any] | None:
    """What was saved there by a run of this plan; None where nothing was, or by another one."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True, map_location=plan.device)
        is_same = saved["plan"] == asdict(plan)
    except Exception as error:
        raise GradlrError(f"{path} cannot be read ({error}): delete it, or pass --fresh") from error
    if not is_same:
        print(f"{path} belongs to another run ({saved['plan']}); starting anew")
    return saved if is_same else None
