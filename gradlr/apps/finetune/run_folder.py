"""What a run keeps in `--out`, and whether that is this run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...checkpoint.atomic import write_json
from ...errors import ArgumentError, CheckpointError
from ...report.summary import format_bytes


class RunFolder:
    """The folder of a run: `run.json` (its settings), `checkpoints/` (of transformers) and, at the end, `model/`.

    Args:
        path: Need not exist.

    Attributes:
        checkpoints, model: Their paths.
    """

    # Written last into a checkpoint that is whole.
    WHOLE = "whole"

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.model = path, path / "checkpoints", path / "model"
        self._settings = path / "run.json"
        self._lock = FileLock(path / ".lock")

    @property
    def last(self) -> Path | None:
        """The last whole checkpoint."""
        found = [marker.parent for marker in self.checkpoints.glob(f"checkpoint-*/{self.WHOLE}")]
        return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def mark_whole(self, step: int) -> None:
        """The checkpoint of this step is complete: the ones before it go."""
        kept = self.checkpoints / f"checkpoint-{step}"
        (kept / self.WHOLE).touch()
        for other in self.checkpoints.glob("checkpoint-*"):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)

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
        if (self.path / "checkpoint.pt").is_file():
            raise ArgumentError(f"--out {self.path}: holds a run of an earlier version, which cannot go on: give another folder")
        # Ended at the very beginning, a run leaves its lock, a part of its settings and an empty folder.
        entries = self.path.iterdir() if self.path.is_dir() and not self._settings.is_file() else ()
        named = [entry.name for entry in entries if not (entry == self.checkpoints and not any(entry.iterdir()))]
        if others := [name for name in named if not name.startswith((".lock", self._settings.name))]:
            raise ArgumentError(f"--out {self.path}: holds {others[0]!r} and no run of gradlr finetune: give another folder")
        saved = {} if is_overwritten else self.settings()
        if different := [name for name in settings if saved and saved.get(name) != settings[name]]:
            lines = "".join(f"\n  {name}: {saved.get(name)!r} there, {settings[name]!r} now" for name in different)
            raise ArgumentError(
                f"--out {self.path} holds a run with other settings:{lines}\nGo on with its own, give another --out, or start "
                "anew with --overwrite"
            )
        parent = require_writable("--out", self.path)
        own = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(parent).free
        if needed > free + own:
            raise ArgumentError(
                f"--out {self.path}: checkpoints and the model take about {format_bytes(needed)}, and the disk has "
                f"{format_bytes(free)} free: make room, or give a folder on another disk"
            )

    def settings(self) -> dict[str, Any]:
        """The settings of the run that is here; empty where none is.

        Raises:
            CheckpointError: they cannot be read.
        """
        if not self._settings.is_file():
            return {}
        try:
            saved = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(saved, dict):
                raise TypeError(f"it holds a {type(saved).__name__}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._settings}: cannot be read ({error}): --overwrite starts anew") from error
        return saved

    def note(self, name: str, value: Any) -> None:
        """Add to the settings what the run has found out."""
        write_json(self._settings, {**self.settings(), name: value})

    def open(self, settings: dict[str, Any], *, is_overwritten: bool) -> None:
        """Make the folder, lock it against a second process, remove an earlier run if asked to, and write the settings.

        Raises:
            ArgumentError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)  # the system lifts it when the process dies, however it does
        except Timeout:
            raise ArgumentError(f"--out {self.path}: another process is training here; wait for it, or stop it") from None
        if is_overwritten:
            # The settings go last: until then it is the old run, with less in it.
            for path in (self.model, self.checkpoints):
                shutil.rmtree(path, ignore_errors=True)
            self._settings.unlink(missing_ok=True)
        if not self._settings.is_file():
            write_json(self._settings, settings)

    def close(self) -> None:
        """Lift the lock."""
        self._lock.release()


def require_writable(option: str, path: Path) -> Path:
    """Raise an ArgumentError unless a folder can be made at `path`; returns the nearest folder that exists."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"{option} {path}: {parent} {'cannot be written' if parent.is_dir() else 'is a file'}")
    return parent
