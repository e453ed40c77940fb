"""How the processes of a run find each other, and how they part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ...errors import ArgumentError, ParallelError
from ..bench.environment import require_device
from .processes import Processes, ReplicaProcesses, attempt

# Others wait in an exchange while the first process writes a checkpoint.
TIMEOUT = timedelta(minutes=30)
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(shard: str | None, device: str) -> Iterator[Processes]:
    """The processes of this run, as long as it lasts.

    Args:
        shard: "dp" where each process holds the model, "fsdp" where each holds a shard, None for one that trains alone.
        device: "cuda" or "cpu"; with several processes, each takes the GPU of its number on its machine.

    Raises:
        ArgumentError: torchrun has started several and `shard` is None, or none and it is not; there are too few GPUs.
        ParallelError: the others, or their launcher, cannot be reached.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if shard is None:
        if count.isdecimal() and int(count) > 1:
            raise ArgumentError(
                f"torchrun has started {count} processes, which would each train alone and overwrite each other: add --shard dp, "
                "or --shard fsdp where a GPU is too small for the model"
            )
        require_device(device)
        yield Processes(device)
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise ArgumentError(
            f"--shard {shard} needs several processes, and {missing[0]} is not set: start them with "
            f"torchrun --standalone --nproc-per-node GPUS -m gradlr finetune ... --shard {shard}"
        )
    own = _own_device(device)
    require_device(own)
    try:
        _find_each_other("nccl" if own.startswith("cuda") else "gloo")
        yield _kind(shard)(own)
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise ParallelError(f"the other processes, or torchrun itself, cannot be reached any more: {reason}") from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _kind(shard: str) -> type[Processes]:
    if shard == "dp":
        return ReplicaProcesses
    from .sharded import ShardProcesses  # needs parts of torch that take a while to import

    return ShardProcesses


def _find_each_other(backend: str) -> None:
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps its store when it starts processes again: what the dead have left there is not for the living.
        own = distributed.PrefixStore(f"gradlr attempt {attempt()}", store)
        distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ParallelError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error


def _own_device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ArgumentError(f"--device {device}: each process takes the GPU of its number; give --device cuda, or leave it out")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ArgumentError(f"process {number} of this machine finds {count} GPUs: give torchrun a smaller --nproc-per-node")
    torch.cuda.set_device(number)
    return f"cuda:{number}"
