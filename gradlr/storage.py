"""Checkpoints: model, optimizer and whatever belongs to a run in one file, written whole and loaded whole."""

from __future__ import annotations

import copy
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CheckpointError
from .files import write_atomically
from .optimizer import GradLR

_FORMAT = 1
# What torch.load(weights_only=True) builds: subclasses and named tuples are code to it.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TABLES, _SEQUENCES = (dict, OrderedDict), (list, tuple, torch.Size)


def save(path: str | PathLike[str], *, model: nn.Module, optimizer: GradLR, **more: Any) -> None:
    """Write a checkpoint that `gradlr.load` and `torch.load(path, weights_only=True)` read.

    Killed at any moment, it leaves the old file or the new one. What an earlier killed process has left beside it is removed.

    Args:
        path: The file; its folder must exist.
        model: Its `state_dict()` is saved.
        optimizer: What `gradlr.attach` returned; its state holds the tracker, the ranks and the seed.
        more: Schedulers, scalers and other objects with `state_dict()`, and plain values: numbers, strings, tensors, and lists,
            tuples and dicts of these.

    Raises:
        CheckpointError: gradients wait for `opt.step()`.
        ArgumentError: something in `more`, or in the model's extra state, is neither.
        OSError: the folder is not there, or the disk is full. The old file is as it was.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {path.absolute().parent}; make it first")
    entries = {name: _state_of(name, value) for name, value in more.items()}
    weights = model.state_dict()
    _require_plain("model", weights)
    checkpoint = {"gradlr": _FORMAT, "model": weights, "optimizer": optimizer.state_dict(), "more": entries}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: str | PathLike[str], *, model: nn.Module, optimizer: GradLR | None = None, **more: Any) -> dict[str, Any]:
    """Go on from a checkpoint of `gradlr.save`. Names and shapes are checked before anything is changed.

    Args:
        path: The file.
        model: The attached model; weights are copied into its parameters.
        optimizer: Its optimizer; rank, momentum rank and dtypes may differ from the saved ones. None for the weights alone.
        more: The objects that were saved under these names.

    Returns:
        The plain values that were saved, by name.

    Raises:
        CheckpointError: the file is missing, cut off or no checkpoint of gradlr; the model or the optimizer is another one; an
            object was not saved. It names the file and the first parameter that does not fit; nothing was changed.
    """
    path = Path(path)
    checkpoint = _read(path)
    _check_model(path, checkpoint["model"], model)
    _check_objects(path, checkpoint["more"], more)
    loads = [(value, checkpoint["more"][name]["state_dict"]) for name, value in more.items()]
    loads += [] if optimizer is None else [(optimizer, checkpoint["optimizer"])]
    loads += [(model, checkpoint["model"])]
    _load_all(path, loads)
    return {name: entry["value"] for name, entry in checkpoint["more"].items() if "value" in entry}


def _load_all(path: Path, loads: list[tuple[Any, dict[str, Any]]]) -> None:
    # The optimizer checks all before it changes anything. The model comes last: where its own code fails, the rest is as it was.
    done = []
    try:
        for thing, state in loads:
            before = None if thing is loads[-1][0] else copy.deepcopy(thing.state_dict())
            thing.load_state_dict(state)
            done.append((thing, before))
    except BaseException as error:
        for earlier, before in done:
            earlier.load_state_dict(before)
        if not isinstance(error, Exception) or isinstance(thing, nn.Module):
            raise
        raise CheckpointError(f"{path}: {error}. Nothing was changed") from error


def _state_of(name: str, value: Any) -> dict[str, Any]:
    entry = {"state_dict": value.state_dict()} if hasattr(value, "state_dict") else {"value": value}
    _require_plain(name, entry)
    return entry


def _require_plain(name: str, value: Any) -> None:
    stranger = _first_stranger(value)
    if stranger is not None:
        raise ArgumentError(
            f"save: {name!r} holds a {type(stranger).__name__}, which a file that loads without running code cannot hold: "
            "pass objects with state_dict(), or numbers, strings, tensors, and lists, tuples and dicts of these"
        )


def _first_stranger(value: Any) -> Any:
    if type(value) in _TABLES:
        parts = [*value.keys(), *value.values()]
    elif type(value) in _SEQUENCES:
        parts = list(value)
    else:
        return None if type(value) in _PLAIN or isinstance(value, Tensor) else value
    return next((found for found in map(_first_stranger, parts) if found is not None), None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cut off, or no checkpoint of gradlr.save: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"gradlr", "model", "optimizer", "more"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: no checkpoint of gradlr.save; load it with torch.load and load_state_dict")
    if checkpoint["gradlr"] != _FORMAT:
        raise CheckpointError(f"{path}: has format {checkpoint['gradlr']!r}, this gradlr reads format {_FORMAT}")
    return checkpoint


def _check_model(path: Path, saved: dict[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    for names, tale in ((own.keys() - saved.keys(), "lacks"), (saved.keys() - own.keys(), "has, unlike the model,")):
        if names:
            raise CheckpointError(f"{path}: the checkpoint {tale} {min(names)!r} ({len(names)} in all). Nothing was changed")
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)}, the model's is {tuple(value.shape)}"
            raise CheckpointError(f"{path}: {name!r} has shape {shapes}. Nothing was changed")


def _check_objects(path: Path, saved: dict[str, Any], objects: dict[str, Any]) -> None:
    for name in objects:
        if "value" in saved.get(name, {}):
            raise CheckpointError(f"{path}: {name!r} was saved as a plain value: leave it out, load returns it")
        if "state_dict" not in saved.get(name, {}):
            kept = ", ".join(sorted(saved)) or "nothing more"
            raise CheckpointError(f"{path}: no object was saved as {name!r}; there is {kept}. Nothing was changed")
