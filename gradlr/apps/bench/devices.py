"""What training in several processes costs: time of a step and bytes that travel, with DDP, FSDP2 and gradlr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError
from .environment import environment
from .processes import in_processes
from .speed import SEQUENCES, cycled, interleaved, timed_rows
from .text import batches, documentation
from .traffic import Traffic, sent_bytes
from .train_steps import TrainStep, fused_adamw, gradlr
from .transformer import ByteTransformer

_RATE = 1e-3
_KINDS = ("all-reduce", "all-gather", "reduce-scatter")
Windows = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Strategy:
    """A way to train in several processes: `prepare(model, rank r)` gives the module to call, and what steps it."""

    name: str
    label: str
    prepare: Callable[[ByteTransformer, int], tuple[nn.Module, TrainStep]]


@dataclass(frozen=True)
class Sizes:
    """Of the model, of a process' own batch in bytes of text, and the rank r of gradlr's updates."""

    width: int
    depth: int
    tokens: int
    rank: int


def _ddp(model: ByteTransformer, rank: int) -> tuple[nn.Module, TrainStep]:
    wrapped = DistributedDataParallel(model)
    return wrapped, fused_adamw(wrapped, _RATE)


def _fsdp(model: ByteTransformer, rank: int) -> tuple[nn.Module, TrainStep]:
    _shard(model)
    return model, fused_adamw(model, _RATE)


def _gradlr_in_group(model: ByteTransformer, rank: int, **options: Any) -> tuple[nn.Module, TrainStep]:
    return model, gradlr(rank=rank, apply="step", process_group=distributed.group.WORLD, **options)(model, _RATE)


def _gradlr_after_fsdp(model: ByteTransformer, rank: int, **options: Any) -> tuple[nn.Module, TrainStep]:
    _shard(model)
    return model, gradlr(rank=rank, **options)(model, _RATE)


def _shard(model: ByteTransformer) -> None:
    # Not above: a torch that was built without distributed has the other benchmarks.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


STRATEGIES = {
    way.name: way
    for way in (
        Strategy("ddp", "DDP, AdamW (fused)", _ddp),
        Strategy("group", "gradlr, process_group=", _gradlr_in_group),
        Strategy("group_adaptor", 'gradlr, process_group=, capture="adaptor"', partial(_gradlr_in_group, capture="adaptor")),
        Strategy("fsdp", "FSDP2, AdamW (fused)", _fsdp),
        Strategy("fsdp_backward", "gradlr after fully_shard", partial(_gradlr_after_fsdp, apply="backward")),
        Strategy("fsdp_step", 'gradlr after fully_shard, apply="step"', partial(_gradlr_after_fsdp, apply="step")),
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

    Every process trains a byte transformer on text of its own, the same for every way. In each round every way has its turn, in
    an order of the round's own, and begins when all processes are there; it takes as long as the slowest of them.

    Args:
        names: Of `STRATEGIES`; DDP is measured in any case.
        threads: Of torch, in each process.
        tokens: Bytes of text a step of each process, in four sequences.
        rank: r; the momentum's is the default.

    Raises:
        ArgumentError: fewer than two processes, or an unknown name.
        ParallelError: the processes do not come to their end.
    """
    _require(names, processes)
    ways = list(dict.fromkeys([REFERENCE, *names]))
    sizes = Sizes(width, depth, tokens, rank)
    texts = [_windows(sizes, process) for process in range(processes)]
    found = in_processes(partial(_work, ways, sizes, texts, rounds), processes, threads=threads)
    times = [[max(cell) for cell in zip(*rows, strict=True)] for rows in zip(*(one["times"] for one in found), strict=True)]
    rows = timed_rows([STRATEGIES[name] for name in ways], times)
    return {
        "environment": {**environment(), "threads": threads, "processes": processes, "backend": "gloo"},
        "workload": {"model": "transformer", **asdict(sizes), "rounds": rounds, "parameters": found[0]["parameters"]},
        "results": _with_traffic(rows, found[0]["traffic"], processes),
    }


def _require(names: Sequence[str], processes: int) -> None:
    if processes < 2:
        raise ArgumentError(f"--processes {processes}: nothing travels with fewer than 2")
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ArgumentError(f"no baseline {unknown[0]!r}: known are {', '.join(STRATEGIES)}")


def _windows(sizes: Sizes, process: int) -> Windows:
    shape = {"batch_size": SEQUENCES, "length": sizes.tokens // SEQUENCES}
    return list(batches(documentation().train, **shape, steps=8, seed=process))


def _work(names: Sequence[str], sizes: Sizes, texts: Sequence[Windows], rounds: int, process: int) -> dict[str, Any]:
    """In each of the processes."""
    steps = [_step_of(STRATEGIES[name], sizes, texts[process]) for name in names]
    times = interleaved(steps, rounds, "cpu", meet=distributed.barrier)
    traffic = {name: _traffic_of(step) for name, step in zip(names, steps, strict=True)}
    return {"times": times, "traffic": traffic, "parameters": sum(p.numel() for p in _model(sizes).parameters())}


def _traffic_of(step: Callable[[], None]) -> dict[str, int]:
    # Apart from the timing: counting takes time.
    with Traffic() as traffic:
        step()
    return traffic.bytes()


def _model(sizes: Sizes) -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(sizes.width, sizes.depth, max(1, sizes.width // 64), context=sizes.tokens // SEQUENCES)


def _step_of(way: Strategy, sizes: Sizes, windows: Windows) -> Callable[[], None]:
    module, train_step = way.prepare(_model(sizes), sizes.rank)
    return cycled(train_step, module, windows)


def _with_traffic(rows: list[dict[str, Any]], traffic: dict[str, dict[str, int]], processes: int) -> list[dict[str, Any]]:
    reference = sent_bytes(traffic[REFERENCE], processes)
    found = []
    for row in rows:
        moved = traffic[row["name"]]
        sent = sent_bytes(moved, processes)
        found.append({**row, "bytes": moved, "sent_bytes": sent, "sent_ratio": round(sent / reference, 3)})
    return found


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    heads = ["training", "step, ms", "to DDP's", *(f"{kind}, MB" for kind in _KINDS), "sent, MB", "to DDP's"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in report["results"]:
        moved = [f"{row['bytes'].get(kind, 0) / 1e6:.2f}" for kind in _KINDS]
        cells = [row["label"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}", *moved, f"{row['sent_bytes'] / 1e6:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['sent_ratio']:.3f}"]) + " |")
    return "\n".join(lines)
