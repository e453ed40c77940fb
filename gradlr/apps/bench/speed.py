"""Time of a training step as a ratio to a plain one, interleaved in one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import rules
from .environment import environment
from .peers import PEERS
from .text import batches, documentation
from .train_steps import Baseline, TrainStep, forward_backward, fused_adamw, gradlr, muon, sgd
from .transformer import ByteTransformer, language_model_loss

SEQUENCES = 4
_RATE = 1e-3


def linear_methods(rank: int) -> list[Baseline]:
    """What is timed on one Linear; the first is the reference."""
    bare = rules.TrackedMomentum(residual=0)
    return [
        Baseline("plain", "forward + backward", forward_backward, ()),
        Baseline("no_residual", "gradlr, no residual", gradlr(rank=rank, rule=bare), ()),
        Baseline("residual", "gradlr, residual", gradlr(rank=rank), ()),
        Baseline("step", 'gradlr, apply="step"', gradlr(rank=rank, apply="step"), ()),
        *adaptors(rank),
        Baseline("sgd", "SGD", sgd, ()),
        Baseline("adamw", "AdamW (fused)", fused_adamw, ()),
    ]


def adaptors(rank: int) -> list[Baseline]:
    """gradlr without a weight gradient, in all its ways."""
    return [
        Baseline("adaptor", 'gradlr, capture="adaptor"', gradlr(rank=rank, capture="adaptor"), ()),
        Baseline("adaptor_step", 'gradlr, capture="adaptor", apply="step"',
                  gradlr(rank=rank, capture="adaptor", apply="step"), ()),
        Baseline("one_sided", 'gradlr, capture="one_sided"', gradlr(rank=rank, capture="one_sided"), ()),
    ]  # fmt: skip


def transformer_methods(rank: int, device: str, peers: Sequence[str] = ()) -> list[Baseline]:
    """What is timed on a transformer; the first is the reference. Muon's products want a GPU at these widths.

    The peers' projections are made anew every 200 steps: only what lies between is timed.
    """
    return [
        Baseline("sgd", "SGD", sgd, ()),
        Baseline("adamw", "AdamW (fused)", fused_adamw, ()),
        *([Baseline("muon", "Muon", muon, ())] if torch.device(device).type == "cuda" else []),
        Baseline("hook", "gradlr", gradlr(rank=rank), ()),
        *adaptors(rank),
        *(PEERS[name] for name in peers),
    ]


def measure(
    *, width: int = 1024, tokens: int = 2048, rank: int = 32, rounds: int = 30, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """Median milliseconds of one step of one Linear, and its ratio to plain forward + backward.

    Every round runs each method once, in an order of its own, so that a slow moment of the machine or what the one before left
    in the caches meets all of them; the ratio is the median of the rounds' ratios.
    """
    baselines = linear_methods(rank)
    steps = [_linear_step(baseline, width, tokens, device, getattr(torch, dtype)) for baseline in baselines]
    workload = {"model": "linear", "width": width, "tokens": tokens, "rank": rank, "rounds": rounds, "dtype": dtype}
    return _report(baselines, interleaved(steps, rounds, device), workload, device)


def measure_transformer(
    *,
    width: int = 1024,
    depth: int = 2,
    tokens: int = 2048,
    rank: int = 32,
    rounds: int = 15,
    device: str = "cpu",
    dtype: str = "float32",
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Median milliseconds of one whole training step of a byte transformer on real text, and its ratio to SGD's.

    Four sequences of a quarter of the tokens each; heads of 64; embeddings, attention and tied head included.
    """
    baselines = transformer_methods(rank, device, peers)
    sizes = (width, depth, tokens // SEQUENCES, device, getattr(torch, dtype))
    steps = [_transformer_step(baseline, *sizes) for baseline in baselines]
    workload = {"model": "transformer", "width": width, "depth": depth, "tokens": tokens, "rank": rank, "rounds": rounds}
    return _report(baselines, interleaved(steps, rounds, device), {**workload, "dtype": dtype}, device)


def measure_crossover(
    *, width: int = 1024, tokens: int = 2048, ranks: tuple[int, ...] = (), rounds: int = 15, device: str = "cpu"
) -> dict[str, Any]:
    """Time of one Linear's step by rank, with hooks and without weight gradient, as ratios to SGD."""
    results = []
    for rank in ranks or [width // 32, width // 16, width // 8, width // 4, 3 * width // 8]:
        rank = max(rank, 1)
        hook = Baseline("hook", "hook", gradlr(rank=rank, rule=rules.TrackedMomentum(residual=0)), ())
        baselines = [Baseline("sgd", "SGD", sgd, ()), hook, *adaptors(rank)]
        steps = [_linear_step(baseline, width, tokens, device, torch.float32) for baseline in baselines]
        found = timed_rows(baselines, interleaved(steps, rounds, device))
        # Multiplications a token as a share of the gradient's: 2r(m + n) / mn, and r(m + 3n) / mn, which is the same here.
        results.append({"rank": rank, "work": 4 * rank / width, **{row["name"]: row["ratio"] for row in found}})
    workload = {"model": "linear", "width": width, "tokens": tokens, "rounds": rounds}
    return {"environment": environment(device), "workload": workload, "results": results}


def _report(baselines: list[Baseline], times: list[list[float]], workload: dict[str, Any], device: str) -> dict[str, Any]:
    return {"environment": environment(device), "workload": workload, "results": timed_rows(baselines, times)}


def timed_rows(baselines: Sequence[Any], times: list[list[float]]) -> list[dict[str, Any]]:
    """Name, label, median milliseconds and ratio of each, from the seconds of every round; the first is the reference."""
    rows = []
    for index, baseline in enumerate(baselines):
        ratio = statistics.median(row[index] / row[0] for row in times)
        median = statistics.median(row[index] for row in times)
        rows.append({"name": baseline.name, "label": baseline.label, "ms": round(1e3 * median, 2), "ratio": round(ratio, 3)})
    return rows


def _linear_step(baseline: Baseline, width: int, tokens: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    train_step = baseline.make(layer, _RATE)

    def step() -> None:
        train_step.step(lambda: layer(x).square().mean())
        x.grad = None

    return step


def _transformer_step(
    baseline: Baseline, width: int, depth: int, length: int, device: str, dtype: torch.dtype
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = ByteTransformer(width, depth, max(1, width // 64), context=length).to(device, dtype)
    text = batches(documentation().train, batch_size=SEQUENCES, length=length, steps=8, seed=0)
    windows = [(inputs.to(device), targets.to(device)) for inputs, targets in text]
    return cycled(baseline.make(model, _RATE), model, windows)


def cycled(train_step: TrainStep, model: nn.Module, windows: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """One training step a call, on pairs of inputs and targets in turn."""
    count = 0

    def step() -> None:
        nonlocal count
        inputs, targets = windows[count % len(windows)]
        train_step.step(lambda: language_model_loss(model, inputs, targets))
        count += 1

    return step


def interleaved(
    steps: list[Callable[[], None]], rounds: int, device: str, *, meet: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """Seconds of each step in every round; each round runs all of them once, in an order of its own, and calls `meet` before."""
    for step in steps * 3:  # warm up
        step()
    shuffle, times = random.Random(0), []
    for _ in range(rounds):
        order = shuffle.sample(range(len(steps)), len(steps))
        measured = {index: _timed(steps[index], device, meet) for index in order}
        times.append([measured[index] for index in range(len(steps))])
    return times


def _timed(step: Callable[[], None], device: str, meet: Callable[[], Any]) -> float:
    meet()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    if "rank" in report["results"][0]:
        return _crossover_table(report)
    lines = ["| step | ms | ratio |", "|---|---|---|"]
    lines += [f"| {row['label']} | {row['ms']:.1f} | {row['ratio']:.3f} |" for row in report["results"]]
    return "\n".join(lines)


def _crossover_table(report: dict[str, Any]) -> str:
    lines = ['| rank | work / mn | hook | adaptor | adaptor, `apply="step"` | one_sided |', "|---|---|---|---|---|---|"]
    for row in report["results"]:
        ratios = " | ".join(f"{row[name]:.3f}" for name in ("hook", "adaptor", "adaptor_step", "one_sided"))
        lines.append(f"| {row['rank']} | {row['work']:.2f} | {ratios} |")
    return "\n".join(lines)
