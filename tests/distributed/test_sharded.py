"""FSDP2, tensor parallelism and both, in two and in four gloo processes, each number of them started once."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_documented_loop, run_in_processes, selected
from sharded_checks import check


@pytest.fixture(scope="module")
def reports_of(request, tmp_path_factory):
    """The reports of the processes of a group, which are started once."""

    @functools.cache
    def start(size):
        return run_in_processes(size, "sharded_checks", selected(request, size), tmp_path_factory.mktemp("group"))

    return start


@check.parametrize(2, 4, slow_above=2)
def test_in_processes(reports_of, size, name):
    assert_passed(reports_of(size)[name], killed=1 if name == "a_killed_process_ends_the_others" else None)


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_documented_loops_run_under_torchrun(tmp_path, number):
    saved = run_documented_loop(number, tmp_path)
    assert len(saved["optimizer"]["gradlr"]["tracker"]["history"]) == 3
    assert (tmp_path / "sharded" / ".metadata").is_file()
