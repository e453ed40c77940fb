"""Time of a training step as a ratio to plain forward + backward, interleaved in one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import rules
from .contenders import Contender, adamw, forward_backward, gradlr, sgd
from .environment import environment


def methods(rank: int) -> list[Contender]:
    """What is timed; the first is the reference."""
    bare = rules.TrackedMomentum(residual=0)
    products = rules.TrackedMomentum(residual=0, arithmetic="products")
    return [
        Contender("plain", "forward + backward", forward_backward, ()),
        Contender("no_residual", "gradlr, no residual", gradlr(rank=rank, rule=bare), ()),
        Contender("residual", "gradlr, residual", gradlr(rank=rank), ()),
        Contender("products", "gradlr, no residual, products only", gradlr(rank=rank, rule=products), ()),
        Contender("step", 'gradlr, apply="step"', gradlr(rank=rank, apply="step"), ()),
        Contender("adaptor", 'gradlr, capture="adaptor"', gradlr(rank=rank, capture="adaptor"), ()),
        Contender("sgd", "SGD", sgd, ()),
        Contender("adamw", "AdamW (fused)", lambda model, lr: adamw(model, lr, fused=True), ()),
    ]


def measure(*, width: int = 1024, tokens: int = 2048, rank: int = 32, rounds: int = 30, device: str = "cpu") -> dict[str, Any]:
    """Median milliseconds of one step of one Linear, and its ratio to plain forward + backward.

    Every round runs each method once, in an order of its own, so that a slow moment of the machine or what the one before left
    in the caches meets all of them; the ratio is the median of the rounds' ratios.
    """
    contenders = methods(rank)
    steps = [_make_step(contender, width, tokens, device) for contender in contenders]
    times = _interleaved(steps, rounds, device)
    results = []
    for index, contender in enumerate(contenders):
        ratio = statistics.median(row[index] / row[0] for row in times)
        median = statistics.median(row[index] for row in times)
        results.append({"name": contender.name, "label": contender.label, "ms": round(1e3 * median, 2), "ratio": round(ratio, 3)})
    workload = {"width": width, "tokens": tokens, "rank": rank, "rounds": rounds}
    return {"environment": environment(device), "workload": workload, "results": results}


def _make_step(contender: Contender, width: int, tokens: int, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False, device=device)
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    stepper = contender.make(layer, 1e-3)

    def step() -> None:
        stepper.step(lambda: layer(x).square().mean())
        x.grad = None

    return step


def _interleaved(steps: list[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    for step in steps * 3:  # warm up
        step()
    shuffle, times = random.Random(0), []
    for _ in range(rounds):
        order = shuffle.sample(range(len(steps)), len(steps))
        measured = {index: _timed(steps[index], device) for index in order}
        times.append([measured[index] for index in range(len(steps))])
    return times


def _timed(step: Callable[[], None], device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| step | ms | ratio |", "|---|---|---|"]
    lines += [f"| {row['label']} | {row['ms']:.1f} | {row['ratio']:.3f} |" for row in report["results"]]
    return "\n".join(lines)
