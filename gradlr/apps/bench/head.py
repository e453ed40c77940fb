"""An output head with logits and without: peak memory above the weights, and time of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from ...attach import attach
from ...capture.linear_cross_entropy import linear_cross_entropy
from ...tracker import LossTracker
from .environment import environment, markdown
from .memory import MIB, peak_bytes

Loss = Callable[[Tensor, nn.Linear, Tensor], Tensor]

_AS_HEAD = [{"match": "1.weight", "kind": "embedding"}]


def with_logits(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The ordinary loss."""
    return F.cross_entropy(head(hidden).float(), labels)


def _chunked_by_torch(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, labels, options=options)


def methods() -> list[tuple[str, str, Loss, str]]:
    """(name, label, loss, capture) of all rows; torch's own chunks where it has them, from 2.13 on."""
    ours, theirs = linear_cross_entropy, _chunked_by_torch
    rows: list[tuple[str, str, Loss, str]] = [
        ("logits", "logits", with_logits, "hook"),
        ("logits_adaptor", 'logits, capture="adaptor"', with_logits, "adaptor"),
        ("torch", "torch's linear_cross_entropy, chunked", theirs, "hook"),
        ("chunked", "linear_cross_entropy", ours, "hook"),
        ("chunked_adaptor", 'linear_cross_entropy, capture="adaptor"', ours, "adaptor"),
    ]
    return [row for row in rows if row[2] is not theirs or hasattr(nn, "LinearCrossEntropyOptions")]


def measure(
    *, vocabulary: int = 32768, width: int = 576, tokens: int = 2048, rounds: int = 3, device: str = "cpu"
) -> dict[str, Any]:
    """Peak MiB above the weights and seconds of a step (a Linear, the head, their updates), as a JSON-able report.

    Args:
        vocabulary, width: Of the head.
        tokens: Of a step.
        rounds: Steps that are timed, of which the median is told.
    """
    results = []
    for name, label, loss, capture in methods():
        peak, seconds = _measure_one(loss, capture, vocabulary, width, tokens, rounds, device)
        results.append({"name": name, "label": label, "peak_mib": round(peak / MIB, 1), "seconds": round(seconds, 2)})
    workload = {"vocabulary": vocabulary, "width": width, "tokens": tokens, "rounds": rounds}
    return {"environment": environment(device), "workload": workload, "results": results}


def _measure_one(
    loss: Loss, capture: str, vocabulary: int, width: int, tokens: int, rounds: int, device: str
) -> tuple[int, float]:
    torch.manual_seed(0)
    layers = nn.Linear(width, width, bias=False, device=device), nn.Linear(width, vocabulary, bias=False, device=device)
    model, tracker = nn.Sequential(*layers), LossTracker()
    x, labels = torch.randn(tokens, width, device=device), torch.randint(vocabulary, (tokens,), device=device)
    optimizer = attach(model, tracker, capture=capture, rank=16, groups=_AS_HEAD)

    # On a CPU the process's own time: what else runs on the machine is no part of it.
    is_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter

    def step() -> float:
        start = clock()
        value = loss(layers[0](x), layers[1], labels)
        tracker(value)
        value.backward()
        if not is_cpu:
            torch.cuda.synchronize(device)
        return clock() - start

    step()
    seconds = statistics.median(step() for _ in range(rounds))
    peak = peak_bytes(step, device)
    optimizer.detach()
    return peak, seconds


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = ((row["label"], f"{row['peak_mib']:.1f}", f"{row['seconds']:.2f}") for row in report["results"])
    return markdown(("loss of the head", "peak above the weights, MiB", "seconds a step"), rows)
