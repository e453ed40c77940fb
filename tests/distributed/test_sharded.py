"""FSDP2, tensor parallelism and both, in two and in four gloo processes, each number of them started once."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes inherit it

from processes import assert_passed, run_documented_loop, run_in_processes, selected
from sharded_checks import attach, check, net, shard, train

DEVICES = Path(__file__).parents[2] / "docs" / "devices.md"


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


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_one_process_with_its_weights_on_the_host_trains_as_without_fsdp(apply):
    models = net(dtype=torch.bfloat16), net(dtype=torch.bfloat16)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        shard(models[1], offload_policy=CPUOffloadPolicy(pin_memory=False))  # pinned memory needs a GPU
        for model in models:
            train(model, *attach(model, apply=apply), 4)
        weights = [parameter.full_tensor() for parameter in models[1].parameters()]
    finally:
        distributed.destroy_process_group()
    assert not torch.equal(weights[2], net(dtype=torch.bfloat16).up.weight)
    # All rows lie here: the same operations, and bit for bit the same stochastic rounding.
    assert all(torch.equal(weight, other) for weight, other in zip(weights, models[0].parameters(), strict=True))


def test_the_documented_loop_of_one_process_runs():
    code = re.findall(r"```python\n(.*?)```", DEVICES.read_text(encoding="utf-8"), flags=re.DOTALL)[3]
    assert "CPUOffloadPolicy" in code
    names = {}
    exec(code, names)
    assert names["step"] == 2 and len(names["tracker"].history) == 3


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_documented_loops_run_under_torchrun(tmp_path, number):
    saved = run_documented_loop(number, tmp_path)
    assert len(saved["optimizer"]["gradlr"]["tracker"]["history"]) == 3
    assert (tmp_path / "sharded" / ".metadata").is_file()
