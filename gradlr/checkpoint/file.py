"""Checkpoints: model, optimizer and whatever belongs to a run in one file, written whole and loaded whole."""

from __future__ import annotations

import copy
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..distributed.communicator import propagate_errors
from ..engine.sync import Comm, OneProcess
from ..errors import ArgumentError, CheckpointError, ParallelError, warn
from ..optimizer import GradLR
from .atomic import write_atomically
from .dtensor import as_held, is_any_sharded
from .folder import is_folder, read_folder, write_folder

_FORMAT = 1
# What torch.load(weights_only=True) builds: subclasses and named tuples are code to it.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DICTS, _SEQUENCES = (dict, OrderedDict), (list, tuple, torch.Size)


def save(path: str | PathLike[str], *, model: nn.Module, optimizer: GradLR, **more: Any) -> None:
    """Write a checkpoint that `gradlr.load` and `torch.load(path, weights_only=True)` read.

    Killed at any moment, it leaves the old file or the new one. What an earlier killed process has left beside it is removed.

    Where the model is sharded, all processes call it, and it writes a folder with the shards of each, which `gradlr.load` reads
    with any number of processes, on a disk that all of them see.

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
        ParallelError: of a sharded model, another process could not write its part. The old folder is as it was.
    """
    path, comm = Path(path).absolute(), optimizer.sync.comm
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {path.parent}; make it first")
    entries = {name: _entry(name, value) for name, value in more.items()}
    weights = model.state_dict()
    _require_plain("model", weights)
    checkpoint = {"gradlr": _FORMAT, "model": weights, "optimizer": optimizer.state_dict(), "more": entries}
    if is_any_sharded(model):
        write_folder(path, checkpoint, comm)
    else:
        write_atomically(path, partial(_write, checkpoint))


def load(path: str | PathLike[str], *, model: nn.Module, optimizer: GradLR | None = None, **more: Any) -> dict[str, Any]:
    """Go on from a checkpoint of `gradlr.save`. Names and shapes are checked before anything is changed.

    Args:
        path: The file, or the folder. What one process has saved many may load, and the other way round.
        model: The attached model; weights are copied into its parameters.
        optimizer: Its optimizer; rank, momentum rank and dtypes may differ from the saved ones. None for the weights alone.
        more: The objects that were saved under these names; None for one that is meant to start afresh.

    Returns:
        The plain values that were saved, by name.

    Raises:
        CheckpointError: the file is missing, damaged (a single bit is found, but not in the shards of a folder) or no checkpoint
            of gradlr; the model or the optimizer is another one; an object was not saved, or is of another class. It names the
            file and the first parameter that does not fit; nothing was changed.
        ParallelError: other processes have found or loaded another one, or could not load it; the optimizer is as it was.

    Warns:
        GradlrWarning: an object was saved, such as a scheduler, and is not among `more`, though the optimizer is loaded.
    """
    path = Path(path).absolute()
    comm: Comm = OneProcess() if optimizer is None else optimizer.sync.comm
    is_in_folder = is_folder(path)
    what = "a folder" if is_in_folder else "a file" if path.is_file() else "nothing"
    comm.assert_same_on_all_ranks({f"what is at {path}": what})
    given = {name: value for name, value in more.items() if value is not None}
    with propagate_errors(comm):
        checkpoint = read_folder(path, model, optimizer) if is_in_folder else _read(path)
        found = checkpoint.get("gradlr")
        if type(found) is not int or found != _FORMAT:  # a damaged file may hold anything
            raise CheckpointError(f"{path}: has format {found!r}, this gradlr reads format {_FORMAT}")
        _check_model(path, checkpoint["model"], model)
        _check_objects(path, checkpoint["more"], given)
    comm.assert_same_on_all_ranks({})
    if optimizer is not None:
        _warn_of_forgotten(path, checkpoint["more"], more)
    # The optimizer checks all before it changes anything. The model comes last: where its own code fails, the rest is put back.
    loads = [(value, checkpoint["more"][name]["state_dict"]) for name, value in given.items()]
    loads += [] if optimizer is None else [(optimizer, checkpoint["optimizer"])]
    _load_all(path, [*loads, (model, as_held(model, checkpoint["model"]))])
    return {name: entry["value"] for name, entry in checkpoint["more"].items() if "value" in entry}


