"""Time of a training step as a ratio to a plain one, interleaved in one run."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import rules
from .environment import environment, markdown
from .memory import adaptors
from .peers import PEERS
from .smollm2 import SmolLM2
from .text import batches, documentation
from .train_steps import Baseline, TrainStep, adamw, forward_backward, fused_adamw, gradlr, muon, ordinary, sgd
from .transformer import ByteTransformer, language_model_loss

Windows = list[tuple[Tensor, Tensor]]

SEQUENCES = 4
_RATE = 1e-3


def linear_methods(rank: int) -> list[Baseline]:
    """What is timed on one Linear; the first is the reference."""
    return [
        Baseline("plain", "forward + backward", forward_backward),
        Baseline("no_residual", "gradlr, no residual", gradlr(rank=rank, rule=rules.LowRankPolar(residual=0))),
        Baseline("residual", "gradlr, residual", gradlr(rank=rank)),
        Baseline("step", 'gradlr, apply="step"', gradlr(rank=rank, apply="step")),
        *adaptors(rank),
        Baseline("sgd", "SGD", sgd),
        Baseline("adamw", "AdamW (fused)", fused_adamw),
    ]


def transformer_methods(rank: int, device: str, peers: Sequence[str] = ()) -> list[Baseline]:
    """What is timed on a transformer; the first is the reference. Muon's products want a GPU at these widths.

    The peers' projections are made anew every 200 steps: only what lies between is timed.
    """
    return [
        Baseline("sgd", "SGD", sgd),
        Baseline("adamw", "AdamW (fused)", fused_adamw),
        *([Baseline("muon", "Muon", muon)] if torch.device(device).type == "cuda" else []),
        Baseline("hook", "gradlr", gradlr(rank=rank)),
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
    rows = _time_linear(linear_methods(rank), width, tokens, rounds, device, getattr(torch, dtype))
    workload = {"model": "linear", "width": width, "tokens": tokens, "rank": rank, "rounds": rounds, "dtype": dtype}
    return {"environment": environment(device), "workload": workload, "results": rows}


def measure_crossover(
    *, width: int = 1024, tokens: int = 2048, ranks: tuple[int, ...] = (), rounds: int = 15, device: str = "cpu"
) -> dict[str, Any]:
    """Time of one Linear's step by rank, with hooks and without weight gradient, as ratios to SGD."""
    results = []
    for rank in ranks or [max(1, share * width // 32) for share in (1, 2, 4, 8, 12)]:
        hook = Baseline("hook", "hook", gradlr(rank=rank, rule=rules.LowRankPolar(residual=0)))
        baselines = [Baseline("sgd", "SGD", sgd), hook, *adaptors(rank)]
        found = _time_linear(baselines, width, tokens, rounds, device, torch.float32)
        # Multiplications a token as a share of the gradient's: 2r(m + n) / mn, and r(m + 3n) / mn, which is the same here.
        results.append({"rank": rank, "work": 4 * rank / width, **{row["name"]: row["ratio"] for row in found}})
    workload = {"model": "linear", "width": width, "tokens": tokens, "rounds": rounds}
    return {"environment": environment(device), "workload": workload, "results": results}


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
    windows = [(x.to(device), y.to(device)) for x, y in text_windows(tokens)]
    steps = []
    for baseline in baselines:
        model = byte_transformer(width, depth, tokens).to(device, getattr(torch, dtype))
        steps.append(cycled(baseline.make(model, _RATE), model, windows))
    workload = {"model": "transformer", "width": width, "depth": depth, "tokens": tokens, "rank": rank, "rounds": rounds}
    results = timed_rows(baselines, interleaved(steps, rounds, device))
    return {"environment": environment(device), "workload": {**workload, "dtype": dtype}, "results": results}


class _Small(nn.Module):
    """Layers side by side, so small that their arithmetic is next to nothing."""

    def __init__(self, layers: int, size: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).square().sum() for layer in self.layers]).sum()


def _only_muon(model: nn.Module, lr: float) -> TrainStep:
    return ordinary(torch.optim.Muon(model.parameters(), lr=lr, weight_decay=0.0))


def host_methods() -> list[Baseline]:
    """Whose host time is told; it is that of a step above the first's, as a ratio to the second's, which torch 2.9 brought."""
    bare = rules.LowRankPolar(residual=0)
    return [
        Baseline("plain", "forward + backward", forward_backward),
        Baseline("muon", "Muon", _only_muon),
        Baseline("adamw", "AdamW (fused)", fused_adamw),
        Baseline("hook", "gradlr", gradlr()),
        Baseline("hook_r4", "gradlr, rank 4", gradlr(rank=4)),
        Baseline("hook_r4_no_residual", "gradlr, rank 4, no residual", gradlr(rank=4, rule=bare)),
        Baseline("adaptor_r4", 'gradlr, rank 4, capture="adaptor"', gradlr(rank=4, capture="adaptor")),
        Baseline("step_r4", 'gradlr, rank 4, apply="step"', gradlr(rank=4, apply="step")),
    ]


def measure_host(*, layers: int = 200, rounds: int = 15, device: str = "cpu") -> dict[str, Any]:
    """Median microseconds of the host's time that the update of one 16 × 16 matrix takes, and its ratio to Muon's.

    What is left of an update without arithmetic is what a fast GPU would wait for. The processor's time is taken, so that what
    else the machine does counts little.
    """
    baselines, x = host_methods(), torch.randn(8, 16, device=device)
    steps = []
    for baseline in baselines:
        torch.manual_seed(0)
        model = _Small(layers).to(device)
        steps.append(partial(baseline.make(model, _RATE).step, partial(model, x)))
    # Where a model is attached, its first sixteen losses look for parameters that have come since.
    times = interleaved(steps, rounds, device, warmup=17, of_host=True)
    medians = [statistics.median(row[index] - row[0] for row in times) / layers for index in range(len(baselines))]
    results = [
        {"name": baseline.name, "label": baseline.label, "us": round(1e6 * one, 1), "ratio": round(one / medians[1], 2)}
        for baseline, one in list(zip(baselines, medians, strict=True))[1:]
    ]
    workload = {"model": "small", "layers": layers, "rounds": rounds}
    return {"environment": environment(device), "workload": workload, "results": results}


