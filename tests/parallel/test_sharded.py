"""FSDP2, tensor parallelism and both, in two and in four gloo processes, each number of them started once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_documented_loop, run_in_processes

IN_TWO = (
    "fsdp_in_backward_equals_one_process",
    "fsdp_at_step_equals_one_process",
    "fsdp_accumulates_sketches",
    "fsdp_accumulates_before_it_reduces",
    "fsdp_keeps_its_weights_gathered",
    "odd_sizes_equal_one_process",
    "columns_may_be_sharded",
    "policies_of_fsdp_are_followed",
    "narrow_weights_are_rounded_in_each_part",
    "narrow_state_is_rounded_alike_where_it_is_the_same",
    "wrapping_after_attaching_is_told",
    "a_model_is_attached_after_an_evaluation",
    "a_norm_that_overflows_is_infinite_everywhere",
    "tensor_parallel_equals_one_process",
    "copies_that_drift_are_told",
    "an_overflow_on_one_rank_skips_the_step_on_all",
    "a_loss_of_nan_on_one_rank_is_left_out_on_all",
    "nan_in_backward_is_an_error_on_all",
    "bytes_are_those_of_the_formula",
    "what_cannot_be_sharded_is_refused",
    "a_replicated_number_is_trained",
    "rates_and_gradients_of_one_rank_are_told",
    "attaching_before_sharding_is_told",
    "a_model_is_attached_again_after_detach",
)
IN_FOUR = (
    "fsdp_in_backward_equals_one_process",
    "fsdp_at_step_equals_one_process",
    "odd_sizes_equal_one_process",
    "narrow_state_over_two_axes",
    "weights_are_kept_in_a_smaller_mesh_between_forward_and_backward",
    "experts_of_all_processes_share_one_rank",
    "hybrid_sharding_equals_one_process",
    "fsdp_over_tensor_parallel_equals_one_process",
    "tensor_parallel_equals_one_process",
    "a_killed_process_ends_the_others",
)
SAVED = (
    "from_one",
    "from_two",
    "from_four",
    "another_rank_from_one",
    "another_rank_from_two",
    "another_rank_from_four",
)
REPLICATED = (
    "whole_state_dicts_are_those_of_one_process",
    "whole_state_dicts_are_broadcast_to_a_fresh_optimizer",
    "folders_are_written_whole",
    "what_has_the_shape_of_a_shard_is_loaded_as_it_was",
    "what_is_trained_beside_frozen_shards_is_saved",
    "a_checkpoint_without_a_parameter_changes_nothing",
)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return run_in_processes(2, "sharded_checks", IN_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    return run_in_processes(4, "sharded_checks", IN_FOUR, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Reports of 1, 2 and 4 processes: what each of them has saved, and what each has made of it."""
    reports, environment = {}, {"GRADLR_TEST_FOLDER": str(tmp_path_factory.mktemp("checkpoints"))}
    for names in (("begin",), SAVED + REPLICATED):
        for size in (1, 2, 4):
            asked = names if size > 1 else tuple(name for name in names if name not in REPLICATED)
            path = tmp_path_factory.mktemp("saved")
            told = run_in_processes(size, "saved_checks", asked, path, environment=environment)
            reports |= {(name, size): told[name] for name in asked}
    return reports


@pytest.mark.parametrize("name", IN_TWO)
def test_in_two_processes(in_two, name):
    assert_passed(in_two[name])


@pytest.mark.parametrize("name", IN_FOUR)
def test_in_four_processes(in_four, name):
    reports = in_four[name]
    if name == "a_killed_process_ends_the_others":
        assert reports.pop(1) == "nothing"
    assert_passed(reports)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SAVED)
def test_distributed_checkpoints_are_loaded_by_any_number_of_processes(saved, name, size):
    assert_passed(saved["begin", size])
    assert_passed(saved[name, size])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", REPLICATED)
def test_state_dicts_of_sharded_models(saved, name, size):
    assert_passed(saved[name, size])


@pytest.mark.parametrize("number", [2, 3])
def test_the_documented_loops_run_under_torchrun(tmp_path, number):
    saved = run_documented_loop(number, tmp_path)
    assert len(saved["optimizer"]["gradlr"]["tracker"]["history"]) == 3
    assert (tmp_path / "sharded" / ".metadata").is_file()
