"""Steps that are left out whole because something was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import warn
from ..tensors import AsyncScalar, is_async, widest
from .record import ParamRecord


class SkippedSteps:
    """Remembers what was not finite since the last step, and counts the steps left out.

    Attributes:
        count: Steps left out so far, as far as the host knows: where the device runs behind it, one is known at the next loss.
        reason: Why the step under way will be left out; None where the host knows of nothing.
        unread: Steps of which the device has not told yet.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reason: str | None = None
        self._flags: list[Tensor] = []
        self._checks: list[Tensor] = []
        self.unread: list[tuple[AsyncScalar, Sequence[ParamRecord]]] = []

    def look(self, is_finite: Tensor, reason: Callable[[], str]) -> bool:
        """Take note of a flag or check; whether it may be relied upon so far (always, where only the device knows).

        Args:
            is_finite: 0-dim: a flag, or a number that is finite where all is well.
            reason: Makes the words for why the step is left out, asked for only where it is.
        """
        if is_async(is_finite):
            (self._checks if is_finite.is_floating_point() else self._flags).append(is_finite)
            return True
        if math.isfinite(is_finite) if is_finite.is_floating_point() else is_finite:
            return True
        self.reason = self.reason or reason()
        return False

    def verdict(self) -> Tensor | None:
        """0-dim flag on the device: whether all was well since the last step; None where the host knows that."""
        flags = (
            [*self._flags, torch.stack([widest(check) for check in self._checks]).isfinite().all()]
            if self._checks
            else self._flags
        )
        return torch.stack(flags).all() if flags else None

    def take_status(self) -> tuple[bool, str]:
        """Whether all was finite here since the last step, and why not; waits for the device, and begins anew."""
        verdict = self.verdict()
        is_finite = self.reason is None and (verdict is None or bool(verdict))
        reason = self.reason or "a gradient held NaN or infinity"
        self.clear()
        return is_finite, reason

    def skip(self, *, is_quiet: bool) -> None:
        """The step under way is left out: count it, and unless somebody else tells it, say why."""
        self.count += 1
        reason = self.reason
        self.clear()
        if not is_quiet:
            message = f"the step was left out whole: {reason}. No weight and no state was changed"
            warn(message)

    def drop(self) -> bool:
        """The gradients since the last step are dropped, and with them their flags; whether the host counts that as a skip.

        So it is after `GradScaler.step`, which does not call `opt.step()` where a gradient has overflowed. On a device that runs
        behind the host, it is counted once that has caught up.
        """
        verdict = self.verdict()
        if verdict is not None:
            self.unread.append((AsyncScalar(verdict), ()))
        if self.reason is None:
            self.clear()
            return False
        self.skip(is_quiet=True)
        return True

    def await_verdict(self, is_finite: Tensor, records: Sequence[ParamRecord]) -> None:
        """These parameters were updated on the device if its flag is True; the host has counted that they were."""
        self.unread.append((AsyncScalar(is_finite), records))
        self.clear()

    def read(self) -> list[ParamRecord]:
        """Learn of the device what has become of the steps since; the parameters whose last update it has left out."""
        unread, self.unread = self.unread, []
        left_out: list[ParamRecord] = []
        for flag, records in unread:
            if not flag.read():
                left_out += records
                bad = "a gradient or an update on the device held NaN or infinity, or was clipped by value"
                self.reason = f"{bad} (told one loss late)"
                # Dropped gradients have no records: GradScaler has told of those.
                self.skip(is_quiet=not records)
        return left_out

    def clear(self) -> None:
        """A new step begins."""
        self.reason, self._flags, self._checks = None, [], []
