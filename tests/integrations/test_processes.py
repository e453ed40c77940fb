"""accelerate, Trainer and Lightning in two gloo processes, which are started once and run all checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradlr

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "parallel")]  # spawned processes inherit it

from processes import assert_passed, run_in_processes

ACCELERATE = (
    "accelerate_trains_replicas",
    "accelerate_accumulates_in_replicas",
    "accelerate_resumes_replicas",
    "accelerate_shards",
    "accelerate_accumulates_under_fsdp",
    "accelerate_resumes_under_fsdp_from_shards",
    "accelerate_resumes_under_fsdp_from_whole_files",
    "parameters_without_entries_stay_apart",
    "clipping_by_hand_is_refused",
    "ways_of_accelerate_that_do_not_work_are_told",
    "attaching_before_accelerate_shards_is_an_error",
)
TRAINERS = (
    "trainer_trains_replicas",
    "trainer_shards",
    "trainer_resumes_replicas",
    "trainer_resumes_under_fsdp",
    "ways_of_trainer_that_do_not_work_are_told",
    "lightning_in_several_processes_is_refused",
)


def run(names, tmp_path_factory):
    environment = {"GRADLR_TEST_FOLDER": str(tmp_path_factory.mktemp("saved"))}
    return run_in_processes(2, "process_checks", names, tmp_path_factory.mktemp("two"), environment=environment)


@pytest.fixture(scope="module")
def accelerate_reports(tmp_path_factory):
    return run(ACCELERATE, tmp_path_factory)


@pytest.fixture(scope="module")
def trainer_reports(tmp_path_factory):
    return run(TRAINERS, tmp_path_factory)


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate(accelerate_reports, name):
    assert_passed(accelerate_reports[name])


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(trainer_reports, name):
    assert_passed(trainer_reports[name])
