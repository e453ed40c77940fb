"""int8 weights: the peak of a training step in all, weights included, beside that of bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...layers.quantize import quantize_
from ...linalg.int8 import stored_parts
from .environment import environment, markdown
from .memory import MIB, peak_of_steps
from .train_steps import Baseline, adamw, gradlr


def methods(rank: int) -> list[tuple[Baseline, bool]]:
    """What is compared, and whether on int8 weights."""
    captures = {name: gradlr(rank=rank, capture=name) for name in ("hook", "adaptor", "one_sided")}
    return [
        (Baseline("adamw", "AdamW", lambda model, lr: adamw(model, lr, foreach=True)), False),
        *((Baseline(f"bfloat16_{name}", f'gradlr, capture="{name}"', make), False) for name, make in captures.items()),
        *((Baseline(f"int8_{name}", f'gradlr, int8, capture="{name}"', make), True) for name, make in captures.items()),
    ]


def measure(*, width: int = 1024, depth: int = 50, tokens: int = 64, rank: int = 16, device: str = "cpu") -> dict[str, Any]:
    """MiB of weights and of the peak with them, over attaching and three steps, as a JSON-able report.

    Args:
        width, depth: Of a stack of Linears without bias: 100 MiB of bfloat16 at 1024 and 50.
        tokens: Rows of the input.
        rank: Of gradlr's updates.
    """
    results = []
    for baseline, is_int8 in methods(rank):
        held, peak = _measure_one(baseline, is_int8, width, depth, tokens, device)
        sizes = {"weights_mib": round(held / MIB, 1), "peak_mib": round((held + peak) / MIB, 1)}
        results.append({"name": baseline.name, "label": baseline.label, **sizes})
    workload = {"width": width, "depth": depth, "tokens": tokens, "rank": rank}
    return {"environment": environment(device), "workload": workload, "results": results}


def _measure_one(
    baseline: Baseline, is_int8: bool, width: int, depth: int, tokens: int, device: str, *, steps: int = 3
) -> tuple[int, int]:
    torch.manual_seed(0)
    form: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    baseline.make(nn.Sequential(nn.Linear(8, 8, **form)), 1e-3)  # what it imports, it imports here
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, **form) for _ in range(depth)))
    model = quantize_(model) if is_int8 else model
    x = torch.randn(tokens, width, **form)

    def loss() -> Tensor:
        return model(x).float().square().mean()

    held = sum(_bytes(weight) for weight in model.parameters())
    return held, peak_of_steps(lambda: baseline.make(model, 1e-3), loss, steps=steps, device=device)[0]


def _bytes(weight: Tensor) -> int:
    return sum(part.nbytes for part in stored_parts(weight))


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = ((row["label"], f"{row['weights_mib']:.1f}", f"{row['peak_mib']:.1f}") for row in report["results"])
    return markdown(("method", "weights, MiB", "peak with them, MiB"), rows)
