"""What a run keeps in `--out`, and whether that is this run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoint.atomic import write_atomically, write_folder_atomically
from ...errors import ArgumentError, CheckpointError
from ...report.summary import format_bytes

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


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
        self.path, self.checkpoint, self.model = path, path / "checkpoint.pt", path / "model"
        self.shards = path / "checkpoints"
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
            CheckpointError: the run's own notes cannot be read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArgumentError(f"--out {self.path}: this is a file; give a folder")
        if self.path.is_dir() and not self._settings.is_file():
            # Killed at the very beginning, a run leaves a part of its settings.
            names = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(self._settings.name)]
            if names:
                raise ArgumentError(f"--out {self.path}: holds {names[0]!r} and no run of gradlr finetune: give another folder")
        if self._settings.is_file() and not is_overwritten:
            self._check_same(settings)
        self._check_room(needed)

    def _check_same(self, settings: dict[str, Any]) -> None:
        try:
            saved = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(saved, dict):
                raise TypeError(f"it holds a {type(saved).__name__}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._settings}: cannot be read ({error}): --overwrite starts anew") from error
        names = [*saved, *(name for name in settings if name not in saved)]
        differences = [name for name in names if saved.get(name) != settings.get(name)]
        if differences:
            tale = "".join(f"\n  {name}: {saved.get(name)!r} there, {settings.get(name)!r} now" for name in differences)
            raise ArgumentError(
                f"--out {self.path} holds a run with other settings:{tale}\nGo on with its own, give another --out, or start "
                "anew with --overwrite"
            )

    def _check_room(self, needed: int) -> None:
        parent = require_writable("--out", self.path)
        own = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) if self.path.is_dir() else 0
        free = shutil.disk_usage(parent).free
        if needed > free + own:
            raise ArgumentError(
                f"--out {self.path}: checkpoints and the model take about {format_bytes(needed)}, and the disk has "
                f"{format_bytes(free)} free: make room, or give a folder on another disk"
            )

    def open(self, settings: dict[str, Any], *, is_overwritten: bool) -> None:
        """Make the folder, lock it against a second process, remove an earlier run if asked to, and note the settings.

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
            text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
            write_atomically(self._settings, lambda file: file.write(text.encode()))

    def _take_lock(self) -> None:
        if fcntl is None:
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
        if not self._is_writer:
            return
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

    def write_model(self, write: Callable[[Path], Any]) -> Any:
        """Let `write` fill a folder, then give it the name `model`; returns what it returned."""
        return write_folder_atomically(self.model, write)


def require_writable(option: str, path: Path) -> Path:
    """Raise an ArgumentError unless a folder can be made at `path`; returns the nearest folder that exists."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"{option} {path}: {parent} {'cannot be written' if parent.is_dir() else 'is a file'}")
    return parent