def _load_all(path: Path, loads: list[tuple[Any, dict[str, Any]]]) -> None:
    done: list[tuple[Any, dict[str, Any]]] = []
    for thing, state in loads:
        is_model = isinstance(thing, nn.Module)
        try:
            before = {} if is_model else copy.deepcopy(thing.state_dict())
            thing.load_state_dict(state)
        except BaseException as error:
            for earlier, its_state in done:
                earlier.load_state_dict(its_state)
            if is_model or isinstance(error, ParallelError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(f"{path}: {error}. Nothing was changed") from error
        done.append((thing, before))


def _entry(name: str, value: Any) -> dict[str, Any]:
    is_object = hasattr(value, "state_dict")
    entry = {"state_dict": value.state_dict(), "class": _class_name(value)} if is_object else {"value": value}
    _require_plain(name, entry)
    return entry


def _class_name(value: Any) -> str:
    # Capturing a layer changes its class.
    return getattr(type(value), "_gradlr_original", type(value)).__name__


def _require_plain(name: str, value: Any) -> None:
    for part in _leaves(value):
        if not (type(part) in _PLAIN or isinstance(part, Tensor)):
            raise ArgumentError(
                f"save: {name!r} holds a {type(part).__name__}, which a file that loads without running code cannot hold: "
                "pass objects with state_dict(), or numbers, strings, tensors, and lists, tuples and dicts of these"
            )


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) in _DICTS:
        value = [*value.keys(), *value.values()]
    if type(value) not in _SEQUENCES:
        yield value
        return
    for part in value:
        yield from _leaves(part)


def _write(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    has_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(checkpoint, file)
    finally:
        torch.serialization.set_crc32_options(has_checksums)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        # Torch writes checksums and does not look at them: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"the checksum of its part {damaged!r} is wrong: take another copy")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, cut off, or no checkpoint of gradlr.save: {reason}") from error
    whole = checkpoint if isinstance(checkpoint, dict) else {}
    parts = [whole.get(key) for key in ("model", "optimizer", "more")]
    parts += whole["more"].values() if isinstance(parts[-1], dict) else []
    if "gradlr" not in whole or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: no checkpoint of gradlr.save; load it with torch.load and load_state_dict")
    return whole


def _check_model(path: Path, saved: dict[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    for names, what in ((own.keys() - saved.keys(), "lacks"), (saved.keys() - own.keys(), "has, unlike the model,")):
        if names:
            first = min(map(str, names))
            raise CheckpointError(f"{path}: the checkpoint {what} {first!r} ({len(names)} in all). Nothing was changed")
    for name, value in own.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(saved[name], Tensor) or saved[name].layout != value.layout:
            raise CheckpointError(f"{path}: {name!r} is {saved[name]!r}, no tensor like the model's. Nothing was changed")
        if value.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)}, the model's is {tuple(value.shape)}"
            raise CheckpointError(f"{path}: {name!r} has shape {shapes}. Nothing was changed")


def _check_objects(path: Path, saved: dict[str, dict[str, Any]], objects: dict[str, Any]) -> None:
    for name, value in objects.items():
        entry, now = saved.get(name, {}), _class_name(value)
        if "value" in entry:
            raise CheckpointError(f"{path}: {name!r} was saved as a plain value: leave it out, load returns it")
        if not isinstance(entry.get("state_dict"), dict):
            there = ", ".join(sorted(map(str, saved))) or "nothing more"
            raise CheckpointError(f"{path}: no object was saved as {name!r}; there is {there}. Nothing was changed")
        if entry.get("class", now) != now:
            change = f"{name!r} was saved as a {entry['class']} and is a {now} now"
            raise CheckpointError(f"{path}: {change}: make one of the same class, or pass {name}=None. Nothing was changed")


def _warn_of_forgotten(path: Path, saved: dict[str, dict[str, Any]], objects: dict[str, Any]) -> None:
    forgotten = [name for name, entry in saved.items() if "state_dict" in entry and name not in objects]
    if forgotten:
        name = forgotten[0]
        what = f"{path}: {name!r} ({saved[name].get('class', 'object with state_dict()')}) was saved and is not given to load"
        fix = f"so it starts afresh: pass {name}=..., or {name}=None where that is meant"
        warn(f"{what}, {fix}")
