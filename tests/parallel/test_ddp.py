"""Stock DistributedDataParallel in two and in four gloo processes; each number of them is started once."""

import sys
from pathlib import Path

import pytest

import gradlr

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from models import mlp
from processes import assert_passed, run_documented_loop, run_in_processes

IN_TWO = (
    "stock_ddp_equals_one_process",
    "accumulation_equals_one_process",
    "a_static_graph_equals_one_process",
    "what_no_map_fits_is_formed_and_sketched",
    "checkpointed_layers_are_recomputed",
    "second_derivatives_reach_the_sketches",
    "a_layer_may_be_used_twice_or_share_its_weight",
    "parameters_may_be_unused",
    "narrow_weights_and_sparse_rows_stay_equal",
    "not_finite_is_left_out_by_all",
    "clipping_and_scaling_by_hand_are_right",
    "a_model_keeps_its_keys_and_copies_plainly",
    "a_resumed_run_goes_on_bit_for_bit",
    "a_graph_from_before_has_bases_that_are_gone",
    "mistakes_are_told",
    "an_error_on_one_rank_stops_all",
    "weights_come_from_the_first_rank",
    "strangers_are_told_and_sketches_are_none",
    "bytes_are_those_of_the_formula",
    "a_process_that_stops_early_is_named",
)
IN_FOUR = (
    "stock_ddp_equals_one_process",
    "accumulation_equals_one_process",
    "parameters_may_be_unused",
    "not_finite_is_left_out_by_all",
)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return run_in_processes(2, "ddp_checks", IN_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    return run_in_processes(4, "ddp_checks", IN_FOUR, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", IN_TWO)
def test_in_two_processes(in_two, name):
    assert_passed(in_two[name])


@pytest.mark.parametrize("name", IN_FOUR)
def test_in_four_processes(in_four, name):
    assert_passed(in_four[name])


def test_it_needs_a_process_group():
    model = mlp()
    with pytest.raises(gradlr.ArgumentError, match="init_process_group"):
        gradlr.attach(model, gradlr.LossTracker(), apply="step", capture="ddp")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_documented_loop_runs_under_torchrun(tmp_path):
    saved = run_documented_loop(1, tmp_path)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}
    assert saved["model"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
