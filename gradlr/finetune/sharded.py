"""Processes that hold a shard of every parameter each (`--shard fsdp`): FSDP2, and checkpoints of shards in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..errors import CheckpointError
from ..files import write_atomically
from ..optimizer import GradLR
from .folder import RunFolder
from .processes import ReplicaProcesses, blocks_of

# Beside the shards: what every process has alike.
_COMMON = "common.pt"


class ShardProcesses(ReplicaProcesses):
    """Processes of torchrun that hold a shard of every parameter and of its state; a block comes together while it works."""

    def placed(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def attach_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def checkpoint(self, folder: RunFolder) -> Path | None:
        """The folder of the last step that was saved whole."""
        found = [path for path in folder.shards.glob("*") if path.name.isdecimal()]
        return max(found, key=lambda path: int(path.name), default=None)

    def save(self, folder: RunFolder, *, model: nn.Module, optimizer: GradLR, scheduler: Any, done: dict[str, Any]) -> None:
        """Write the shards into a new folder, give it the step's name, and let older ones go."""
        whole = folder.shards / str(done["step"])
        part = whole.with_suffix(".part")
        self.by_first(partial(_make_empty, part))
        state = optimizer.state_dict()
        # Comes back on the first process when all have written their shards, to the disk.
        with _told(part):
            checkpoint.save(_shards(model, state), checkpoint_id=part)
        common = {"optimizer": {**state, "state": {}}, "scheduler": scheduler.state_dict(), "done": done}

        def finish() -> None:
            write_atomically(part / _COMMON, partial(torch.save, common))
            os.replace(part, whole)
            _remove_others(whole)

        self.by_first(finish)

    def load(self, path: Path, *, model: nn.Module, optimizer: GradLR, scheduler: Any) -> dict[str, Any]:
        """Read this process' shards, whatever number of processes has written them."""
        common = torch.load(path / _COMMON, map_location="cpu", weights_only=True)
        shards = _shards(model, optimizer.state_dict())
        with _told(path):
            checkpoint.load(shards, checkpoint_id=path)
        model.load_state_dict(shards["model"])
        state = {int(index): entries for index, entries in shards["state"].items()}
        optimizer.load_state_dict({**common["optimizer"], "state": state})
        scheduler.load_state_dict(common["scheduler"])
        return {"done": common["done"]}

    def whole(self, model: nn.Module, skeleton: Callable[[], nn.Module]) -> nn.Module | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)  # all of them on the first process, none elsewhere
        if not self.is_first:
            return None
        gathered = skeleton()
        gathered.load_state_dict(weights)
        if hasattr(model, "generation_config"):  # of the model's folder, which the skeleton has not seen
            gathered.generation_config = model.generation_config
        return gathered


def _shards(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    # Names are strings there.
    return {"model": model.state_dict(), "state": {str(index): dict(entries) for index, entries in state["state"].items()}}


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # no Exception to Python
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path}: rank {rank} could not write or read its shards: {reason}") from error


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove_others(kept: Path) -> None:
    for path in kept.parent.iterdir():
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
