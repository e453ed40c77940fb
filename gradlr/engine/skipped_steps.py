"""Steps that are left out whole because something was not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import GradlrWarning
from ..tensors import AsyncScalar


class Skips:
    """Remembers what was not finite since the last step, and counts the steps left out.

    Attributes:
        count: Steps left out so far, as far as the host knows: on CUDA one is known when the next loss is shown.
        reason: Why the step under way will be left out; None where the host knows of nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reason: str | None = None
        self._flags: list[Tensor] = []
        self._unread: list[tuple[AsyncScalar, Callable[[], None]]] = []

    def look(self, is_finite: Tensor, reason: str) -> bool:
        """Take note of a 0-dim flag; whether it may be relied upon so far (always, where only the device knows)."""
        if is_finite.is_cuda:
            self._flags.append(is_finite)
            return True
        if not is_finite and self.reason is None:
            self.reason = reason
        return bool(is_finite)

    def verdict(self) -> Tensor | None:
        """0-dim flag on the device: whether all flags since the last step were True; None where the host knows that."""
        return torch.stack(self._flags).all() if self._flags else None

    def skip(self, *, is_quiet: bool) -> None:
        """The step under way is left out: count it and tell why, once."""
        self.count += 1
        reason = self.reason
        self.clear()
        if not is_quiet:
            tale = f"the step was left out whole: {reason}. No weight and no state was changed"
            warnings.warn(tale, GradlrWarning, stacklevel=5)

    def await_verdict(self, is_finite: Tensor, undo: Callable[[], None]) -> None:
        """A step was taken on the device if its flag is True; `undo` what the host has counted otherwise."""
        self._unread.append((AsyncScalar(is_finite), undo))
        self.clear()

    def read(self) -> None:
        """Learn of the device what became of the steps since."""
        unread, self._unread = self._unread, []
        for flag, undo in unread:
            if not flag.read():
                undo()
                bad = "a gradient or an update on the device held NaN or infinity, or was clipped by value"
                self.reason = f"{bad} (told one loss late)"
                self.skip(is_quiet=False)

    def clear(self) -> None:
        """A new step begins."""
        self.reason, self._flags = None, []
