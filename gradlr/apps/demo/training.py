"""One method's training run in the demo: progress, checkpoints, and going on after an interruption."""

from __future__ import annotations

import copy
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.atomic import write_atomically
from ...errors import GradlrError
from ...params.kinds import MATRIX
from ...report.summary import format_bytes
from ..bench.language import FineTuning
from ..bench.memory import peak_bytes
from ..bench.pretrain import load_pretrained
from ..bench.text import batches, documentation
from ..bench.train_steps import Baseline, TrainStep, adamw, gradlr
from ..bench.transformer import evaluate, language_model_loss
from ..signals import deferred_signals

SAVE_EVERY = 20

# Learning rates: the best of AdamW's row and of the TrackedMomentum rows in gradlr/apps/bench/results/quality.json, written by
# `python -m gradlr bench quality`. Momentum of rank 3: at this width a fortieth of AdamW's state, the vectors' Adam included.
METHODS = (
    Baseline("adamw", "AdamW", adamw, (2e-3,)),
    Baseline("gradlr", "gradlr", gradlr(momentum_rank=3), (1.6e-2,)),
)


class InterruptedRun(Exception):  # noqa: N818 (no error: Ctrl-C is what the user wanted)
    """Ctrl-C came, and the run was saved."""


@dataclass(frozen=True)
class Plan:
    """What both methods share: the same data in the same order, the same schedule."""

    steps: int
    seed: int
    device: str

    @property
    def workload(self) -> FineTuning:
        """The workload of the quality benchmark, with this number of steps."""
        return FineTuning(steps=self.steps)


@dataclass
class Record:
    """What one run is remembered by.

    Attributes:
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
    folder: Path = Path()

    @property
    def resume_path(self) -> Path:
        """Where an interrupted run is continued from."""
        return self.folder / f"{self.method}-resume.pt"

    @property
    def model_path(self) -> Path:
        """The fine-tuned model."""
        return self.folder / f"{self.method}-fine-tuned.pt"

    def forget_resume_point(self) -> None:
        """Once everything is reported, the next call starts anew."""
        self.resume_path.unlink(missing_ok=True)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the folder left out."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def train(method: Baseline, plan: Plan, folder: Path, *, is_fresh: bool) -> Record:
    """Fine-tune the shipped transformer by one method, or go on where it was interrupted.

    Raises:
        InterruptedRun: Ctrl-C; everything up to the last whole step is saved.
        GradlrError: the file to continue from cannot be read.
    """
    torch.manual_seed(plan.seed)
    model = load_pretrained(device=plan.device)
    record = Record(method.name, method.label, folder=folder)
    saved = None if is_fresh else _load_resume_point(record.resume_path, plan)
    if saved is None:
        record.peak_bytes = _measure_peak(method, model, plan)
    train_step = method.make(model, method.rates[0])
    if saved is not None:
        _restore(saved, record, model, train_step)
    record.state_numbers, record.state_bytes = train_step.state_numbers(list(model.parameters())), train_step.state_bytes()
    record.weights = sum(parameter.numel() for parameter in model.parameters())
    _run(model, train_step, record, plan)
    record.state_numbers, record.state_bytes = train_step.state_numbers(list(model.parameters())), train_step.state_bytes()
    fine_tuned = {"config": model.config, "model": model.state_dict(), "validation_loss": record.validation[-1][1]}
    write_atomically(record.model_path, partial(torch.save, fine_tuned))
    return record


def _run(model: nn.Module, train_step: TrainStep, record: Record, plan: Plan) -> None:
    from tqdm import tqdm  # an extra: the library does without it

    workload, start = plan.workload, len(record.losses)
    held_out = workload.validation()
    if not record.validation:
        record.validation.append((0, evaluate(model, held_out)))
    sizes = {"batch_size": workload.batch_size, "length": workload.length, "steps": plan.steps}
    data = batches(documentation().train, seed=plan.seed, start=start, **sizes)
    pause = 0.1 if sys.stderr.isatty() else 10.0  # in a log, few lines
    bar = tqdm(total=plan.steps, initial=start, desc=f"{record.label:>6s}", unit="step", mininterval=pause, maxinterval=pause)
    with deferred_signals(signal.SIGINT) as interrupts, bar:
        for step, (inputs, targets) in enumerate(data, start=start):
            train_step.set_rate(workload.rate_factor(step))
            _step(model, train_step, record, inputs.to(plan.device), targets.to(plan.device))
            bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update()
            is_last = step + 1 == plan.steps
            if (step + 1) % SAVE_EVERY == 0 or is_last:
                record.validation.append((step + 1, evaluate(model, held_out)))
            if (step + 1) % SAVE_EVERY == 0 or is_last or interrupts:
                write_atomically(record.resume_path, partial(torch.save, _resume_point(record, model, train_step, plan)))
            if interrupts:
                raise InterruptedRun(f"{record.label} after {step + 1} of {plan.steps} steps")


def _step(model: nn.Module, train_step: TrainStep, record: Record, inputs: Tensor, targets: Tensor) -> None:
    start = time.perf_counter()
    loss = train_step.step(partial(language_model_loss, model, inputs, targets))
    record.losses.append(loss.item())
    record.seconds += time.perf_counter() - start
    if train_step.tracker is not None:
        record.ranks.append(max(record.rank for record in train_step.optimizers[0].records if record.plan.kind == MATRIX))
        record.state_bytes = train_step.state_bytes()
    elif len(record.losses) == 1:
        record.state_bytes = train_step.state_bytes()  # torch's AdamW makes its state in the first step


def _postfix(record: Record) -> str:
    rank = f", rank {record.ranks[-1]}" if record.ranks else ""
    return f"loss {record.losses[-1]:.3f}{rank}, state {format_bytes(record.state_bytes)}"


def _measure_peak(method: Baseline, model: nn.Module, plan: Plan) -> int:
    """Bytes above the weights at the worst moment of two steps on a copy of the model, state included."""
    copied = copy.deepcopy(model)
    workload = plan.workload
    sizes = {"batch_size": workload.batch_size, "length": workload.length}
    inputs, targets = next(iter(batches(documentation().train, steps=1, seed=plan.seed, **sizes)))

    def work() -> TrainStep:
        train_step = method.make(copied, method.rates[0])
        for _ in range(2):
            train_step.step(partial(language_model_loss, copied, inputs.to(plan.device), targets.to(plan.device)))
        return train_step

    return peak_bytes(work, plan.device)


def _resume_point(record: Record, model: nn.Module, train_step: TrainStep, plan: Plan) -> dict[str, Any]:
    return {
        "plan": asdict(plan),
        "record": record.as_dict(),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in train_step.optimizers],
    }


def _load_resume_point(path: Path, plan: Plan) -> dict[str, Any] | None:
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


def _restore(saved: dict[str, Any], record: Record, model: nn.Module, train_step: TrainStep) -> None:
    for key, value in saved["record"].items():
        setattr(record, key, value)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(train_step.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
