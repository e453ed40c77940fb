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

# How long one process waits for another at a collective: steps take seconds, and all take the same.
_TIMEOUT = timedelta(seconds=300)


def group_of_one() -> distributed.ProcessGroup:
    """A process group of this process alone: what `process_group=` does with it is what it does with many."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return distributed.distributed_c10d._get_default_group()


def in_processes(work: Callable[[int], Any], count: int, *, threads: int = 1, patience: float = 3600) -> list[Any]:
    """Call `work(rank)` in `count` new processes, which form the default group, by gloo on the loopback address.

    Args:
        work: Can be pickled; what it returns is JSON.
        threads: Of torch, in each process.
        patience: Seconds until all have ended.

    Returns:
        What each has returned, in the order of their ranks.

    Raises:
        ParallelError: they have not ended in time.
        torch.multiprocessing.ProcessException: one has failed; with its traceback, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.spawn(_run, (work, count, threads, folder), nprocs=count, join=False)
        deadline = time.monotonic() + patience
        try:
            while not started.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise ParallelError(f"{count} processes have not come to their end in {patience:g} seconds")
        finally:
            for process in started.processes:
                process.kill()
                process.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]


def _run(rank: int, work: Callable[[int], Any], count: int, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    # Without a name, gloo looks up the machine's own, which may lead nowhere.
    if loopback := {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = min(loopback)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=_TIMEOUT)
    Path(folder, f"{rank}.json").write_text(json.dumps(work(rank)))
    distributed.barrier()
    distributed.destroy_process_group()
