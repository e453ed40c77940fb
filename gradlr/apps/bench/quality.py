"""Training side by side: validation loss of each optimizer at its own best learning rate, over several seeds."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import ArgumentError, NonFiniteError
from .baselines import baseline, suits
from .classification import Digits, SourceClassification
from .environment import environment
from .language import FineTuning, FromScratch, SmallBatches
from .speed import interleaved
from .train_steps import Baseline, split_by_axes, split_parameters
from .workloads import Workload

WORKLOADS: dict[str, type[Workload]] = {
    "pretrained": FineTuning,
    "scratch": FromScratch,
    "small-batches": SmallBatches,
    "minilm": SourceClassification,
    "digits": Digits,
}
LARGEST_SWEEP = 8


@dataclass(frozen=True)
class Run:
    """One training run: who, at which rate and seed, and what came of it.

    Attributes:
        metrics: What the workload's validation gives; the loss is infinite where training diverged.
        state_bytes: Bytes of all state at the end.
        matrix_state_per_weight, state_per_weight: The same in float32 numbers per weight of the matrices, and of the model.
        mean_rank: Mean over the steps and matrices; None but for gradlr.
    """

    baseline: str
    lr: float
    seed: int
    metrics: dict[str, float]
    state_bytes: int
    matrix_state_per_weight: float
    state_per_weight: float
    mean_rank: float | None

    @property
    def loss(self) -> float:
        """Validation loss in nats."""
        return self.metrics["loss"]


def train(baseline: Baseline, lr: float, seed: int, workload: Workload, device: str = "cpu") -> Run:
    """One run from the workload's own start; it ends where a loss or a gradient is no longer finite."""
    model = workload.model(seed, device)
    matrices, weights = split_parameters(model)[0], sum(p.numel() for p in model.parameters())
    train_step = baseline.make(model, lr)
    ranks, is_finite = [], True
    try:
        for step, compute in enumerate(workload.losses(model, seed)):
            train_step.set_rate(workload.rate_factor(step))
            is_finite = math.isfinite(train_step.step(compute).item())
            ranks.append(train_step.mean_rank())
            if not is_finite:
                break
    except (NonFiniteError, torch.linalg.LinAlgError):
        is_finite = False
    metrics = workload.evaluate(model) if is_finite else {"loss": math.inf}
    if not math.isfinite(metrics["loss"]):
        metrics = {"loss": math.inf}
    per_matrix_weight = train_step.state_bytes(matrices) / 4 / max(1, sum(p.numel() for p in matrices))
    total = train_step.state_bytes()
    mean_rank = None if None in ranks or not ranks else statistics.fmean(ranks)
    return Run(baseline.name, lr, seed, metrics, total, per_matrix_weight, total / 4 / weights, mean_rank)


def measure(
    names: Sequence[str],
    seeds: Sequence[int],
    workload: Workload,
    *,
    device: str = "cpu",
    jobs: int = 1,
    rounds: int = 6,
    progress: bool = True,
) -> dict[str, Any]:
    """Sweep each baseline's learning rate on the first seed, extend the grid while the best lies at its edge, then run
    the best rate on the other seeds; at last time one step of each, interleaved.

    Args:
        names: Contenders; those that cannot train the workload are left out.
        rounds: Rounds of the timing.

    Returns:
        A JSON-able report: environment, workload, and per baseline the sweep, the best rate, mean and spread over the seeds,
        state, and the milliseconds of one step on one thread.

    Raises:
        ArgumentError: none of the baselines can train the workload.
    """
    baselines = choose(names, workload)
    if not baselines:
        raise ArgumentError(f"none of {', '.join(names)} can train {_name_of(workload)}: name others, such as adamw")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run_all(todo: list[tuple[Baseline, float, int]]) -> list[Run]:
            return _run_all(pool, todo, workload, device, progress)

        sweeps = _sweep(baselines, workload, seeds[0], run_all)
        best = {name: min(runs.values(), key=lambda run: run.loss) for name, runs in sweeps.items()}
        repeats = run_all([(c, best[c.name].lr, seed) for c in baselines for seed in seeds[1:]])
        times = pool.submit(_step_times, [c.name for c in baselines], workload, rounds, device).result()
    results = [
        {**_summary(c, sweeps[c.name], best[c.name], [r for r in repeats if r.baseline == c.name]), "step_ms": times[c.name]}
        for c in baselines
    ]
    return {
        **conditions(seeds, workload, device, jobs),
        "before": workload.evaluate(workload.model(seeds[0], device)),
        "results": results,
    }


def conditions(seeds: Sequence[int], workload: Workload, device: str, jobs: int) -> dict[str, Any]:
    """What rows of one report have in common: environment, workload and seeds."""
    return {
        "environment": {**environment(device), "threads": 1, "jobs": jobs},
        "workload": {"name": _name_of(workload), **asdict(workload)},
        "seeds": list(seeds),
    }


