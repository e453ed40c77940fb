"""A folder that is written beside its place and then given its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def require_free(path: Path) -> None:
    """Raise an ArgumentError unless `path` can become an adapter's folder: absent, empty, or holding only an earlier adapter."""
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"path={str(path)!r} is a file; give a folder")
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in (WEIGHTS, CONFIG)) if path.exists() else []
    if strangers:
        raise ArgumentError(f"path={str(path)!r} holds {strangers[0]!r}, which is no part of an adapter: give another folder")


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Write the files into a new folder beside `path`, then give it the name; an earlier adapter goes when that is done.

    Killed between the two renames, it leaves the earlier adapter in the hidden folder beside `path`, `.{name}.*.part/earlier`.

    Raises:
        OSError: the folder cannot be written; `path` is as it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as scratch:
        fresh, earlier = Path(scratch, "fresh"), Path(scratch, "earlier")
        fresh.mkdir()
        for name, content in files.items():
            write_atomically(fresh / name, lambda file, content=content: file.write(content))
        if path.exists():
            os.replace(path, earlier)
        try:
            os.replace(fresh, path)
        except BaseException:
            if earlier.exists():
                shutil.move(earlier, path)
            raise
