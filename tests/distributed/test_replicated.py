"""Data parallel training in two and in four gloo processes; each number of them is started once, and runs all of its checks."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_documented_loop, run_in_processes, selected
from replicated_checks import check

from gradlr import ArgumentError, ParallelError
from gradlr.distributed.communicator import propagate_errors


@pytest.fixture(scope="module")
def reports_of(request, tmp_path_factory):
    """The reports of the processes of a group, which are started once."""

    @functools.cache
    def start(size):
        return run_in_processes(size, "replicated_checks", selected(request, size), tmp_path_factory.mktemp("group"))

    return start


@check.parametrize(2, 4, slow_above=2)
def test_in_processes(reports_of, size, name):
    assert_passed(reports_of(size)[name], killed=1 if name == "a_killed_process_ends_the_others" else None)


def test_the_documented_loop_runs_under_torchrun(tmp_path):
    saved = run_documented_loop(0, tmp_path)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}


class _Unreachable:
    def tell_failure(self, error):
        raise ParallelError("nobody hears it")


def test_an_error_is_told_here_where_nobody_else_hears_of_it():
    with pytest.raises(ArgumentError, match="the reason"), propagate_errors(_Unreachable()):
        raise ArgumentError("the reason")
