"""What a run keeps in `--out`, and whether that is this run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoint.atomic import write_atomically, write_folder_atomically, write_json
from ...errors import ArgumentError, CheckpointError
from ...report.summary import format_bytes


class RunFolder:
    """The folder of a run: `run.json` (its settings), `checkpoint.pt` (or `checkpoints/`, of shards), `log.jsonl` and, at the
    end, `model/`.

    Args:
        path: Need not exist.
        is_writer: Whether this process keeps the log; others read.

    Attributes:
        checkpoint, shards, model: Their paths.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self.checkpoint, self.shards, self.model = path, path / "checkpoint.pt", path / "checkpoints", path / "model"
        self._settings, self._log = path / "run.json", path / "log.jsonl"
        self._lock: int | None = None
        self._is_writer = is_writer

    def check(self, settings: dict[str, Any], *, is_overwritten: bool, needed: int) -> None:
        """Raise unless the run can begin or go on here. Nothing is changed.

        Args:
            settings: All that decides the result.
            is_overwritten: Whether an earlier run may go.
            needed: Bytes that the files of the run will take.

        Raises:
            ArgumentError: the path is a file, holds other things or another run, cannot be written, or its disk is too full.
            CheckpointError: the run's settings cannot be read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArgumentError(f"--out {self.path}: this is a file; give a folder")
        # Killed at the very beginning, a run leaves a part of its settings.
        entries = self.path.iterdir() if self.path.is_dir() and not self._settings.is_file() else ()
        if others := [entry.name for entry in entries if not entry.name.startswith(self._settings.name)]:
            raise ArgumentError(f"--out {self.path}: holds {others[0]!r} and no run of gradlr finetune: give another folder")
        if self._settings.is_file() and not is_overwritten:
            self._require_same(settings)
        parent = require_writable("--out", self.path)
        own = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(parent).free
        if needed > free + own:
            raise ArgumentError(
                f"--out {self.path}: checkpoints and the model take about {format_bytes(needed)}, and the disk has "
                f"{format_bytes(free)} free: make room, or give a folder on another disk"
            )

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            saved = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(saved, dict):
                raise TypeError(f"it holds a {type(saved).__name__}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._settings}: cannot be read ({error}): --overwrite starts anew") from error
        names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if names:
            lines = "".join(f"\n  {name}: {saved.get(name)!r} there, {settings.get(name)!r} now" for name in names)
            raise ArgumentError(
                f"--out {self.path} holds a run with other settings:{lines}\nGo on with its own, give another --out, or start "
                "anew with --overwrite"
            )

    def open(self, settings: dict[str, Any], *, is_overwritten: bool) -> None:
        """Make the folder, lock it against a second process, remove an earlier run if asked to, and write the settings.

        Raises:
            ArgumentError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if is_overwritten:
            # The settings go last: until then it is the old run, with less in it.
            for path in (self.model, self.shards, *self.path.glob(f"{self.shards.name}.*")):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.checkpoint, self._log, self._settings):
                path.unlink(missing_ok=True)
        if not self._settings.is_file():
            write_json(self._settings, settings)

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no flock
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when the process dies, however it does
        except BlockingIOError:
            self.close()
            raise ArgumentError(f"--out {self.path}: another process is training here; wait for it, or stop it") from None
        except OSError:  # a disk that knows no locks
            self.close()

    def close(self) -> None:
        """Lift the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def log(self, **entry: Any) -> None:
        """Add a line to the log."""
        if self._is_writer:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def rewind_log(self, step: int) -> None:
        """Forget what was logged after `step`, which will be done again, and a line that was cut off."""
        if not self._is_writer:
            return
        kept = []
        for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if self._log.is_file() else ():
            with suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_atomically(self._log, lambda file: file.write("".join(kept).encode()))

    def write_model(self, write: Callable[[Path], str]) -> str:
        """Let `write` fill a folder, then give it the name `model`; returns what it returned."""
        return write_folder_atomically(self.model, write)


def require_writable(option: str, path: Path) -> Path:
    """Raise an ArgumentError unless a folder can be made at `path`; returns the nearest folder that exists."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"{option} {path}: {parent} {'cannot be written' if parent.is_dir() else 'is a file'}")
    return parent
