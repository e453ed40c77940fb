"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_SUFFIX = ".part"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, then give it the name.

    Killed at any moment, it leaves the old file or the new one. What killed processes of this machine have left beside `path` is
    removed by the next call. A link stays one: the file that it names is written. A new file has the rights that the umask gives,
    an old one keeps its own.

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
        with suppress(FileNotFoundError):
            part.unlink()
        raise
    _sync_folder(path.parent)


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
            with suppress(FileNotFoundError):
                entry.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _sync_folder(folder: Path) -> None:
    # The new name itself is on the disk only when its folder is. Where folders cannot be opened, nothing can be done.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
