"""Peak memory above the parameters, counted from the allocator's own events."""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ... import rules
from .environment import environment, markdown
from .peers import PEERS
from .train_steps import Baseline, TrainStep, adamw, forward_backward, fused_adamw, gradlr

MIB = 2**20
# The profiler's library prints its own start and stop to stderr; errors still come as exceptions.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Largest number of bytes that `work` holds at any moment beyond what was held before it.

    On the CPU from the profiler's memory events, one per allocation and release; on CUDA from the allocator's statistics.
    """
    gc.collect()  # what was garbage before, and is freed meanwhile, would count as given back by the work
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def peak_of_steps(
    make: Callable[[], TrainStep], loss: Callable[[], Tensor], *, steps: int, device: torch.device | str = "cpu"
) -> tuple[int, TrainStep]:
    """(peak bytes above what is held already, over making a TrainStep and its first `steps` steps; the TrainStep)."""
    made: list[TrainStep] = []

    def work() -> TrainStep:
        made.append(make())
        for _ in range(steps):
            made[0].step(loss)
        return made[0]

    return peak_bytes(work, device), made[0]


def methods(rank: int, peers: Sequence[str] = ()) -> list[Baseline]:
    """What is compared, gradlr's at the given rank; the named peers at a quarter of full rank, LoRA at 32."""
    bare = rules.LowRankPolar(residual=0)
    return [
        Baseline("adamw_foreach", "AdamW (foreach)", lambda model, lr: adamw(model, lr, foreach=True)),
        Baseline("adamw_fused", "AdamW (fused)", fused_adamw),
        Baseline("no_optimizer", "forward + backward, no optimizer", forward_backward),
        *(PEERS[name] for name in peers),
        Baseline("adamw_in_backward", "AdamW inside backward", gradlr(rule="adam")),
        Baseline("backward", 'gradlr, apply="backward"', gradlr(rank=rank)),
        Baseline("backward_no_residual", 'gradlr, apply="backward", no residual', gradlr(rank=rank, rule=bare)),
        Baseline("step", 'gradlr, apply="step"', gradlr(rank=rank, apply="step")),
        *adaptors(rank),
        Baseline("one_sided_step", 'gradlr, capture="one_sided", apply="step"',
                 gradlr(rank=rank, capture="one_sided", apply="step")),
    ]  # fmt: skip


def adaptors(rank: int) -> list[Baseline]:
    """gradlr without a weight gradient."""
    return [
        Baseline("adaptor", 'gradlr, capture="adaptor"', gradlr(rank=rank, capture="adaptor")),
        Baseline("adaptor_step", 'gradlr, capture="adaptor", apply="step"', gradlr(rank=rank, capture="adaptor", apply="step")),
        Baseline("one_sided", 'gradlr, capture="one_sided"', gradlr(rank=rank, capture="one_sided")),
    ]


def training_peak(baseline: Baseline, width: int, depth: int, tokens: int, device: str, steps: int = 3) -> tuple[int, int]:
    """(peak bytes above the parameters over `steps` steps, attach and state included; bytes of state).

    Args:
        width, depth: Of a stack of Linears without bias: 100 MiB of float32 at 1024 and 25.
        tokens: Rows of the input.
    """
    baseline.make(nn.Sequential(nn.Linear(8, 8)), 1e-3)  # what it imports, it imports here: the profiler loses count over that
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(depth)))
    x = torch.randn(tokens, width, device=device)
    make, loss = (lambda: baseline.make(model, 1e-3)), (lambda: model(x).square().mean())
    peak, train_step = peak_of_steps(make, loss, steps=steps, device=device)
    return peak, train_step.state_bytes()


def measure(
    *, width: int = 1024, depth: int = 25, tokens: int = 64, rank: int = 16, device: str = "cpu", peers: Sequence[str] = ()
) -> dict[str, Any]:
    """Peak MiB above the parameters for every method, as a JSON-able report."""
    results = []
    for baseline in methods(rank, peers):
        peak, state = training_peak(baseline, width, depth, tokens, device)
        sizes = {"peak_mib": round(peak / MIB, 2), "state_mib": round(state / MIB, 2)}
        results.append({"name": baseline.name, "label": baseline.label, **sizes})
    workload = {"width": width, "depth": depth, "tokens": tokens, "rank": rank, "parameters_mib": 4 * width**2 * depth / MIB}
    return {"environment": environment(device), "workload": workload, "results": results}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = ((row["label"], f"{row['peak_mib']:.1f}", f"{row['state_mib']:.1f}") for row in report["results"])
    return markdown(("method", "peak above the parameters, MiB", "of it state, MiB"), rows)
