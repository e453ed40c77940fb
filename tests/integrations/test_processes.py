"""accelerate, Trainer and Lightning in two gloo processes, which are started once and run all checks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from processes import assert_passed, run_in_processes

CHECKS = (
    "accelerate_trains_replicas",
    "accelerate_accumulates_in_replicas",
    "accelerate_resumes_replicas",
    "accelerate_shards",
    "accelerate_resumes_under_fsdp_from_shards",
    "parameters_without_entries_stay_apart",
    "clipping_by_hand_is_refused",
    "ways_of_accelerate_that_do_not_work_are_told",
    "attaching_before_accelerate_shards_is_an_error",
    "the_documented_loop_trains_replicas",
    "trainer_trains_replicas",
    "trainer_trains_more_than_its_model_in_replicas",
    "trainer_shards",
    "trainer_resumes_under_fsdp",
    "ways_of_trainer_that_do_not_work_are_told",
    "lightning_in_several_processes_is_refused",
)
# Of these, some with another kind of file or a shorter way to the same.
SLOW = (
    "accelerate_resumes_under_fsdp_from_whole_files", "trainer_resumes_under_fsdp_from_shards",
    "accelerate_accumulates_under_fsdp", "accelerate_shards_by_environment", "trainer_resumes_replicas",
)  # fmt: skip


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """What became of the selected checks in both processes."""
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in items]
    environment = {"GRADLR_TEST_FOLDER": str(tmp_path_factory.mktemp("saved"))}
    return run_in_processes(2, "process_checks", names, tmp_path_factory.mktemp("two"), environment=environment)


@pytest.mark.parametrize("name", [*CHECKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_in_two_processes(reports, name):
    assert_passed(reports[name])
