"""Files and folders that are written whole or not at all: killed at any moment, a process leaves the old or the new one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

_SUFFIX = ".part"
_T = TypeVar("_T")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, then give it the name.

    What killed processes of this machine have left beside `path` is removed by the next call. A link stays one: the file that it
    names is written. A new file has the rights that the umask gives, an old one keeps its own.

    Args:
        path: The file.
        write: Given the open file.

    Raises:
        OSError: the folder does not exist or cannot be written; `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    part = path.parent / f"{_prefix(path, os.getpid())}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            os.chmod(part, path.stat().st_mode & 0o777)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_folder_atomically(path: Path, fill: Callable[[Path], _T]) -> _T:
    """Let `fill` write the files of a new folder beside `path`, then give it the name; an older one goes when that is done.

    Killed between the two renames, it leaves the older one beside `path`, as `.{name}.old`.

    Args:
        path: The folder; those around it are made where they are missing.
        fill: Given the new folder, empty; should bring its files to the disk.

    Returns:
        What `fill` returned.

    Raises:
        OSError: the folder cannot be written; `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    part, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        result = fill(part)
        replace_folder(path, part, old)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return result


def replace_folder(path: Path, part: Path, old: Path) -> None:
    """Give the whole folder `part` the name `path`; in between, what stood there is `old`, which is removed in the end.

    Raises:
        OSError: it cannot be renamed; `path` is as it was.
    """
    if path.is_dir():  # otherwise the old one is all there is: a process was killed between the two renames
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        if old.is_dir():
            os.replace(old, path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write an object as JSON in UTF-8, whole or not at all; as `write_atomically`."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _prefix(path: Path, process: int | str) -> str:
    host = re.sub(r"\W", "_", socket.gethostname())
    return f"{path.name}.{host}-{process}."


def _remove_leftovers(path: Path) -> None:
    # Another process, or another machine on a shared disk, may be writing the same file: only files of the dead go.
    pattern = re.compile(re.escape(_prefix(path, "@")).replace("@", r"(\d+)") + r"[^.]*" + re.escape(_SUFFIX))
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        found = pattern.fullmatch(entry.name)
        if found and not _is_alive(int(found[1])):
            entry.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # somebody else's process, unless there is none
        return not isinstance(error, ProcessLookupError)
    return True


def _sync_folder(folder: Path) -> None:
    # The new name itself is on the disk only when its folder is. Where folders cannot be opened, nothing can be done.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
