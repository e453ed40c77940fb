"""The training loop: steps, validation, checkpoints, and an end at any moment that loses nothing."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ...attach import attach
from ...checkpoint.file import load
from ...errors import GradlrError, NonFiniteError
from ...optimizer import GradLR
from ...params.kinds import MATRIX
from ...report.summary import format_bytes
from ...tracker import LossTracker
from ..bench.text import mixed_seed
from ..blocks import checkpoint_blocks
from ..progress import Progress
from ..signals import deferred_signals
from .fits import peak_memory
from .packing import IGNORED, cross_entropy, sequences_of_step
from .run_folder import RunFolder
from .task import Task

# A loss that is not finite may be one bad batch; so many in a row are a run that has diverged.
MOST_SKIPPED_IN_A_ROW = 5


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

    task: Task
    model: nn.Module
    opt: GradLR
    scheduler: torch.optim.lr_scheduler.LambdaLR
    folder: RunFolder
    done: Done = field(default_factory=Done)

    @classmethod
    def start(cls, task: Task, folder: RunFolder) -> Run:
        """Load the weights, attach; everything is as it was before the first step."""
        model = task.language.load(task.dtype, task.arguments.seed)
        if task.arguments.checkpointing:
            checkpoint_blocks(model)
        model = task.workers.holding.place(model, task.workers)
        opt = attach(model, LossTracker(), **task.options, **task.workers.attach_options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: _rate_factor(step, task.warmup, task.steps))
        return cls(task, model, opt, scheduler, folder)

    @property
    def checkpoint(self) -> Path | None:
        """The last whole one."""
        return self.task.workers.holding.checkpoint(self.folder)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        objects = {"model": self.model, "optimizer": self.opt, "scheduler": self.scheduler}
        self.task.workers.holding.save(self.folder, self.task.workers, **objects, done=asdict(self.done))

    def restore(self) -> int | None:
        """Go on from the checkpoint; the number of processes that wrote it, or None where there is none."""
        path, before, workers = self.checkpoint, None, self.task.workers
        # Every process reads it: on several machines, from a disk that all of them see.
        workers.require_same({f"checkpoint in {self.folder.path}": path and path.is_file() and path.stat().st_size})
        if path is not None:
            found = load(path, model=self.model, optimizer=self.opt, scheduler=self.scheduler)
            self.done = Done(**found["done"])
            before = self.done.processes
        self.done.processes = workers.size
        self.folder.rewind_log(-1 if before is None else self.done.step)
        return before

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over every target that was held out, in nats per token, without dropout; noted and logged."""
        task, workers, total, count = self.task, self.task.workers, 0.0, 0
        batches = torch.arange(len(task.held_out)).split(task.own_batch)
        self.model.eval()
        try:
            for start in range(0, len(batches), workers.size):
                number = start + workers.rank
                # Shards come together for every forward: where batches run out, the last one is taken, and not counted.
                inputs, targets = task.held_out.batch(batches[min(number, len(batches) - 1)])
                logits = task.language.logits(self.model, inputs.to(workers.device))
                learned = int((targets != IGNORED).sum()) if number < len(batches) else 0
                total += float(cross_entropy(logits, targets.to(workers.device))) * learned
                count += learned
        finally:
            self.model.train()
        total, count = workers.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        self.done.validation.append([self.done.step, total / count])
        self.folder.log(step=self.done.step, validation_loss=total / count)
        return total / count


