"""Starts a few processes that form a gloo group, runs checks in each of them, and brings back what became of them."""

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

import gradlr


class Checks:
    """Collects functions that run alike in each process of a group; they run in the order in which they stand.

    ```
    check = Checks()

    @check(2, 4, slow=4)
    def weights_are_equal(rank, size): ...
    ```
    """

    def __init__(self):
        self._sizes, self._slow = {}, set()

    def __call__(self, *sizes, slow=None):
        """Decorates a check for groups of these sizes; the group of size `slow` is left to `make test-all`."""

        def register(function):
            self._sizes[function.__name__] = sizes
            self._slow.add((slow, function.__name__))
            return function

        return register

    def parametrize(self, *sizes, slow_above=None):
        """The test gets each size and each check's name; what a smaller group runs as well is slow in groups above that size."""
        pairs = [(size, name) for size in sizes for name, own in self._sizes.items() if size in own]
        slow = {(size, name) for size, name in pairs if slow_above is not None and size > slow_above >= min(self._sizes[name])}
        cases = [pytest.param(*pair, marks=[pytest.mark.slow] if pair in {*slow, *self._slow} else []) for pair in pairs]
        return pytest.mark.parametrize(("size", "name"), cases)


def selected(request, size):
    """Names of the checks in groups of `size` that this run of pytest has selected among the tests of the fixture's module."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params["name"] for item in items if item.callspec.params.get("size") == size]


def run_in_processes(size, module, names, path, *, patience=240, environment=None):
    """name of the check → what each rank reports: "passed", a traceback, or "nothing" where it has not come to its end.

    Args:
        size: Number of processes.
        module: Name of a module that these can import, with one function per name, called as `check(rank, size)`.
        names: In which order.
        path: An empty folder.
        patience: Seconds until what has not ended is killed.
        environment: Variables that are set in them.
    """
    context = _server_of(module)
    shared = (size, module, names, str(path), environment or {})
    workers = [context.Process(target=_work, args=(rank, *shared)) for rank in range(size)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + patience
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()
    reports = [path / f"report-{rank}" for rank in range(size)]
    told = [dict(map(json.loads, report.read_text().splitlines())) if report.exists() else {} for report in reports]
    return {name: [one.get(name, "nothing") for one in told] for name in names}


def assert_passed(reports, *, killed=None):
    """In each process, or in each but the one that was killed on purpose."""
    expected = ["nothing" if rank == killed else "passed" for rank in range(len(reports))]
    assert reports == expected, "\n".join(f"rank {i}: {one}" for i, one in enumerate(reports))


def run_documented_loop(number, folder):
    """Run one of the examples in docs/devices.md under torchrun, in two processes; returns the checkpoint that it leaves."""
    root = Path(gradlr.__file__).parents[1]
    codes = re.findall(r"```python\n(.*?)```", (root / "docs" / "devices.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    # Torch's gloo may abort while the interpreter ends, with asynchronous collectives of DTensors and any optimizer.
    (folder / "train.py").write_text(f"{codes[number]}\nimport os\nos._exit(0)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", "train.py"], cwd=folder, env=environment, timeout=150, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = folder / "sharded" / "gradlr.pt" if "sharded" in codes[number] else folder / "run.pt"
    return torch.load(path, weights_only=True)


@functools.cache
def _server_of(module):
    # A fresh process imports torch and the checks once; those that run them are forked from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return context


def _work(rank, size, module, names, path, environment):
    os.environ.update(environment)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checks = __import__(module, fromlist=["any"])
    timeout = timedelta(seconds=30)
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=timeout)
    with open(f"{path}/report-{rank}", "w") as report:
        for name in names:
            try:
                getattr(checks, name)(rank, size)
                outcome = "passed"
            except BaseException:
                outcome = traceback.format_exc()
            print(json.dumps([name, outcome]), file=report, flush=True)
    os._exit(0)
