"""Data parallel training in two and in four gloo processes; each number of them is started once, and runs all of its checks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_documented_loop, run_in_processes

from gradlr import ArgumentError, ParallelError
from gradlr.distributed import propagate_errors

IN_TWO = (
    "hooks_equal_one_process",
    "accumulation_equals_one_process",
    "adaptors_equal_one_process",
    "one_sided_layers_equal_one_process",
    "other_rules_equal_one_process",
    "narrow_weights_and_sparse_rows_stay_equal",
    "full_rank_sees_the_whole_gradient",
    "parameters_may_be_unused",
    "a_process_without_batches_counts_as_zero",
    "values_come_from_the_first_rank",
    "one_process_with_nan_skips_the_step_on_all",
    "other_arguments_are_told",
    "clipping_by_hand_is_refused",
    "an_error_on_one_rank_stops_all",
    "a_resumed_run_goes_on_bit_for_bit",
    "drifting_weights_are_told",
    "bytes_are_those_of_the_formula",
    "a_process_that_stops_early_is_named",
)
IN_FOUR = (
    "hooks_equal_one_process",
    "adaptors_equal_one_process",
    "parameters_may_be_unused",
    "one_process_with_nan_skips_the_step_on_all",
    "a_killed_process_ends_the_others",
)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return run_in_processes(2, "replicated_checks", IN_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    return run_in_processes(4, "replicated_checks", IN_FOUR, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", IN_TWO)
def test_in_two_processes(in_two, name):
    assert_passed(in_two[name])


@pytest.mark.parametrize("name", IN_FOUR)
def test_in_four_processes(in_four, name):
    reports = in_four[name]
    if name == "a_killed_process_ends_the_others":
        assert reports.pop(1) == "nothing"
    assert_passed(reports)


def test_the_documented_loop_runs_under_torchrun(tmp_path):
    saved = run_documented_loop(0, tmp_path)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}


class _Unreachable:
    def tell_failure(self, error):
        raise ParallelError("nobody hears it")


def test_an_error_is_told_here_where_nobody_else_hears_of_it():
    with pytest.raises(ArgumentError, match="the reason"), propagate_errors(_Unreachable()):
        raise ArgumentError("the reason")
