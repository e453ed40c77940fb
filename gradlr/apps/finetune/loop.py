"""The training loop: steps, validation, checkpoints, and an end at any moment that loses nothing."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GradlrError, NonFiniteError
from ...optimizer import GradLR
from ...params.kinds import MATRIX
from ..signals import deferred_signals
from .folder import RunFolder
from .losses import cross_entropy, validation_loss
from .packing import IGNORED, PackedTokens, mixed_seed, sequences_of_step
from .processes import Processes
from .progress import Progress, described, peak_memory

# A loss that is not finite may be one bad batch; so many in a row are a run that has diverged.
MOST_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Plan:
    """How long to train, with how much at a time in all processes together, and how often to look and to save."""

    steps: int
    batch_size: int
    accumulate: int
    warmup: int
    seed: int
    device: str
    save_every: int
    eval_every: int
    log_every: int

    def rate_factor(self, step: int) -> float:
        """Multiple of the peak learning rate: a linear warm-up from the first step on, then a cosine to 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Done:
    """What is done so far; part of every checkpoint.

    Attributes:
        step: Steps taken.
        tokens: Tokens that went through the model in training.
        seconds: Time in training steps.
        skipped_in_a_row: Steps left out since the last one taken.
        validation: (step, validation loss) pairs, in nats per token.
        processes: Number of those that took the last step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    validation: list[list[float]] = field(default_factory=list)
    processes: int = 1


@dataclass
class Run:
    """All that the loop works on."""

    language: Any
    model: nn.Module
    opt: GradLR
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: PackedTokens
    held_out: PackedTokens
    plan: Plan
    folder: RunFolder
    processes: Processes
    done: Done = field(default_factory=Done)

    @property
    def checkpoint(self) -> Path | None:
        """The last whole one."""
        return self.processes.checkpoint(self.folder)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        objects = {"model": self.model, "optimizer": self.opt, "scheduler": self.scheduler}
        self.processes.save(self.folder, **objects, done=asdict(self.done))

    def restore(self) -> int | None:
        """Go on from the checkpoint; the number of processes that wrote it, or None where there is none."""
        path, before = self.checkpoint, None
        # Every process reads it: on several machines, from a disk that all of them see.
        self.processes.require_same({f"checkpoint in {self.folder.path}": path and path.is_file() and path.stat().st_size})
        if path is not None:
            found = self.processes.load(path, model=self.model, optimizer=self.opt, scheduler=self.scheduler)
            self.done = Done(**found["done"])
            before = self.done.processes
        self.done.processes = self.processes.size
        self.folder.rewind_log(-1 if before is None else self.done.step)
        return before

    def validate(self) -> float:
        """Loss on the held-out documents now; noted and logged."""
        batch_size = self.plan.batch_size // self.processes.size
        loss = validation_loss(self.language, self.model, self.held_out, batch_size, self.processes)
        self.done.validation.append([self.done.step, loss])
        self.folder.log(step=self.done.step, validation_loss=loss)
        return loss


def train(run: Run) -> int | None:
    """Take the steps that are left; the number of the signal that ended it early, with everything saved, or None.

    Raises:
        GradlrError: losses or gradients are not finite; the last checkpoint stays.
    """
    plan, done, processes = run.plan, run.done, run.processes
    run.model.train()
    shown = Progress(plan.steps, done.step, is_shown=processes.is_first)
    with deferred_signals(signal.SIGINT, signal.SIGTERM) as signals, shown as progress:
        if not done.validation:
            progress.say(f"validation loss {run.validate():.4f} before training")
        stop = processes.all_true(signals)
        while done.step < plan.steps and stop is None:
            lr = run.scheduler.get_last_lr()[0]
            loss = _timed_step(run)
            _report(run, loss, lr, progress)
            if done.step % plan.eval_every == 0 or done.step == plan.steps:
                progress.say(f"validation loss {run.validate():.4f} after step {done.step}")
            stop = processes.all_true(signals)
            if done.step % plan.save_every == 0 or done.step == plan.steps or stop is not None:
                run.save()
        if stop is not None and run.checkpoint is None:  # before the first step
            run.save()
    return stop if done.step < plan.steps else None


def _timed_step(run: Run) -> Tensor:
    start, skipped = time.perf_counter(), run.opt.skipped
    try:
        loss = _step(run)
    except NonFiniteError as error:
        raise _diverged(run, str(error)) from error
    run.scheduler.step()
    done = run.done
    done.seconds += time.perf_counter() - start
    done.skipped_in_a_row = done.skipped_in_a_row + 1 if run.opt.skipped > skipped else 0
    done.step += 1
    done.tokens += run.plan.batch_size * run.plan.accumulate * run.data.length
    if done.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        raise _diverged(run, f"{done.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite")
    return loss


def _step(run: Run) -> Tensor:
    """Forward, backward and update of one step; returns this process' part of its loss, 0-dim, on the device."""
    plan, processes, step = run.plan, run.processes, run.done.step
    # Dropout draws from torch's own generators.
    torch.manual_seed(mixed_seed(plan.seed, f"step {step}, process {processes.rank}"))
    rows = sequences_of_step(len(run.data), plan.batch_size * plan.accumulate, seed=plan.seed, step=step)
    batches = [run.data.batch(part) for part in rows.split(plan.batch_size)]
    learned = sum(int((targets != IGNORED).sum()) for _, targets in batches)
    total = torch.zeros((), device=plan.device)
    for batch in batches:
        inputs, targets = (whole.chunk(processes.size)[processes.rank] for whole in batch)
        loss = cross_entropy(run.language.logits(run.model, inputs.to(plan.device)), targets.to(plan.device))
        # So that each token weighs the same, however many its micro-batch has.
        share = int((targets != IGNORED).sum()) / learned
        before, after = processes.weights(share, plan.accumulate)
        (run.opt.tracker(loss * before) * after).backward()
        total += loss.detach() * share
    run.opt.step()
    return total


def _report(run: Run, loss: Tensor, lr: float, progress: Progress) -> None:
    done, plan = run.done, run.plan
    if done.step % plan.log_every and done.step != plan.steps:
        progress.update("")  # reading the loss would make the host wait for the device
        return
    facts = {
        "loss": float(run.processes.total(loss)),
        "rank": max((record.rank for record in run.opt.records if record.plan.kind == MATRIX), default=0),
        "rate": done.tokens / done.seconds,
        "lr": lr,
        "memory": peak_memory(plan.device),
    }
    run.folder.log(step=done.step, tokens=done.tokens, skipped=run.opt.skipped, **facts)
    progress.update(described(**facts))


def _diverged(run: Run, what: str) -> GradlrError:
    kept = f"{run.checkpoint} keeps the last good weights" if run.checkpoint else "nothing was saved yet"
    rate = run.opt.param_groups[0]["initial_lr"]
    return GradlrError(
        f"training stopped in step {run.done.step + 1}: {what}. {kept}. Start anew (--overwrite) with a lower --lr than "
        f"{rate:g}, a longer --warmup, or --max-grad-norm 1"
    )
