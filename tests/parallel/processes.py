"""Starts a few processes that form a gloo group, runs checks in each of them, and brings back what became of them."""

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed


def run_in_processes(size, module, names, path, *, patience=100, environment=None):
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


def assert_passed(reports):
    assert all(report == "passed" for report in reports), "\n".join(f"rank {i}: {one}" for i, one in enumerate(reports))


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
