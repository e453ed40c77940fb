"""What the processes tell each other at a step whose gradients somebody else has averaged: a few numbers, in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from ..errors import ArgumentError, ParallelError
from ..slots import Slot
from .exchange import Told, checksum, header, read
from .replicas import Replicas, ranks_named


def world() -> distributed.ProcessGroup:
    """The group of all processes.

    Raises:
        ArgumentError: there is none.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError(
            'capture="ddp" leaves gradients to DistributedDataParallel, which needs a process group, be it of one process: call '
            "torch.distributed.init_process_group() first, or train one process with another capture"
        )
    return distributed.group.WORLD


def compare(
    replicas: Replicas, slots: Sequence[Slot], gradients: Sequence[Tensor], *, losses: Sequence[float], status: int
) -> Told:
    """One all-reduce of 2 + 3 · processes numbers in float64.

    Args:
        replicas: The processes.
        slots: All parameters, in the same order everywhere.
        gradients: What came of the step's backwards, which must be the same everywhere by now.
        losses: Shown here since the last step.
        status: Of this process: `FINE`, `NOT_FINITE` or `FAILED`.

    Raises:
        ParallelError: a process is missing, or weights or gradients are not the same everywhere.
    """
    replicas.meet()
    watched = slots[replicas.meetings % len(slots)]
    sums = [0.0] * replicas.size
    sums[replicas.rank] = checksum(*gradients)
    numbers = torch.tensor([*header(replicas, [], watched, losses, status), *sums], dtype=torch.float64)
    numbers = numbers.to(watched.plan.parameter.device)
    replicas.all_reduce(numbers)
    told, sums = read(numbers.tolist(), replicas.size, watched)
    different = [rank for rank, one in enumerate(sums) if one != sums[0]]
    if different and not told.failed:
        raise ParallelError(
            f"{ranks_named(different)} brought other gradients to step number {replicas.meetings} than rank 0: nobody has "
            "averaged them. Wrap the model after attaching (ddp = DistributedDataParallel(model)), call ddp, not the model, and "
            "leave no_sync() for the last backward before opt.step()"
        )
    return told
