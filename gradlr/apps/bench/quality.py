"""Training side by side: validation loss of each optimizer at its own best learning rate, over several seeds."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ArgumentError, NonFiniteError
from .baselines import baseline
from .environment import environment, markdown
from .memory import MIB, peak_bytes
from .peers import Peer
from .speed import interleaved, timed_rows
from .train_steps import Baseline, TrainStep, split_by_axes, split_parameters
from .workloads import Workload, rate_factor

LARGEST_SWEEP = 8
_ROUNDS = 6  # of the timing
_WATCHED = 2  # steps whose memory is watched: the second holds all that any later one does


@dataclass(frozen=True)
class Run:
    """One training run: who, at which rate and seed, and what came of it.

    Attributes:
        metrics: What the workload's validation gives; the loss is infinite where training diverged.
        state_bytes: Bytes of all state at the end.
        matrix_state_per_weight: That of the matrices, in float32 numbers per weight.
        mean_rank: Mean over the steps and matrices; None but for gradlr.
        peak_bytes: The most that a step holds above weights and buffers.
        step_ms: Median time of the run's own steps, after those whose memory was watched.
    """

    baseline: str
    lr: float
    seed: int
    metrics: dict[str, float]
    state_bytes: int
    matrix_state_per_weight: float
    mean_rank: float | None
    peak_bytes: int
    step_ms: float | None

    @property
    def loss(self) -> float:
        """Validation loss in nats."""
        return self.metrics["loss"]


def train(baseline: Baseline, lr: float, seed: int, workload: Workload, device: str = "cpu") -> Run:
    """One run from the workload's own start; it ends where a loss or a gradient is no longer finite."""
    model = workload.model(seed, device)
    matrices = split_parameters(model)[0]
    steps = enumerate(workload.losses(model, seed))
    ranks: list[float] = []
    times: list[float] = []
    metrics, is_finite = {"loss": math.inf}, True

    def take(count: int | None) -> None:
        """Take steps, all that are left where `count` is None, as long as losses are finite."""
        nonlocal is_finite
        for step, compute in itertools.islice(steps, count if is_finite else 0):
            train_step.set_rate(rate_factor(workload, step))
            start = time.perf_counter()
            is_finite = math.isfinite(train_step.step(compute).item())
            times.append(time.perf_counter() - start)
            if (rank := train_step.mean_rank()) is not None:
                ranks.append(rank)
            if not is_finite:
                return

    train_step, peak = TrainStep(lambda compute: compute(), []), 0

    def start() -> TrainStep:
        nonlocal train_step
        train_step = baseline.make(model, lr)
        take(_WATCHED)
        return train_step

    try:
        peak = peak_bytes(start, device)
        take(None)
        found = workload.evaluate(model) if is_finite else metrics
        metrics = found if math.isfinite(found["loss"]) else metrics
    except (NonFiniteError, torch.linalg.LinAlgError):
        pass  # diverged
    per_matrix_weight = train_step.state_bytes(matrices) / 4 / max(1, sum(p.numel() for p in matrices))
    mean_rank = statistics.fmean(ranks) if ranks else None
    step_ms = round(1e3 * statistics.median(times[_WATCHED:]), 3) if times[_WATCHED:] else None
    return Run(baseline.name, lr, seed, metrics, train_step.state_bytes(), per_matrix_weight, mean_rank, peak, step_ms)


class RunStore:
    """Runs of one workload, in memory and, where a file is given, in it: a line of JSON each, written as the run ends.

    Several processes may add to one file at the same time.

    Args:
        path: The file; made where it is not there yet.
        workload: Whose runs these are; those of others in the same file are left alone.
        device: Where they run.
    """

    def __init__(self, path: Path | None, workload: Workload, device: str) -> None:
        self._path, self._where = path, {"workload": {"name": workload.name, **asdict(workload)}, "device": device}
        self._runs: dict[tuple[str, float, int], Run] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else ():
            saved = json.loads(line)
            if {key: saved.pop(key) for key in self._where} == self._where:
                saved["metrics"] = {key: math.inf if value is None else value for key, value in saved["metrics"].items()}
                self._keep(Run(**saved))

    def __call__(self, baseline: str, lr: float, seed: int) -> Run | None:
        """The run with this rate and seed, or None where it is still to be done."""
        return self._runs.get((baseline, lr, seed))

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def sweep(self, baseline: str, seed: int) -> dict[float, Run]:
        """Its runs with this seed, by rate."""
        return {run.lr: run for run in self if (run.baseline, run.seed) == (baseline, seed)}

    def add(self, run: Run) -> None:
        """Keep a run."""
        self._keep(run)
        if self._path is not None:
            metrics = {key: _finite(value) for key, value in run.metrics.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self._where, **asdict(run), "metrics": metrics}) + "\n")

    def _keep(self, run: Run) -> None:
        self._runs[run.baseline, run.lr, run.seed] = run


