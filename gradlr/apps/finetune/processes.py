"""The processes of a run: one alone, or those that torchrun has started, which train replicas or shards of one model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ...attach import attach
from ...checkpoint.file import load, save
from ...distributed import Communicator, propagate_errors
from ...optimizer import GradLR
from ...tracker import LossTracker
from .folder import RunFolder


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

    def all_true(self, signals: list[int]) -> int | None:
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
        self._replicas = Communicator(distributed.group.WORLD)
        self.size, self.rank = self._replicas.size, self._replicas.rank
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.is_restarted = attempt() != "0"

    def by_first(self, work: Callable[[], Any]) -> None:
        with propagate_errors(self._replicas):
            if self.is_first:
                work()
        self._replicas.assert_same_on_all_ranks({})

    def require_same(self, told: dict[str, Any]) -> None:
        self._replicas.assert_same_on_all_ranks({name: str(value) for name, value in told.items()})

    def all_true(self, signals: list[int]) -> int | None:
        self._replicas.begin_collective()
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
        return {**options, "process_group": distributed.group.WORLD}


def attempt() -> str:
    """How often torchrun has started the processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is brought together at a time: the blocks that transformers names, else the members of the longest list; inner ones
    first."""
    names = getattr(model, "_no_split_modules", None) or ()
    if blocks := [module for module in model.modules() if type(module).__name__ in names]:
        return blocks[::-1]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1]
    return list(max(lists, key=len, default=()))
