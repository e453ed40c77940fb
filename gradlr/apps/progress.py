"""What the user sees while it trains: a bar with tqdm, plain lines without."""

from __future__ import annotations

import sys
import time
from typing import Any

# Seconds between lines where nobody looks at a terminal.
_PAUSE_OF_A_LOG = 10.0


class Progress:
    """Progress over the steps of a run, on stderr.

    Args:
        name: Of the run.
        steps: Of the whole run.
        start: Steps that are done.
        is_shown: Whether this process prints.
    """

    def __init__(self, name: str, steps: int, start: int, *, is_shown: bool = True) -> None:
        self._steps, self._step, self._is_shown = steps, start, is_shown
        self._last = time.monotonic()
        self._bar = _bar(name, steps, start) if is_shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, facts: str) -> None:
        """A step is done, with these facts."""
        self._step += 1
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
        elif self._step == self._steps or time.monotonic() - self._last > _PAUSE_OF_A_LOG:
            self._last = time.monotonic()
            self.print(f"step {self._step} of {self._steps}: {facts}")

    def print(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._is_shown:
            print(line, file=sys.stderr, flush=True)


def _bar(name: str, steps: int, start: int) -> Any:
    try:
        from tqdm import tqdm  # an extra
    except ImportError:
        return None
    pause = 0.1 if sys.stderr.isatty() else _PAUSE_OF_A_LOG
    return tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=pause, maxinterval=pause)