def measure(
    names: Sequence[str],
    seeds: Sequence[int],
    workload: Workload,
    *,
    device: str = "cpu",
    jobs: int = 1,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Sweep each baseline's learning rate on the first seed, extend the grid while the best lies at its edge, then run
    the best rate on the other seeds; at last time one step of each, interleaved.

    Args:
        names: Baselines; those that cannot train the workload are left out.
        seeds: Of data and random weights; the first is that of the sweep.
        workload, device: What is trained, and where.
        jobs: Runs at a time, one thread each.
        resume: File of runs: those that it holds are not done again, and each new one is added as it ends.

    Returns:
        A JSON-able report: environment, workload, and per baseline the sweep, the best rate, mean and spread over the seeds,
        state, and the milliseconds of one step on one thread.

    Raises:
        ArgumentError: none of the baselines can train the workload.
    """
    baselines = choose(names, workload)
    if not baselines:
        raise ArgumentError(f"none of {', '.join(names)} can train {workload.name}: name others, such as adamw")
    context, store, times = multiprocessing.get_context("spawn"), RunStore(resume, workload, device), None
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run_all(todo: Iterable[tuple[Baseline, float, int]]) -> None:
            wanted = [(one.name, lr, seed) for one, lr, seed in todo]
            futures = [pool.submit(_train_by_name, *key, workload, device) for key in wanted if store(*key) is None]
            for future in as_completed(futures):
                run = future.result()
                store.add(run)
                print(f"{run.baseline:26s} lr {run.lr:<8g} seed {run.seed}  {_told(run.metrics)}", flush=True)

        todo = [(one, lr * workload.rate_scale, seeds[0]) for one in baselines for lr in one.rates]
        while todo:
            run_all(todo)
            todo = [(one, lr, seeds[0]) for one in baselines for lr in _beyond_the_edge(store.sweep(one.name, seeds[0]))]
        best = {one: _best_of(store.sweep(one.name, seeds[0])).lr for one in baselines}
        run_all((one, lr, seed) for one, lr in best.items() for seed in seeds[1:])
        if workload.times_apart:
            times = pool.submit(_step_times, [one.name for one in baselines], workload, device).result()
    return report(baselines, seeds, store, workload, device=device, jobs=jobs, times=times)


def report(
    baselines: Sequence[Baseline],
    seeds: Sequence[int],
    store: RunStore,
    workload: Workload,
    *,
    device: str = "cpu",
    jobs: int = 1,
    times: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What the runs of a store say, as `measure` returns it; a baseline without a run at the first seed is left out.

    Args:
        baselines, seeds, workload, device, jobs: As for `measure`.
        store: The runs.
        times: Milliseconds of one step of each baseline; those of its best run where None.
    """
    results = []
    for one in baselines:
        if sweep := store.sweep(one.name, seeds[0]):
            best = _best_of(sweep)
            repeats = [run for seed in seeds[1:] if (run := store(one.name, best.lr, seed)) is not None]
            step_ms = best.step_ms if times is None else times[one.name]
            results.append({**_summary(one, sweep, [best, *repeats]), "step_ms": step_ms})
    return {
        "environment": {**environment(device), "threads": 1, "jobs": jobs},
        "workload": {"name": workload.name, **asdict(workload)},
        "seeds": list(seeds),
        "before": workload.evaluate(workload.model(seeds[0], device)),
        "results": results,
    }


def choose(names: Iterable[str], workload: Workload) -> list[Baseline]:
    """The named baselines, but for adapters on weights that know nothing, and packages of 2-D weights on others."""
    has_folded = bool(split_by_axes(split_parameters(workload.model(0, "cpu"))[0])[1])

    def is_suited(one: Baseline) -> bool:
        if not isinstance(one, Peer):
            return True
        return (workload.needs_pretrained or not one.is_adapter) and (one.takes_folded or not has_folded)

    return [one for one in map(baseline, names) if is_suited(one)]


def _train_by_name(name: str, lr: float, seed: int, workload: Workload, device: str) -> Run:
    # Names travel to other processes; what a baseline makes does not.
    return train(baseline(name), lr, seed, workload, device)


def _best_of(runs: dict[float, Run]) -> Run:
    return min(runs.values(), key=lambda run: run.loss)


def _beyond_the_edge(runs: dict[float, Run]) -> list[float]:
    rates, best = sorted(runs), _best_of(runs).lr
    if len(rates) >= LARGEST_SWEEP:
        return []
    return [best / 2] if best == rates[0] else [best * 2] if best == rates[-1] else []


def _step_times(names: list[str], workload: Workload, device: str) -> dict[str, float]:
    """Median milliseconds of one training step of each, by rounds in which each has its turn."""

    def step_of(one: Baseline) -> Callable[[], Any]:
        model = workload.model(0, device)
        train_step = one.make(model, one.rates[0] * workload.rate_scale / 4)
        losses = itertools.cycle(list(itertools.islice(workload.losses(model, 0), 4)))
        return lambda: train_step.step(next(losses))

    baselines = [baseline(name) for name in names]
    rows = timed_rows(baselines, interleaved([step_of(one) for one in baselines], _ROUNDS, device))
    return {row["name"]: row["ms"] for row in rows}


def _told(metrics: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())


def _summary(baseline: Baseline, sweep: dict[float, Run], runs: list[Run]) -> dict[str, Any]:
    losses = [run.loss for run in runs]
    found = {
        "name": baseline.name,
        "label": baseline.label,
        "best_lr": runs[0].lr,
        "sweep": {f"{lr:g}": _finite(run.loss) for lr, run in sorted(sweep.items())},
        "losses": [_finite(loss) for loss in losses],
        "mean": _finite(statistics.fmean(losses)),
        "spread": round(statistics.stdev(losses), 5) if len(losses) > 1 and math.isfinite(sum(losses)) else None,
    }
    for key in ("accuracy", "general"):
        if all(key in run.metrics for run in runs):
            found[key] = round(statistics.fmean(run.metrics[key] for run in runs), 5)
            found[f"{key}_sweep"] = {f"{lr:g}": _finite(run.metrics.get(key, math.inf)) for lr, run in sorted(sweep.items())}
    if ranks := [run.mean_rank for run in runs if run.mean_rank is not None]:
        found["mean_rank"] = round(statistics.fmean(ranks), 2)
    per_weight = round(runs[0].matrix_state_per_weight, 5)
    sizes = {"state_bytes": runs[0].state_bytes, "matrix_state_per_weight": per_weight, "peak_bytes": runs[0].peak_bytes}
    return {**found, **sizes}


def _finite(loss: float) -> float | None:
    # JSON knows no infinity.
    return round(loss, 5) if math.isfinite(loss) else None


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, best first; a run that diverged comes last. Columns that no row has are left out."""
    rows = sorted(report["results"], key=lambda row: math.inf if row["mean"] is None else row["mean"])
    columns = {head: cell for head, (key, cell) in _COLUMNS.items() if any(key in row for row in rows)}
    return markdown(list(columns), ([cell(row) for cell in columns.values()] for row in rows))


def _loss_cell(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
    return "diverged" if row["mean"] is None else f"{row['mean']:.4f}{spread}"


_COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "optimizer": ("label", lambda row: row["label"]),
    "state per matrix weight": ("matrix_state_per_weight", lambda row: f"{row['matrix_state_per_weight']:.3g}"),
    "state, MiB": ("state_bytes", lambda row: f"{row['state_bytes'] / MIB:.2f}"),
    "peak above the weights, MiB": ("peak_bytes", lambda row: f"{row['peak_bytes'] / MIB:.1f}" if "peak_bytes" in row else ""),
    "step, ms": ("step_ms", lambda row: f"{row['step_ms']:.1f}"),
    "best lr": ("best_lr", lambda row: f"{row['best_lr']:g}"),
    "validation loss": ("mean", _loss_cell),
    "general loss": ("general", lambda row: f"{row['general']:.4f}" if "general" in row else ""),
    "accuracy": ("accuracy", lambda row: f"{row['accuracy']:.3f}" if "accuracy" in row else ""),
}
