"""accelerate, Trainer and Lightning in two gloo processes, which are started once and run all checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradlr

sys.path.insert(0, str(Path(__file__).parent))

from processes import assert_passed, run_in_processes

ACCELERATE = (
    "accelerate_trains_replicas",
    "accelerate_accumulates_in_replicas",
    "accelerate_resumes_replicas",
    "accelerate_shards",
    "accelerate_accumulates_under_fsdp",
    "accelerate_shards_by_environment",
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
ROOT = Path(gradlr.__file__).parents[1]


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


def test_the_documented_loop_runs_under_torchrun(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [block for block in blocks if "Accelerator(" in block]
    told = "print(accelerator.num_processes, repr(opt))"
    (tmp_path / "train.py").write_text(f"{code}\n{told}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes=2") == 2
