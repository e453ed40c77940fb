"""How much memory a device has left, and how much was taken."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch


def available_bytes(device: torch.device | str) -> int | None:
    """Bytes that can still be taken: free memory of the GPU, or of the machine and of its control groups; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = [room for room in (_machine_room(), *_group_rooms()) if room is not None]
    return min(found, default=None)


def peak_memory(device: torch.device | str) -> int | None:
    """Most bytes held so far: allocated on the GPU, or resident in the process; None if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(torch.device(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _machine_room() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _group_rooms() -> list[int | None]:
    root, own, old = Path("/sys/fs/cgroup"), Path(), Path("/sys/fs/cgroup/memory")
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    folders = [root / part for part in (own, *own.parents)]
    rooms = [_room(folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in folders]
    return [*rooms, _room(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat")]


def _room(limit: Path, usage: Path, statistics: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        # Pages of files that nobody uses go when memory is asked for.
        entries = dict(line.split() for line in statistics.read_text().splitlines())
        spare = int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
        return max(int(limit.read_text()) - int(usage.read_text()) + spare, 0)
    return None
