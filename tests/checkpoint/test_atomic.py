"""Folders that are written whole or not at all; files are in test_file.py, with what they are for."""

import functools
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from gradlr.checkpoint.atomic import replace_folder, write_folder_atomically
from gradlr.checkpoint.folder import is_folder

REMOVE = shutil.rmtree


def test_a_folder_that_is_replaced_is_always_there(tmp_path, monkeypatch):
    """Killed at each renaming or removal in turn, first with a folder of this name, then with its older version alone."""
    path, part, old = tmp_path / "run", tmp_path / "run.part", tmp_path / "run.old"
    for names in ((path,), (old,), (path, old)):
        for count in range(6):
            for folder in (path, old, part):
                shutil.rmtree(folder, ignore_errors=True)
            for folder in (*names, part):
                folder.mkdir()
                (folder / "gradlr.pt").touch()
            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                left = iter(range(count))
                for owner, name in ((os, "replace"), (shutil, "rmtree")):
                    patch.setattr(owner, name, functools.partial(_unless_killed, getattr(owner, name), left))
                replace_folder(path, part, old)
            assert is_folder(path)
            assert ((path if path.is_dir() else old) / "gradlr.pt").is_file()
    assert path.is_dir() and not old.exists() and not part.exists()


def _unless_killed(work, left, *args, **kwargs):
    if next(left, None) is not None:
        return work(*args, **kwargs)
    if work is REMOVE:  # some of it is gone by then
        (Path(args[0]) / "gradlr.pt").unlink(missing_ok=True)
    raise KeyboardInterrupt


def test_a_folder_that_could_not_be_filled_leaves_the_older_one(tmp_path):
    path = tmp_path / "deep" / "run"
    assert write_folder_atomically(path, lambda part: (part / "a").write_text("one")) == 3

    def fail(part):
        (part / "a").write_text("two")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_folder_atomically(path, fail)
    assert (path / "a").read_text() == "one" and [entry.name for entry in path.parent.iterdir()] == ["run"]
    link = tmp_path / "link"
    link.symlink_to(path)
    write_folder_atomically(link, lambda part: (part / "b").write_text("three"))
    assert link.is_symlink() and [entry.name for entry in path.iterdir()] == ["b"]
