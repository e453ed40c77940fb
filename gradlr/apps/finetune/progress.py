"""What the user sees while it trains: a bar with tqdm, plain lines without."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from ...report.summary import format_bytes

# A line each so often where nobody looks at a terminal.
_PAUSE_OF_A_LOG = 10.0


class Progress:
    """A progress bar over the steps of a run, on stderr.

    Args:
        steps: Of the whole run.
        start: Steps that are done.
        is_shown: Whether this process speaks.
    """

    def __init__(self, steps: int, start: int, *, is_shown: bool = True) -> None:
        self._steps, self._step, self._is_shown = steps, start, is_shown
        self._last = time.monotonic()
        self._bar = _bar(steps, start) if is_shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, facts: str) -> None:
        """A step is done; `facts` says with what."""
        self._step += 1
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
        elif self._step == self._steps or time.monotonic() - self._last > _PAUSE_OF_A_LOG:
            self._last = time.monotonic()
            self.say(f"step {self._step} of {self._steps}: {facts}")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._is_shown:
            print(line, file=sys.stderr, flush=True)


def _bar(steps: int, start: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    pause = 0.1 if sys.stderr.isatty() else _PAUSE_OF_A_LOG
    return tqdm(total=steps, initial=start, desc="finetune", unit="step", mininterval=pause, maxinterval=pause)


def peak_memory(device: str) -> int | None:
    """Most bytes held so far: allocated on the GPU, or resident in the process; None if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(torch.device(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def described(*, loss: float, rank: int, rate: float, lr: float, memory: int | None) -> str:
    """One step's facts in a line."""
    held = "" if memory is None else f", {format_bytes(memory)}"
    return f"loss {loss:.4f}, rank {rank}, {rate:,.0f} tokens/s{held}, lr {lr:.2e}"