def train(run: Run) -> int | None:
    """Take the steps that are left; the number of the signal that ended it early, with everything saved, or None.

    Raises:
        GradlrError: losses or gradients are not finite; the last checkpoint stays.
    """
    arguments, steps, done, workers = run.task.arguments, run.task.steps, run.done, run.task.workers
    run.model.train()
    shown = Progress("finetune", steps, done.step, is_shown=workers.is_first)
    with deferred_signals(signal.SIGINT, signal.SIGTERM) as signals, shown as progress:
        if not done.validation:
            progress.print(f"validation loss {run.validate():.4f} before training")
        stop = workers.common_signal(signals)
        while done.step < steps and stop is None:
            lr = float(run.scheduler.get_last_lr()[0])
            loss = _timed_step(run)
            _report(run, loss, lr, progress)
            if done.step % arguments.eval_every == 0 or done.step == steps:
                progress.print(f"validation loss {run.validate():.4f} after step {done.step}")
            stop = workers.common_signal(signals)
            if done.step % arguments.save_every == 0 or done.step == steps or stop is not None:
                run.save()
        if stop is not None and run.checkpoint is None:  # before the first step
            run.save()
    return stop if done.step < steps else None


def _rate_factor(step: int, warmup: int, steps: int) -> float:
    """Multiple of the peak learning rate: a linear warm-up from the first step on, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _timed_step(run: Run) -> Tensor:
    start, skipped, done = time.perf_counter(), run.opt.skipped, run.done
    try:
        loss = _step(run)
    except NonFiniteError as error:
        raise _diverged(run, str(error)) from error
    run.scheduler.step()
    done.seconds += time.perf_counter() - start
    done.skipped_in_a_row = done.skipped_in_a_row + 1 if run.opt.skipped > skipped else 0
    done.step += 1
    done.tokens += run.task.step_size * run.task.data.length
    if done.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        raise _diverged(run, f"{done.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite")
    return loss


def _step(run: Run) -> Tensor:
    """Forward, backward and update of one step; returns this process' part of its loss, 0-dim, on the device."""
    task, workers, step, seed = run.task, run.task.workers, run.done.step, run.task.arguments.seed
    # Dropout draws from torch's own generators.
    torch.manual_seed(mixed_seed(seed, f"step {step}, process {workers.rank}"))
    rows = sequences_of_step(len(task.data), task.step_size, seed=seed, step=step)
    batches = [task.data.batch(part) for part in rows.split(task.arguments.batch_size)]
    learned = sum(int((targets != IGNORED).sum()) for _, targets in batches)
    total = torch.zeros((), device=workers.device)
    for batch in batches:
        inputs, targets = (whole.chunk(workers.size)[workers.rank].to(workers.device) for whole in batch)
        loss = cross_entropy(task.language.logits(run.model, inputs), targets)
        # So that each token weighs the same, however many its micro-batch has.
        share = int((targets != IGNORED).sum()) / learned
        before, after = workers.loss_factors(share, len(batches))
        (cast(Tensor, run.opt.tracker(loss * before)) * after).backward()
        total += loss.detach() * share
    run.opt.step()
    return total


def _report(run: Run, loss: Tensor, lr: float, progress: Progress) -> None:
    """Log the step and show it; `loss` is this process' part."""
    done, workers = run.done, run.task.workers
    if done.step % run.task.arguments.log_every and done.step != run.task.steps:
        progress.update("")  # reading the loss would make the host wait for the device
        return
    rank = max((record.rank for record in run.opt.records if record.plan.kind == MATRIX), default=0)
    mean, rate, memory = float(workers.sum(loss)), done.tokens / done.seconds, peak_memory(workers.device)
    facts = {"loss": mean, "rank": rank, "rate": rate, "lr": lr, "memory": memory}
    run.folder.log(step=done.step, tokens=done.tokens, skipped=run.opt.skipped, **facts)
    held = "" if memory is None else f", {format_bytes(memory)}"
    progress.update(f"loss {mean:.4f}, rank {rank}, {rate:,.0f} tokens/s{held}, lr {lr:.2e}")


def _diverged(run: Run, reason: str) -> GradlrError:
    kept = f"{run.checkpoint} keeps the last good weights" if run.checkpoint else "nothing was saved yet"
    rate = run.opt.param_groups[0]["initial_lr"]
    return GradlrError(
        f"training stopped in step {run.done.step + 1}: {reason}. {kept}. Start anew (--overwrite) with a lower --lr than "
        f"{rate:g}, a longer --warmup, or --max-grad-norm 1"
    )
