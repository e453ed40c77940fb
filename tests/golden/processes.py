"""Runs trajectories, those of several processes all in one start of these: a start takes longer than everything else."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from golden.trajectories import TRAJECTORIES, Noise
from torch import Tensor, distributed, multiprocessing

# Seconds. A start takes ten on a busy machine, a trajectory one.
_PATIENCE = 120


def run(name: str) -> dict[str, Tensor]:
    """What a trajectory of one process keeps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would add up sums in another order
    try:
        return TRAJECTORIES[name].run()
    finally:
        torch.set_num_threads(threads)


def run_all(names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """What each of them keeps, in processes where it wants some: there, the first one's losses."""
    names = list(names)
    kept = {name: run(name) for name in names if TRAJECTORIES[name].processes == 1}
    for count in sorted({TRAJECTORIES[name].processes for name in names} - {1}):
        kept |= run_in_processes([name for name in names if TRAJECTORIES[name].processes == count], count)
    return kept


def run_in_processes(names: list[str], count: int) -> dict[str, dict[str, Tensor]]:
    """The same of trajectories that want `count` processes each, which form a gloo group on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.spawn(_work, (count, names, folder, Noise.size), nprocs=count, join=False)
        deadline = time.monotonic() + _PATIENCE
        try:
            while not started.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{count} processes have not come to their end in {_PATIENCE} seconds")
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return torch.load(Path(folder) / "kept.pt", weights_only=True)


def _work(rank: int, count: int, names: list[str], folder: str, noise: float) -> None:
    # FSDP2 warns that outputs of a Linear may be views; nothing here writes to one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    if loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]  # otherwise gloo looks the machine's own name up, which may lead nowhere
    Noise.size = noise
    store = distributed.FileStore(f"{folder}/store", count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=30))
    kept = {name: run(name) for name in names}
    if rank == 0:
        torch.save(kept, Path(folder) / "kept.pt")
    distributed.barrier()
    # Torch's gloo may abort while the interpreter ends.
    os._exit(0)
