"""Fine-tuning side by side: validation loss of each optimizer at its own best learning rate, over several seeds."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .contenders import CONTENDERS, Contender, Stepper, split_parameters
from .environment import environment
from .pretrain import load_pretrained
from .text import batches, documentation, validation_batches
from .transformer import evaluate, language_model_loss


@dataclass(frozen=True)
class Workload:
    """Fine-tuning the shipped byte transformer, pretrained on library sources, on documentation strings.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows a step.
        length: Bytes a window; the checkpoint knows 128 positions.
        warmup: Steps of linear warm-up; linear decay to a tenth follows.
        validation_windows: Windows of `length` bytes that the validation loss is the mean over.
    """

    steps: int = 200
    batch_size: int = 8
    length: int = 128
    warmup: int = 10
    validation_windows: int = 256

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rate at a step counted from 0; the same schedule for every contender."""
        return min(1.0, (step + 1) / self.warmup) * (1.0 - 0.9 * step / self.steps)


@dataclass(frozen=True)
class Run:
    """One training run: who, at which rate and seed, and what came of it (nats per byte, numbers of state).

    No seconds: runs share the machine. `bench speed` measures time.
    """

    contender: str
    lr: float
    seed: int
    validation_loss: float
    matrix_state_per_weight: float
    state_per_weight: float


def fine_tune(contender: Contender, lr: float, seed: int, workload: Workload, device: str = "cpu") -> Run:
    """Fine-tune from the shipped checkpoint."""
    torch.manual_seed(seed)
    model = load_pretrained(device=device)
    stepper = contender.make(model, lr)
    for step, (inputs, targets) in enumerate(_training_batches(workload, seed)):
        stepper.set_rate(workload.rate_factor(step))
        stepper.step(partial(language_model_loss, model, inputs.to(device), targets.to(device)))
    loss = evaluate(model, validation(workload))
    return Run(contender.name, lr, seed, loss, *_state_per_weight(model, stepper))


def validation(workload: Workload) -> list[Any]:
    """The fixed validation batches of the workload."""
    count = max(1, workload.validation_windows // 16)
    return list(validation_batches(documentation().validation, batch_size=16, length=workload.length, count=count))


def _training_batches(workload: Workload, seed: int):
    sizes = {"batch_size": workload.batch_size, "length": workload.length, "steps": workload.steps}
    return batches(documentation().train, seed=seed, **sizes)


def _state_per_weight(model: torch.nn.Module, stepper: Stepper) -> tuple[float, float]:
    matrices, everything = split_parameters(model)[0], list(model.parameters())
    return tuple(stepper.state_numbers(part) / sum(p.numel() for p in part) for part in (matrices, everything))


def measure(
    names: Iterable[str],
    seeds: Sequence[int],
    workload: Workload,
    *,
    device: str = "cpu",
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Sweep each contender's learning rate on the first seed, extend the grid while the best lies at its edge, then run
    the best rate on the other seeds.

    Returns:
        A JSON-able report: environment, workload, and per contender the sweep, the best rate, mean and spread over the seeds.
    """
    contenders = [CONTENDERS[name] for name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sweeps = {contender.name: {} for contender in contenders}
        todo = [(contender, lr, seeds[0]) for contender in contenders for lr in contender.rates]
        while todo:
            for run in _run_all(pool, todo, workload, device, progress):
                sweeps[run.contender][run.lr] = run
            todo = [(c, lr, seeds[0]) for c in contenders for lr in _beyond_the_edge(sweeps[c.name])]
        best = {name: min(runs.values(), key=lambda run: run.validation_loss) for name, runs in sweeps.items()}
        others = [(c, best[c.name].lr, seed) for c in contenders for seed in seeds[1:]]
        repeats = _run_all(pool, others, workload, device, progress)
    results = [_summary(c, sweeps[c.name], best[c.name], [r for r in repeats if r.contender == c.name]) for c in contenders]
    start_loss = evaluate(load_pretrained(device=device), validation(workload))
    return {
        "environment": {**environment(device), "threads": 1, "jobs": jobs},
        "workload": asdict(workload),
        "seeds": list(seeds),
        "validation_loss_before": start_loss,
        "results": results,
    }


def _run_all(
    pool: ProcessPoolExecutor, todo: list[tuple[Contender, float, int]], workload: Workload, device: str, progress: bool
) -> list[Run]:
    # In the order asked for, so that a report does not depend on which run was the faster.
    futures = [pool.submit(_fine_tune_by_name, contender.name, lr, seed, workload, device) for contender, lr, seed in todo]
    runs = []
    for future in futures:
        runs.append(future.result())
        if progress:
            run = runs[-1]
            print(f"{run.contender:26s} lr {run.lr:<8g} seed {run.seed}  loss {run.validation_loss:.4f}", flush=True)
    return runs


def _fine_tune_by_name(name: str, lr: float, seed: int, workload: Workload, device: str) -> Run:
    return fine_tune(CONTENDERS[name], lr, seed, workload, device)


def _beyond_the_edge(runs: dict[float, Run]) -> list[float]:
    rates = sorted(runs)
    best = min(runs.values(), key=lambda run: run.validation_loss).lr
    if len(rates) > 8:
        return []
    return [best / 2] if best == rates[0] else [best * 2] if best == rates[-1] else []


def _summary(contender: Contender, sweep: dict[float, Run], best: Run, repeats: list[Run]) -> dict[str, Any]:
    losses = [best.validation_loss, *(run.validation_loss for run in repeats)]
    return {
        "name": contender.name,
        "label": contender.label,
        "best_lr": best.lr,
        "sweep": {f"{lr:g}": round(run.validation_loss, 5) for lr, run in sorted(sweep.items())},
        "losses": [round(loss, 5) for loss in losses],
        "mean": round(statistics.fmean(losses), 5),
        "spread": round(statistics.stdev(losses), 5) if len(losses) > 1 else None,
        "matrix_state_per_weight": round(best.matrix_state_per_weight, 5),
        "state_per_weight": round(best.state_per_weight, 5),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, best first."""
    lines = ["| optimizer | state per matrix weight | best lr | validation loss |", "|---|---|---|---|"]
    for row in sorted(report["results"], key=lambda row: row["mean"]):
        spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
        state = f"{row['matrix_state_per_weight']:.3g}"
        lines.append(f"| {row['label']} | {state} | {row['best_lr']:g} | {row['mean']:.4f}{spread} |")
    return "\n".join(lines)
