"""Signals that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_signals(*numbers: int) -> Iterator[list[int]]:
    """These signals are noted in the list, so that a step is never left half done; a second one does what it did before.

    In threads other than the main one, which receive no signals, the list stays empty.
    """
    noted: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.getsignal(number) for number in numbers if is_main}

    def set_handlers(handlers: dict[int, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        set_handlers(previous)

    set_handlers(dict.fromkeys(previous, note))
    try:
        yield noted
    finally:
        set_handlers(previous)
