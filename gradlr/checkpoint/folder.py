"""Checkpoints of sharded models: a folder of torch.distributed.checkpoint, written by all processes, read by any number."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..distributed import Communicator, propagate_errors
from ..errors import CheckpointError
from ..optimizer import GradLR
from ..params.kinds import is_sharded
from .atomic import write_atomically

# What is no tensor, beside the shards: read without running code, unlike the pickles of torch.distributed.checkpoint.
_REST = "gradlr.pt"


def is_any_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is spread over processes."""
    return any(map(is_sharded, model.parameters()))


def is_folder(path: Path) -> bool:
    """Whether there is such a checkpoint; its older version counts, where a process was killed between two renamings."""
    return path.is_dir() or (not path.exists() and _beside(path, "old").is_dir())


def write_folder(path: Path, checkpoint: dict[str, Any], comm: Communicator) -> None:
    """Let each process write its shards; the folder gets its name when all have.

    Args:
        path: The folder.
        checkpoint: As `gradlr.save` writes it, sharded tensors as DTensors.
        comm: The processes that hold the model.

    Raises:
        ParallelError: one has failed, or is missing; an older folder of this name is as it was.
    """
    from torch.distributed import checkpoint as dcp

    part = _beside(path, "part")
    with _all(comm):
        if comm.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
    with _all(comm), _quiet(), _as_error(path):
        dcp.save(_tensors(checkpoint), checkpoint_id=part, process_group=comm.group)
    with _all(comm):
        if comm.rank == 0:
            rest = {**checkpoint, "model": _rest(checkpoint["model"]), "optimizer": {**checkpoint["optimizer"], "state": {}}}
            write_atomically(part / _REST, lambda file: torch.save(rest, file))
            _swap(part, path)


def read_folder(path: Path, model: nn.Module, optimizer: GradLR | None) -> dict[str, Any]:
    """The checkpoint in such a folder; of sharded tensors what belongs to this process. Collective where the model is sharded.

    Raises:
        CheckpointError: the folder is damaged, or incomplete; or the model has other names or shapes.
    """
    from torch.distributed import checkpoint as dcp

    path = path if path.is_dir() else _beside(path, "old")
    try:
        rest = torch.load(path / _REST, map_location="cpu", weights_only=True)
        reader = dcp.FileSystemReader(path)
        saved = {name: entry for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
        wanted = _wanted(path, saved, model, optimizer, names_of(rest["optimizer"]))
        with _quiet(), _as_error(path):
            if is_any_sharded(model):
                dcp.load(wanted, storage_reader=reader, process_group=_group(optimizer))
            else:
                _load_alone(wanted, reader)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises whatever its readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, cut off, or no folder of gradlr.save: {reason}") from error
    numbers = {name: index for index, name in enumerate(names_of(rest["optimizer"]))}
    states = {numbers[name]: entries for name, entries in wanted["optimizer"].items()}
    weights = {name: rest["model"].get(name, wanted["model"].get(name)) for name in (*wanted["model"], *rest["model"])}
    return {**rest, "model": weights, "optimizer": {**rest["optimizer"], "state": states}}


def names_of(state_dict: dict[str, Any]) -> list[str]:
    """Names of the parameters of an optimizer's `state_dict`, in their order."""
    return [name for group in state_dict["param_groups"] for name in group["param_names"]]


def as_held(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights as the model holds them: of whole tensors its shards."""
    own = model.state_dict()
    return {name: _sharded(value, own[name]) for name, value in weights.items()}


def _sharded(value: Any, like: Any) -> Any:
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value.to(like.device), like.device_mesh, run_check=False).redistribute(placements=like.placements)


def _tensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    names, states = names_of(checkpoint["optimizer"]), checkpoint["optimizer"]["state"]
    weights = {name: value for name, value in checkpoint["model"].items() if isinstance(value, Tensor)}
    return {"model": weights, "optimizer": {names[index]: state for index, state in states.items()}}


def _rest(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if not isinstance(value, Tensor)}


def _load_alone(wanted: dict[str, Any], reader: Any) -> None:
    from torch.distributed import checkpoint as dcp

    if "no_dist" in inspect.signature(dcp.load).parameters:
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    else:  # before torch 2.7
        dcp.load_state_dict(wanted, reader, no_dist=True)


def _wanted(path: Path, saved: dict[str, Any], model: nn.Module, optimizer: GradLR | None, names: list[str]) -> dict[str, Any]:
    """Room for what is to be read: weights like the model's, states as large as they were saved."""
    weights = {name: torch.empty_like(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in weights.items():
        entry = saved.get(f"model.{name}")
        if entry is None or entry.size != value.shape:
            found = "lacks it" if entry is None else f"has it with shape {tuple(entry.size)}"
            raise CheckpointError(f"{path}: {name!r} {tuple(value.shape)}: the checkpoint {found}. Nothing was changed")
    states: dict[str, dict[str, Tensor]] = {}
    if optimizer is None:
        return {"model": weights, "optimizer": states}
    own = {record.plan.name: optimizer.state[record.plan.parameter] for record in optimizer.records}
    like = {record.plan.name: record.plan.parameter for record in optimizer.records}
    for key, tensor in saved.items():
        if not key.startswith("optimizer."):
            continue
        name, entry = key.removeprefix("optimizer.").rsplit(".", 1)
        known = own.get(name, {}).get(entry)
        dtype = tensor.properties.dtype if known is None else known.dtype
        is_like = name in like and is_sharded(like[name]) and tensor.size == like[name].shape
        if is_like and known is not None and known.shape == like[name].to_local().shape:
            room = torch.empty_like(like[name].detach(), dtype=dtype)
        else:
            room = torch.empty(tensor.size, dtype=dtype)
        states.setdefault(name, {})[entry] = room
    return {"model": weights, "optimizer": {name: states[name] for name in names if name in states}}


def _group(optimizer: GradLR | None) -> distributed.ProcessGroup | None:
    return None if optimizer is None or optimizer.comm is None else optimizer.comm.group


@contextmanager
def _all(comm: Communicator) -> Iterator[None]:
    """All processes do this, and go on when all have."""
    with propagate_errors(comm):
        yield
    comm.assert_same_on_all_ranks({})


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # a process may have nothing to write; one alone loads for itself
        warnings.filterwarnings("ignore", module="torch.distributed")
        warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
        yield


@contextmanager
def _as_error(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # to Python it is no Exception; all processes get it
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path}: rank {rank} could not write or read its shards: {reason}") from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _swap(part: Path, path: Path) -> None:
    """Give a whole folder its name. Killed in between, the old one is still beside it."""
    old = _beside(path, "old")
    if path.is_dir():  # otherwise the one beside is all there is
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(part, path)
    shutil.rmtree(old, ignore_errors=True)