def require_same_conditions(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise an ArgumentError unless both were measured on the same workload, seeds and machine."""
    for key in ("environment", "workload", "seeds"):
        if old.get(key) != new[key]:
            raise ArgumentError(f"the rows do not belong together: {key} was {old.get(key)} and is {new[key]}; measure all anew")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old report with the new one's rows in place of, or after, its own.

    Raises:
        ArgumentError: they were not measured on the same workload, seeds and machine.
    """
    require_same_conditions(old, new)
    rows = {row["name"]: row for row in (*old["results"], *new["results"])}
    return {**old, "results": list(rows.values())}


def choose(names: Iterable[str], workload: Workload) -> list[Baseline]:
    """The named baselines, but for those that cannot train the workload."""
    has_folded = bool(split_by_axes(split_parameters(workload.model(0, "cpu"))[0])[1])
    chosen = [baseline(name) for name in names]
    return [one for one in chosen if suits(one, workload, has_folded)]


def _name_of(workload: Workload) -> str:
    return next(name for name, kind in WORKLOADS.items() if type(workload) is kind)


def _sweep(
    baselines: list[Baseline],
    workload: Workload,
    seed: int,
    run_all: Callable[[list[tuple[Baseline, float, int]]], list[Run]],
) -> dict[str, dict[float, Run]]:
    sweeps: dict[str, dict[float, Run]] = {one.name: {} for one in baselines}
    todo = [(one, lr * workload.rate_scale, seed) for one in baselines for lr in one.rates]
    while todo:
        for run in run_all(todo):
            sweeps[run.baseline][run.lr] = run
        todo = [(one, lr, seed) for one in baselines for lr in _beyond_the_edge(sweeps[one.name])]
    return sweeps


def _run_all(
    pool: ProcessPoolExecutor, todo: list[tuple[Baseline, float, int]], workload: Workload, device: str, progress: bool
) -> list[Run]:
    # In the order asked for, so that a report does not depend on which run was the faster.
    futures = [pool.submit(_train_by_name, one.name, lr, seed, workload, device) for one, lr, seed in todo]
    runs = []
    for future in futures:
        runs.append(future.result())
        if progress:
            run = runs[-1]
            print(f"{run.baseline:26s} lr {run.lr:<8g} seed {run.seed}  loss {run.loss:.4f}", flush=True)
    return runs


def _train_by_name(name: str, lr: float, seed: int, workload: Workload, device: str) -> Run:
    return train(baseline(name), lr, seed, workload, device)


def _beyond_the_edge(runs: dict[float, Run]) -> list[float]:
    rates = sorted(runs)
    best = min(runs.values(), key=lambda run: run.loss).lr
    if len(rates) >= LARGEST_SWEEP:
        return []
    return [best / 2] if best == rates[0] else [best * 2] if best == rates[-1] else []


def _step_times(names: list[str], workload: Workload, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of one training step of each, by rounds in which each has its turn."""
    steps = [_step_of(baseline(name), workload, device) for name in names]
    rows = interleaved(steps, rounds, device)
    return {name: round(1e3 * statistics.median(row[i] for row in rows), 2) for i, name in enumerate(names)}


def _step_of(baseline: Baseline, workload: Workload, device: str) -> Callable[[], None]:
    model = workload.model(0, device)
    train_step = baseline.make(model, baseline.rates[0] * workload.rate_scale / 4)
    computing = itertools.cycle(list(itertools.islice(workload.losses(model, 0), 4)))
    return lambda: train_step.step(next(computing))


def _summary(baseline: Baseline, sweep: dict[float, Run], best: Run, repeats: list[Run]) -> dict[str, Any]:
    runs = [best, *repeats]
    losses = [run.loss for run in runs]
    found = {
        "name": baseline.name,
        "label": baseline.label,
        "best_lr": best.lr,
        "sweep": {f"{lr:g}": _finite(run.loss) for lr, run in sorted(sweep.items())},
        "losses": [_finite(loss) for loss in losses],
        "mean": _finite(statistics.fmean(losses)),
        "spread": round(statistics.stdev(losses), 5) if len(losses) > 1 and math.isfinite(sum(losses)) else None,
    }
    if all("accuracy" in run.metrics for run in runs):
        found["accuracy"] = round(statistics.fmean(run.metrics["accuracy"] for run in runs), 4)
    ranks = [run.mean_rank for run in runs if run.mean_rank is not None]
    if ranks:
        found["mean_rank"] = round(statistics.fmean(ranks), 2)
    found["state_bytes"] = best.state_bytes
    found["matrix_state_per_weight"] = round(best.matrix_state_per_weight, 5)
    return {**found, "state_per_weight": round(best.state_per_weight, 5)}


def _finite(loss: float) -> float | None:
    # JSON knows no infinity.
    return round(loss, 5) if math.isfinite(loss) else None


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, best first; a run that diverged comes last. Columns that no row has are left out."""
    rows = sorted(report["results"], key=lambda row: math.inf if row["mean"] is None else row["mean"])
    columns = {head: cell for head, (key, cell) in _COLUMNS.items() if any(key in row for row in rows)}
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def _loss_cell(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
    return "diverged" if row["mean"] is None else f"{row['mean']:.4f}{spread}"


_COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "optimizer": ("label", lambda row: row["label"]),
    "state per matrix weight": ("matrix_state_per_weight", lambda row: f"{row['matrix_state_per_weight']:.3g}"),
    "state, MiB": ("state_bytes", lambda row: f"{row['state_bytes'] / 2**20:.2f}"),
    "step, ms": ("step_ms", lambda row: f"{row['step_ms']:.1f}"),
    "best lr": ("best_lr", lambda row: f"{row['best_lr']:g}"),
    "validation loss": ("mean", _loss_cell),
    "accuracy": ("accuracy", lambda row: f"{row['accuracy']:.3f}" if "accuracy" in row else ""),
}
