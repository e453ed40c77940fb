"""Checkpoints of sharded models: a folder of torch.distributed.checkpoint, written by all processes, read by any number."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.communicator import propagate_errors
from ..engine.sync import Comm
from ..errors import CheckpointError
from ..optimizer import GradLR
from .atomic import replace_folder, write_atomically
from .dtensor import is_any_sharded, room_for_state

# What is no tensor, beside the shards: read without running code, unlike the pickles of torch.distributed.checkpoint.
_REST = "gradlr.pt"


def is_folder(path: Path) -> bool:
    """Whether there is such a checkpoint; its older version counts, where a process was killed between two renamings."""
    return path.is_dir() or (not path.exists() and _beside(path, "old").is_dir())


def write_folder(path: Path, checkpoint: dict[str, Any], comm: Comm) -> None:
    """Let each process write its shards; the folder gets its name when all have.

    Args:
        path: The folder.
        checkpoint: As `gradlr.save` writes it, sharded tensors as DTensors.
        comm: The processes that hold the model.

    Raises:
        CheckpointError, ParallelError: one has failed, or is missing; an older folder of this name is as it was.
    """
    from torch.distributed import checkpoint as dcp

    part = _beside(path, "part")
    with _on_all(comm):
        if comm.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
    weights, optimizer = checkpoint["model"], checkpoint["optimizer"]
    with _on_all(comm), _dcp_errors(path):
        names = _names_of(optimizer)
        states = {names[index]: state for index, state in optimizer["state"].items()}
        tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
        dcp.save({"model": tensors, "optimizer": states}, checkpoint_id=part, process_group=comm.group)
    with _on_all(comm):
        if comm.rank == 0:
            extra = {name: value for name, value in weights.items() if name not in tensors}
            rest = {**checkpoint, "model": extra, "optimizer": {**optimizer, "state": {}}}
            write_atomically(part / _REST, lambda file: torch.save(rest, file))
            replace_folder(path, part, _beside(path, "old"))


def read_folder(path: Path, model: nn.Module, optimizer: GradLR | None) -> dict[str, Any]:
    """The checkpoint in such a folder; of sharded tensors what belongs to this process. Collective where the model is sharded.

    Raises:
        CheckpointError: the folder is damaged, or incomplete.
    """
    path = path if path.is_dir() else _beside(path, "old")
    try:
        rest = torch.load(path / _REST, map_location="cpu", weights_only=True)
        names = _names_of(rest["optimizer"])
        wanted = _read_shards(path, model, optimizer, names)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises whatever its readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, cut off, or no folder of gradlr.save: {reason}") from error
    numbers = {name: index for index, name in enumerate(names)}
    states = {numbers[name]: entries for name, entries in wanted["optimizer"].items()}
    weights = {**wanted["model"], **rest["model"]}
    return {**rest, "model": weights, "optimizer": {**rest["optimizer"], "state": states}}


def _read_shards(path: Path, model: nn.Module, optimizer: GradLR | None, names: list[str]) -> dict[str, dict[str, Any]]:
    from torch.distributed import checkpoint as dcp

    reader = dcp.FileSystemReader(path)
    saved = {name: entry for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
    weights: dict[str, Any] = _room_for_weights(saved, model.state_dict())
    states: dict[str, Any] = {} if optimizer is None else _room_for_states(saved, optimizer, names)
    wanted = {"model": {name: room for name, room in weights.items() if not room.is_meta}, "optimizer": states}
    with _dcp_errors(path):
        if is_any_sharded(model):
            group = None if optimizer is None else optimizer.sync.comm.group
            dcp.load(wanted, storage_reader=reader, process_group=group)
        elif "no_dist" in inspect.signature(dcp.load).parameters:
            dcp.load(wanted, storage_reader=reader, no_dist=True)
        else:  # before torch 2.7
            dcp.load_state_dict(wanted, reader, no_dist=True)
    return {"model": weights, "optimizer": states}


def _room_for_weights(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Tensor]:
    """Like the model's. What the model has not, or in another shape, is not read: its mere shape lets `gradlr.load` refuse it."""
    weights = {}
    for key, entry in saved.items():
        name, like = key.removeprefix("model."), own.get(key.removeprefix("model."))
        if isinstance(like, Tensor) and key.startswith("model.") and like.shape == entry.size:
            weights[name] = torch.empty_like(like)
        elif key.startswith("model."):
            weights[name] = torch.empty(entry.size, device="meta")
    return weights


def _room_for_states(saved: dict[str, Any], optimizer: GradLR, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """As large as they were saved: the rank may be another one now, which the optimizer sees to."""
    parameters = {record.plan.name: record.plan.parameter for record in optimizer.records}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, entry in saved.items():
        name, _, part = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and name in states:
            parameter = parameters.get(name)
            known = None if parameter is None else optimizer.state[parameter].get(part)
            dtype = entry.properties.dtype if known is None else known.dtype
            states[name][part] = room_for_state(parameter, entry.size, dtype, known)
    return {name: state for name, state in states.items() if state}


def _names_of(optimizer: dict[str, Any]) -> list[str]:
    """Names of the parameters in an optimizer's state_dict, in the order of its state."""
    return [name for group in optimizer["param_groups"] for name in group["param_names"]]


@contextmanager
def _on_all(comm: Comm) -> Iterator[None]:
    """All processes do this, and go on when all have."""
    with propagate_errors(comm):
        yield
    comm.assert_same_on_all_ranks({})


@contextmanager
def _dcp_errors(path: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint raises as an error of gradlr's; what it warns of in vain is not told."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # a process may have nothing to write; one alone loads for itself
            warnings.filterwarnings("ignore", module="torch.distributed")
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            yield
    except CheckpointException as error:  # to Python it is no Exception; all processes get it
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path}: rank {rank} could not write or read its shards: {reason}") from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
