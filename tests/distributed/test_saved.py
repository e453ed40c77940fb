"""Checkpoints of sharded models: what one, two and four gloo processes save, any other number of them loads."""

import contextlib
import functools
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_in_processes, selected
from saved_checks import check

from gradlr.checkpoint import folder as folders

shutil_rmtree = shutil.rmtree
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """Reports of groups of 1, 2 and 4 processes: first each of them saves, then each loads what all have saved."""
    environment = {"GRADLR_TEST_FOLDER": str(tmp_path_factory.mktemp("checkpoints"))}
    for size in SIZES:
        told = run_in_processes(size, "saved_checks", ["begin"], tmp_path_factory.mktemp("saving"), environment=environment)
        assert_passed(told["begin"])
    groups = [(size, selected(request, size), tmp_path_factory.mktemp("loading")) for size in SIZES]
    return {size: run_in_processes(size, "saved_checks", names, path, environment=environment) for size, names, path in groups}


@check.parametrize(*SIZES)
def test_in_processes(reports, size, name):
    assert_passed(reports[size][name])


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
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                left = iter(range(count))
                for owner, name in ((os, "rename"), (shutil, "rmtree")):
                    patch.setattr(owner, name, functools.partial(_unless_killed, getattr(owner, name), left))
                folders._swap(part, path)
            assert folders.is_folder(path)
            assert ((path if path.is_dir() else old) / "gradlr.pt").is_file()
    assert path.is_dir() and not old.exists() and not part.exists()


def _unless_killed(work, left, *args, **kwargs):
    if next(left, None) is not None:
        return work(*args, **kwargs)
    if work is shutil_rmtree:  # some of it is gone by then
        (Path(args[0]) / "gradlr.pt").unlink(missing_ok=True)
    raise KeyboardInterrupt
