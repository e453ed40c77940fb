"""Processes that form a gloo group on this machine, started and ended by the benchmark that needs them."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from ...errors import ParallelError

# Seconds that one process waits for another at a collective: steps take seconds, and all take the same.
_PATIENCE = 300


def group_of_one() -> distributed.ProcessGroup:
    """A process group of this process alone: what `process_group=` does with it is what it does with many."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return distributed.group.WORLD


def in_processes(work: Callable[[int], Any], count: int, *, threads: int = 1, patience: float = 3600) -> list[Any]:
    """Call `work(rank)` in `count` new processes, which form the default group, by gloo on the loopback address.

    Args:
        work: Can be pickled; what it returns is JSON.
        threads: Of torch, in each process.
        patience: Seconds until all are ended.

    Returns:
        What each has returned, in the order of their ranks.

    Raises:
        ParallelError: they have not come to their end in time.
        torch.multiprocessing.ProcessException: one has failed; with its traceback, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.spawn(_run, (work, count, threads, folder), nprocs=count, join=False)
        try:
            _join(started, patience)
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def _join(started: Any, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not started.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            raise ParallelError(f"{len(started.processes)} processes have not come to their end in {patience:g} seconds")


def _run(rank: int, work: Callable[[int], Any], count: int, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    _use_loopback()
    wait = timedelta(seconds=_PATIENCE)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=wait)
    found = work(rank)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _use_loopback() -> None:
    # Otherwise gloo looks the machine's own name up, which may lead nowhere.
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]
