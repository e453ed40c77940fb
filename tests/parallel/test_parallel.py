"""Data parallel training in two and in four gloo processes; each number of them is started once, and runs all of its checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradlr

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_in_processes

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
    return run_in_processes(2, "checks", IN_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    return run_in_processes(4, "checks", IN_FOUR, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", IN_TWO)
def test_in_two_processes(in_two, name):
    assert_passed(in_two[name])


@pytest.mark.parametrize("name", IN_FOUR)
def test_in_four_processes(in_four, name):
    reports = in_four[name]
    if name == "a_killed_process_ends_the_others":
        assert reports.pop(1) == "nothing"
    assert_passed(reports)


ROOT = Path(gradlr.__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "devices.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_documented_loops_run_under_torchrun(tmp_path, code):
    # Torch's gloo may abort while the interpreter ends, with asynchronous collectives of DTensors and any optimizer.
    (tmp_path / "train.py").write_text(f"{code}\nimport os\nos._exit(0)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", "train.py"], cwd=tmp_path, env=environment, timeout=150, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "sharded" / "gradlr.pt" if "sharded" in code else tmp_path / "run.pt"
    saved = torch.load(path, weights_only=True)
    assert len(saved["optimizer"]["gradlr"]["tracker"]["history"]) == 3
    if path.name == "gradlr.pt":  # the states lie beside it
        return
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}
