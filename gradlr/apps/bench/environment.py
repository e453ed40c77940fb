"""What a result was measured on, kept beside every number; and how results are shown."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ArgumentError


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, processor and threads; the GPU's name and CUDA version where the device is one."""
    device = torch.device(device)
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def require_device(device: str) -> None:
    """Raise an ArgumentError unless tensors can be made on `device`."""
    if device == "meta":
        raise ArgumentError("--device meta holds no values; use --device cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {device}: {str(error).splitlines()[0]}; use --device cpu") from None


def require_modules(*names: str) -> None:
    """Raise an ArgumentError unless these can be imported."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ArgumentError(f"{' and '.join(missing)} not installed: pip install 'gradlr[bench]'")


def cache_folder() -> Path:
    """Where what takes minutes to make is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradlr"


def markdown(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
