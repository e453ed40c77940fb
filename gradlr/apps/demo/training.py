"""One method's training run in the demo."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.atomic import write_atomically
from ...optimizer import GradLR
from ...params.kinds import MATRIX
from ...report.summary import format_bytes
from ..bench.language import FineTuning
from ..bench.memory import peak_of_steps
from ..bench.train_steps import Baseline, TrainStep, adamw, gradlr
from ..bench.workloads import rate_factor
from ..progress import Progress

VALIDATE_EVERY = 20

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


def train(method: Baseline, plan: Plan, folder: Path) -> Record:
    """Fine-tune the shipped transformer by one method, and write the result.

    Args:
        method: With the one learning rate that it trains at.
        plan: What all methods share.
        folder: Where its weights go.
    """
    workload = FineTuning(steps=plan.steps)
    model: Any = workload.model(plan.seed, plan.device)
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
