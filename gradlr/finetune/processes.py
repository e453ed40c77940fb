"""The processes of a run: one alone, or those that torchrun has started, which train replicas or shards of one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from ..attach import attach
from ..bench.environment import require_device
from ..errors import ArgumentError, ParallelError
from ..optimizer import GradLR
from ..parallel import Replicas, together
from ..storage import load, save
from ..tracker import LossTracker
from .folder import RunFolder

# Others wait in an exchange while the first process writes a checkpoint.
_TIMEOUT = timedelta(minutes=30)
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """One process that trains alone; what several do otherwise, their classes say.

    Args:
        device: Of this process.

    Attributes:
        size: Number of processes.
        rank: Of this one.
        neighbours: Number of processes on this machine.
        is_restarted: Whether torchrun has started this process in the place of one that failed.
    """

    size, rank, neighbours, is_restarted = 1, 0, 1, False

    def __init__(self, device: str) -> None:
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a text once."""
        if self.is_first:
            print(text, flush=True)

    def by_first(self, work: Callable[[], Any]) -> None:
        """Let the first process do something that the others wait for; where it fails, all end."""
        work()

    def require_same(self, told: dict[str, Any]) -> None:
        """Raise a ParallelError where the processes tell different things."""

    def agreed(self, signals: list[int]) -> int | None:
        """The signal that ends the run for all at this step; None where nobody has heard one."""
        return signals[0] if signals else None

    def total(self, numbers: Tensor) -> Tensor:
        """Sums over all processes."""
        return numbers

    def weights(self, share: float, accumulate: int) -> tuple[float, float]:
        """By what to multiply the mean loss of a micro-batch before it is shown, and before backward.

        Args:
            share: Of the step's tokens, of all processes, that the micro-batch learns.
            accumulate: Micro-batches a step.
        """
        return 1.0, 1.0 if accumulate == 1 else share

    def placed(self, model: nn.Module) -> nn.Module:
        """The model where it will be trained."""
        return model.to(self.device)

    def attach(self, model: nn.Module, options: dict[str, Any]) -> GradLR:
        """What `gradlr.attach` makes of it."""
        return attach(model, LossTracker(), **self.attach_options(options))

    def attach_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options for `gradlr.attach`, and those that several processes need."""
        return options

    def checkpoint(self, folder: RunFolder) -> Path | None:
        """The last whole checkpoint."""
        return folder.checkpoint if folder.checkpoint.is_file() else None

    def save(self, folder: RunFolder, **objects: Any) -> None:
        """Write a checkpoint, whole or not at all; as `gradlr.save`."""
        if self.is_first:
            save(folder.checkpoint, **objects)

    def load(self, path: Path, **objects: Any) -> dict[str, Any]:
        """Go on from a checkpoint; as `gradlr.load`."""
        return load(path, **objects)

    def whole(self, model: nn.Module, skeleton: Callable[[], nn.Module]) -> nn.Module | None:
        """The model with all its weights, on the first process; None on the others."""
        return model if self.is_first else None


class ReplicaProcesses(Processes):
    """Processes of torchrun that hold the whole model each (`--shard dp`)."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._replicas = Replicas(distributed.group.WORLD)
        self.size, self.rank = self._replicas.size, self._replicas.rank
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.is_restarted = _attempt() != "0"

    def by_first(self, work: Callable[[], Any]) -> None:
        with together(self._replicas):
            if self.is_first:
                work()
        self._replicas.agree({})

    def require_same(self, told: dict[str, Any]) -> None:
        self._replicas.agree({name: str(value) for name, value in told.items()})

    def agreed(self, signals: list[int]) -> int | None:
        self._replicas.meet()
        heard = torch.tensor(max(signals, default=0), device=self.device)
        self._replicas.all_reduce(heard, distributed.ReduceOp.MAX)
        return int(heard) or None

    def total(self, numbers: Tensor) -> Tensor:
        sums = numbers.detach().to(self.device, torch.float64, copy=True)
        self._replicas.all_reduce(sums)
        return sums

    def weights(self, share: float, accumulate: int) -> tuple[float, float]:
        # The mean over processes and micro-batches of what is shown is the step's loss, and so are the gradients.
        return share * self.size * accumulate, 1 / accumulate

    def attach_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "apply": "step", "process_group": distributed.group.WORLD}


@contextmanager
def joined(shard: str | None, device: str) -> Iterator[Processes]:
    """The processes of this run, as long as it lasts.

    Args:
        shard: "dp" where each process holds the model, None for one that trains alone.
        device: "cuda" or "cpu"; with several processes, each takes the GPU of its number on its machine.

    Raises:
        ArgumentError: torchrun has started several and `shard` is None, or none and it is not; there are too few GPUs.
        ParallelError: the others, or their launcher, cannot be reached.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if shard is None:
        if count.isdecimal() and int(count) > 1:
            raise ArgumentError(
                f"torchrun has started {count} processes, which would each train alone and overwrite each other: add --shard dp"
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
        yield ReplicaProcesses(own)
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise ParallelError(f"the other processes, or torchrun itself, cannot be reached any more: {reason}") from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _find_each_other(backend: str) -> None:
    try:
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
        # torchrun keeps its store when it starts processes again: what the dead have left there is not for the living.
        own = distributed.PrefixStore(f"gradlr attempt {_attempt()}", store)
        distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise ParallelError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


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
