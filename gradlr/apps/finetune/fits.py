"""Whether a run fits: what it needs, counted before any weight is loaded, and what there is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ArgumentError
from ...report.summary import format_bytes
from ..blocks import blocks_of
from ..estimate import Estimate, estimate
from .model import BuiltinModel
from .packing import cross_entropy

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

_MOST_TOKENS = 2**40  # beyond, torch cannot even count the bytes of the logits


@dataclass(frozen=True)
class RequiredMemory:
    """Bytes that a run takes on one device.

    Attributes:
        weights: The parameters and buffers.
        state: The optimizer's state; None where it, and what a step takes, could not be counted.
        total: At the worst moment, all included; where that could not be counted, the weights alone.
    """

    weights: int
    state: int | None
    total: int

    def __str__(self) -> str:
        if self.state is None:
            return f"{format_bytes(self.weights)} of weights, and for state and activations what could not be counted"
        rest = self.total - self.weights - self.state
        parts = f"{format_bytes(self.weights)} weights, {format_bytes(self.state)} state, {format_bytes(rest)} for a step"
        return f"{format_bytes(self.total)}: {parts}"


def required_memory(
    language: BuiltinModel | PretrainedModel,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    is_checkpointed: bool,
    options: Mapping[str, Any],
    is_exchanging: bool = False,
    shards: int = 1,
) -> RequiredMemory:
    """What a run needs on one device, by `gradlr.estimate`: one step with tensors that have shapes and no values.

    Args:
        language: The model, as `find_model` returns it.
        batch_size, length: Of one micro-batch, in sequences and tokens.
        dtype: Of the weights.
        is_checkpointed: Whether layers keep their input alone.
        options: What `gradlr.attach` will be called with.
        is_exchanging: Whether processes with a replica of the model each exchange their gradients' sketches.
        shards: Number of devices that share weights and state, and bring a block at a time together.
    """
    if batch_size * length > _MOST_TOKENS:
        raise ArgumentError(f"--batch-size {batch_size} of {length} tokens each: no memory holds {batch_size * length:,} tokens")
    with torch.device("meta"):
        model = language.skeleton(dtype)
        inputs = torch.empty(batch_size, length, dtype=torch.int64)
    try:
        found = estimate(
            model, inputs=(inputs,), checkpointing=is_checkpointed, **options,
            loss=lambda net, tokens: cross_entropy(language.logits(net, tokens), tokens),
        )  # fmt: skip
    except ArgumentError:
        raise
    except Exception:  # models may do with values what cannot be done without
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) // shards
        return RequiredMemory(weights, None, weights)
    if shards == 1:
        return RequiredMemory(
            found.weights, found.state, max(found.peak, _bytes_in_exchange(found, model, dtype) if is_exchanging else 0)
        )
    weights, state, rest = found.weights // shards, found.state // shards, found.peak - found.weights - found.state
    return RequiredMemory(weights, state, weights + state + rest + _bytes_together(model))


def _bytes_together(model: nn.Module) -> int:
    # Embeddings and head stay together through a step; one block is at work, the next one on its way; the gradients of one of
    # these groups are whole, and once more in the buffer that hands them out.
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks_of(model)]
    root, block = sum(parameter.nbytes for parameter in model.parameters()) - sum(blocks), max(blocks, default=0)
    return root + 2 * block + 2 * max(root, block)


def _bytes_in_exchange(found: Estimate, model: nn.Module, dtype: torch.dtype) -> int:
    # What waits is copied into one buffer of float32, and never takes more entries there; a table's touched rows are gathered.
    buffer = found.gradients * max(torch.float32.itemsize // dtype.itemsize, 1)
    return found.weights + found.state + found.gradients + buffer + max(parameter.nbytes for parameter in model.parameters())


def available_bytes(device: str) -> int | None:
    """Bytes that can still be taken: free memory of the GPU, or of the machine and of its control groups; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = [room for room in (_machine_room(), *_group_rooms()) if room is not None]
    return min(found, default=None)


def _machine_room() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _group_rooms() -> list[int | None]:
    root, own, old = Path("/sys/fs/cgroup"), Path(), Path("/sys/fs/cgroup/memory")
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    folders = [root / part for part in (own, *own.parents)]
    rooms = [_room(folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in folders]
    return [*rooms, _room(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat")]


def _room(limit: Path, usage: Path, statistics: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        # Pages of files that nobody uses go when memory is asked for.
        entries = dict(line.split() for line in statistics.read_text().splitlines())
        spare = int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
        return max(int(limit.read_text()) - int(usage.read_text()) + spare, 0)
    return None


def require_fit(need: RequiredMemory, room: int | None, where: str, advice: list[str]) -> None:
    """Raise an ArgumentError, with the numbers, where a run needs more than there is.

    Args:
        need: Of the run.
        room: Bytes there are; None if unknown.
        where: Says what has them.
        advice: What would need less.
    """
    if room is not None and need.total > room:
        raise ArgumentError(f"the run needs about {need}; {where} {format_bytes(room)}. To need less: {', '.join(advice)}")


def peak_memory(device: str) -> int | None:
    """Most bytes held so far: allocated on the GPU, or resident in the process; None if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(torch.device(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
