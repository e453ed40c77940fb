"""Checkpoints of sharded models: what one, two and four gloo processes save, any other number of them loads."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_in_processes, selected
from saved_checks import check

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