def language_model_methods() -> list[Baseline]:
    """What is timed on SmolLM2; the first is the reference."""
    bare = rules.LowRankPolar(residual=0)
    return [
        Baseline("adamw", "AdamW", adamw),
        Baseline("hook", "gradlr", gradlr()),
        Baseline("adaptor", 'gradlr, capture="adaptor"', gradlr(capture="adaptor")),
        Baseline("adaptor_bare", 'gradlr, capture="adaptor", no residual', gradlr(capture="adaptor", rule=bare)),
    ]


def measure_language_model(
    *, tokens: int = 1024, rounds: int = 5, device: str = "cpu", peers: Sequence[str] = ()
) -> dict[str, Any]:
    """Median milliseconds of one whole training step of SmolLM2-135M in float32, and its ratio to AdamW's.

    Sequences of 128 tokens of the workload's own text.
    """
    workload = SmolLM2(batch_size=max(1, tokens // SmolLM2.length), steps=8)
    baselines = [*language_model_methods(), *(PEERS[name] for name in peers)]
    steps = []
    for baseline in baselines:
        model = workload.model(0, device)
        losses = itertools.cycle(workload.losses(model, 0))
        steps.append(partial(_take, baseline.make(model, _RATE / 100), losses))
    results = timed_rows(baselines, interleaved(steps, rounds, device, warmup=1))
    sizes = {"model": "smollm2", "tokens": workload.batch_size * workload.length, "rounds": rounds}
    return {"environment": environment(device), "workload": sizes, "results": results}


def _take(train_step: TrainStep, losses: Iterator[Callable[[], Tensor]]) -> None:
    train_step.step(next(losses))


def byte_transformer(width: int, depth: int, tokens: int) -> ByteTransformer:
    """Always the same one, with heads of 64, for `SEQUENCES` sequences that are `tokens` bytes together."""
    torch.manual_seed(0)
    return ByteTransformer(width, depth, max(1, width // 64), context=tokens // SEQUENCES)


def text_windows(tokens: int, seed: int = 0) -> Windows:
    """Inputs and targets of eight steps for it."""
    sizes = {"batch_size": SEQUENCES, "length": tokens // SEQUENCES}
    return list(batches(documentation().train, **sizes, steps=8, seed=seed))


def cycled(train_step: TrainStep, model: nn.Module, windows: Windows) -> Callable[[], Any]:
    """One training step a call, on pairs of inputs and targets in turn."""
    turns = itertools.cycle(windows)
    return lambda: train_step.step(partial(language_model_loss, model, *next(turns)))


def _time_linear(
    baselines: list[Baseline], width: int, tokens: int, rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    def step_of(baseline: Baseline) -> Callable[[], None]:
        torch.manual_seed(0)
        layer = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        train_step = baseline.make(layer, _RATE)

        def step() -> None:
            train_step.step(lambda: layer(x).square().mean())
            x.grad = None

        return step

    return timed_rows(baselines, interleaved([step_of(baseline) for baseline in baselines], rounds, device))


def interleaved(
    steps: Sequence[Callable[[], Any]],
    rounds: int,
    device: str,
    *,
    meet: Callable[[], Any] = lambda: None,
    warmup: int = 3,
    of_host: bool = False,
) -> list[list[float]]:
    """Seconds of each step in every round; each round runs all of them once, in an order of its own, and calls `meet` before.

    Those of the host's processor alone, which does not wait for the device, where asked for.
    """
    finish = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    clock, end = (time.process_time, lambda: None) if of_host else (time.perf_counter, finish)
    for step in [*steps] * warmup:
        step()
    shuffle, times = random.Random(0), []
    for _ in range(rounds):
        measured = [0.0] * len(steps)
        for index in shuffle.sample(range(len(steps)), len(steps)):
            meet()
            finish()
            start = clock()
            steps[index]()
            end()
            measured[index] = clock() - start
        times.append(measured)
    return times


def timed_rows(baselines: Sequence[Any], times: list[list[float]]) -> list[dict[str, Any]]:
    """Name, label, median milliseconds and ratio of each, from the seconds of every round; the first is the reference."""
    rows = []
    for index, baseline in enumerate(baselines):
        ratio = statistics.median(row[index] / row[0] for row in times)
        median = statistics.median(row[index] for row in times)
        rows.append({"name": baseline.name, "label": baseline.label, "ms": round(1e3 * median, 2), "ratio": round(ratio, 3)})
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = report["results"]
    if "us" in rows[0]:
        return markdown(
            ("update", "host, μs", "to Muon's"), ((row["label"], f"{row['us']:.1f}", f"{row['ratio']:.2f}") for row in rows)
        )
    if "rank" not in rows[0]:
        return markdown(("step", "ms", "ratio"), ((row["label"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}") for row in rows))
    names = {"hook": "hook", "adaptor": "adaptor", "adaptor_step": 'adaptor, `apply="step"`', "one_sided": "one_sided"}
    cells = ((str(row["rank"]), f"{row['work']:.2f}", *(f"{row[name]:.3f}" for name in names)) for row in rows)
    return markdown(("rank", "work / mn", *names.values()), cells)
