"""What training in several processes costs: time of a step and bytes that travel, with DDP, FSDP2 and gradlr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError
from ..blocks import shard_by_block
from ..collectives import Traffic, sent_bytes
from .environment import environment, markdown
from .spawn import in_processes
from .speed import Windows, byte_transformer, cycled, interleaved, text_windows, timed_rows
from .train_steps import TrainStep, fused_adamw, gradlr

_RATE = 1e-3
_KINDS = ("all-reduce", "all-gather", "reduce-scatter")


@dataclass(frozen=True)
class Strategy:
    """A way to train in several processes: `prepare(model, rank r)` gives the module to call, and what steps it."""

    name: str
    label: str
    prepare: Callable[[nn.Module, int], tuple[nn.Module, TrainStep]]


def _ddp(model: nn.Module, rank: int) -> tuple[nn.Module, TrainStep]:
    wrapped = DistributedDataParallel(model)
    return wrapped, fused_adamw(wrapped, _RATE)


def _group(model: nn.Module, rank: int, **options: Any) -> tuple[nn.Module, TrainStep]:
    return model, gradlr(rank=rank, apply="step", in_group=True, **options)(model, _RATE)


def _fsdp(model: nn.Module, rank: int, **options: Any) -> tuple[nn.Module, TrainStep]:
    # Not above: a torch that was built without distributed has the other benchmarks.
    from torch.distributed.device_mesh import init_device_mesh

    shard_by_block(model, init_device_mesh("cpu", (distributed.get_world_size(),)))
    make = gradlr(rank=rank, **options) if options else fused_adamw
    return model, make(model, _RATE)


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("ddp", "DDP, AdamW (fused)", _ddp),
        Strategy("group", "gradlr, process_group=", _group),
        Strategy("group_adaptor", 'gradlr, process_group=, capture="adaptor"', partial(_group, capture="adaptor")),
        Strategy("fsdp", "FSDP2, AdamW (fused)", _fsdp),
        Strategy("fsdp_backward", "gradlr after fully_shard", partial(_fsdp, apply="backward")),
        Strategy("fsdp_step", 'gradlr after fully_shard, apply="step"', partial(_fsdp, apply="step")),
    )
}
REFERENCE = "ddp"
DEFAULT = tuple(STRATEGIES)


def measure(
    *,
    names: Sequence[str] = DEFAULT,
    processes: int = 2,
    threads: int = 1,
    width: int = 512,
    depth: int = 4,
    tokens: int = 1024,
    rank: int = 32,
    rounds: int = 20,
) -> dict[str, Any]:
    """Median milliseconds of one training step, its ratio to DDP's, and the bytes that one step moves.

    Every process trains a byte transformer on text of its own, the same for every strategy. In each round every strategy has its
    turn, in an order of the round's own, and begins when all processes are there; it takes as long as the slowest of them.

    Args:
        names: Of `STRATEGIES`; DDP is measured in any case.
        processes, threads: How many, and threads of torch in each.
        width, depth: Of the transformer.
        tokens: Bytes of text a step of each process, in four sequences.
        rank: r; the momentum's is the default.
        rounds: Of the timing.

    Raises:
        ArgumentError: fewer than two processes, or an unknown name.
        ParallelError: the processes do not come to their end.
    """
    if processes < 2:
        raise ArgumentError(f"--processes {processes}: nothing travels with fewer than 2")
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ArgumentError(f"no baseline {unknown[0]!r}: known are {', '.join(STRATEGIES)}")
    chosen = list(dict.fromkeys([REFERENCE, *names]))
    sizes = {"width": width, "depth": depth, "tokens": tokens}
    texts = [text_windows(tokens, seed=process) for process in range(processes)]  # parsed once, not in each of them
    found = in_processes(partial(_work, chosen, sizes, rank, rounds, texts), processes, threads=threads)
    # A strategy's turn takes as long as the slowest process; all go through the rounds together.
    times = [[max(cell) for cell in zip(*rows, strict=True)] for rows in zip(*(one["times"] for one in found), strict=True)]
    rows = timed_rows([STRATEGIES[name] for name in chosen], times)
    traffic = found[0]["traffic"]
    reference = sent_bytes(traffic[REFERENCE], processes)
    for row in rows:
        sent = sent_bytes(traffic[row["name"]], processes)
        row |= {"bytes": traffic[row["name"]], "sent_bytes": sent, "sent_ratio": round(sent / reference, 3)}
    parameters = sum(p.numel() for p in byte_transformer(**sizes).parameters())
    return {
        "environment": {**environment(), "threads": threads, "processes": processes, "backend": "gloo"},
        "workload": {"model": "transformer", **sizes, "rank": rank, "rounds": rounds, "parameters": parameters},
        "results": rows,
    }


def _work(
    names: Sequence[str], sizes: dict[str, int], rank: int, rounds: int, texts: Sequence[Windows], process: int
) -> dict[str, Any]:
    """In each of the processes."""
    steps = {}
    for name in names:
        module, train_step = STRATEGIES[name].prepare(byte_transformer(**sizes), rank)
        steps[name] = cycled(train_step, module, texts[process])
    times, traffic = interleaved(list(steps.values()), rounds, "cpu", meet=distributed.barrier), {}
    for name, step in steps.items():
        # Apart from the timing: counting takes time.
        with Traffic() as counted:
            step()
        traffic[name] = counted.bytes()
    return {"times": times, "traffic": traffic}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = []
    for row in report["results"]:
        moved = (row["bytes"].get(kind, 0) for kind in _KINDS)
        sizes = (f"{count / 1e6:.2f}" for count in (*moved, row["sent_bytes"]))
        rows.append((row["label"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}", *sizes, f"{row['sent_ratio']:.3f}"))
    heads = ("training", "step, ms", "to DDP's", *(f"{kind}, MB" for kind in _KINDS), "sent, MB", "to DDP's")
    return markdown(heads, rows)
