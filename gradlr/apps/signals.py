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

    In threads other than the main one, which hear no signals, the list stays empty.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        _set_handlers(previous)

    _set_handlers(dict.fromkeys(previous, note))
    try:
        yield noted
    finally:
        _set_handlers(previous)


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
