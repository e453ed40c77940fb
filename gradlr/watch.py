"""Watches one optimizer between a loss, its backward and its step, and raises where they do not belong together."""

from __future__ import annotations

import warnings

from torch import Tensor

from . import guards
from .deferred import Deferred
from .errors import GradlrWarning
from .tracker import LossTracker


class BackwardWatch:
    """What has happened since the last loss and the last step.

    Args:
        tracker: The optimizer's tracker.
        count: Number of attached parameters, for messages.
        is_immediate: Whether weights change inside backward, so that a scaled loss is wrong.

    Attributes:
        changed: Names of the parameters updated since the last loss, or in the step under way.
    """

    def __init__(self, tracker: LossTracker, count: int, *, is_immediate: bool) -> None:
        self._tracker, self._count, self._is_immediate = tracker, count, is_immediate
        self._unread_scales: list[Deferred] = []
        self._unread_flags: list[tuple[str, int, Deferred]] = []
        self.changed: list[str] = []
        self.forget()

    def forget(self) -> None:
        """After a checkpoint was loaded: nothing has happened yet."""
        self._has_arrivals = self._is_awaiting = False
        self._stepped_count = self._tracker.count

    def loss_shown(self) -> None:
        """A new loss: tell what the last backward left unsaid (raises what `raise_unread` raises)."""
        self.raise_unread()
        self.changed = []
        if self._is_awaiting:
            # No error: the last backward may have ended in an exception that the user has handled.
            self._is_awaiting = False
            warnings.warn(str(guards.no_gradient(self._tracker.count, self._count)), GradlrWarning, stacklevel=5)

    def backward_begins(self, scale: Tensor) -> None:
        """Backward has reached the loss; on CUDA the scale is looked at when the next loss is shown.

        Raises:
            BackwardError: the loss is scaled, and weights change inside backward.
        """
        self._is_awaiting = True
        if self._is_immediate and scale.is_cuda:
            self._unread_scales.append(Deferred(scale))
        elif self._is_immediate and scale != 1:
            self._is_awaiting = False
            raise guards.scaled_loss(float(scale), is_changed=False)

    def gradient_arrives(self) -> None:
        """A hook has fired."""
        self._is_awaiting, self._has_arrivals = False, True

    def step_begins(self) -> None:
        """`step()` is called: a gradient must have arrived if a backward ran.

        Raises:
            AttachError: a loss was shown and backward ran, as far as can be known, and no hook fired.
        """
        is_blind = self._tracker.count != self._stepped_count and not self._tracker.has_graph
        is_missing = not self._has_arrivals and (self._is_awaiting or is_blind)
        self.forget()
        self.changed = []
        if is_missing:
            raise guards.no_gradient(self._tracker.count, self._count)

    def require_finite(self, name: str, is_finite: Tensor) -> None:
        """Raise now where the flag can be read without waiting, at the next loss where it lies on a CUDA device.

        Raises:
            NonFiniteError: the flag is False.
        """
        if is_finite.is_cuda:
            self._unread_flags.append((name, self._tracker.count, Deferred(is_finite)))
        elif not is_finite:
            raise guards.non_finite(name, self._tracker.count, self._tracker.value, self.changed)

    def raise_unread(self) -> None:
        """Read what was sent from the device during the last backward.

        Raises:
            BackwardError: the loss was scaled, with updates in backward.
            NonFiniteError: a gradient was not finite.
        """
        scales, self._unread_scales = self._unread_scales, []
        flags, self._unread_flags = self._unread_flags, []
        for scale in scales:
            if scale.read() != 1:
                raise guards.scaled_loss(scale.read(), is_changed=True)
        for name, count, is_finite in flags:
            if not is_finite.read():
                raise guards.non_finite_before(name, count)
