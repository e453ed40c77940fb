"""Watches one optimizer between a loss, its backward and its step, and raises where they do not belong together."""

from __future__ import annotations

import warnings

from torch import Tensor

from . import guards
from .deferred import Deferred
from .errors import BackwardError, GradlrWarning
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
        self._has_warned = False
        self.changed: list[str] = []
        self.forget()

    def forget(self) -> None:
        """After a step, or a checkpoint was loaded: nothing has happened since."""
        self._losses: set[int] = set()
        self._stepped_count = self._tracker.count

    def loss_shown(self, *, pending: int) -> None:
        """A new loss: tell what the last backward left unsaid.

        Args:
            pending: Number of parameters whose gradients wait; the caller drops them where the last backward was interrupted.

        Raises:
            BackwardError, NonFiniteError: as `raise_unread`.

        Warns:
            GradlrWarning: the last backward did not end, or reached no attached parameter.
        """
        self.raise_unread()
        last = self._tracker.count - 1
        if self._tracker.is_open:
            warnings.warn(guards.interrupted(last, self.changed, pending), GradlrWarning, stacklevel=5)
        elif self._tracker.has_begun and not self._tracker.has_gradient:
            warnings.warn(str(guards.no_gradient(last, self._count)), GradlrWarning, stacklevel=5)
        self.changed = []

    def backward_begins(self, scale: Tensor) -> None:
        """Backward has reached the loss; on CUDA the scale is looked at when the next loss is shown.

        Raises:
            BackwardError: the loss is scaled, and weights change inside backward.
        """
        if self._is_immediate and scale.is_cuda:
            self._unread_scales.append(Deferred(scale))
        elif self._is_immediate and scale != 1:
            raise guards.scaled_loss(float(scale), guards.tale_of(self.changed))

    def gradient_arrives(self, name: str, last_loss: int | None) -> None:
        """A hook has fired for a parameter whose last gradient belonged to loss number `last_loss`.

        Raises:
            LossError: no loss was shown.
            BackwardError: the gradient is none of the shown loss', or the second one where weights change at once.
        """
        tracker = self._tracker
        if not tracker.is_shown:
            raise guards.unshown_loss(name)
        if tracker.has_graph and not tracker.has_begun:
            raise guards.foreign_backward(name, tracker.count, self.changed)
        if self._is_immediate and last_loss == tracker.count:
            raise guards.second_gradient(name, tracker.count, self.changed)
        tracker.has_gradient = True
        self._losses.add(tracker.count)

    def gradients_dropped(self) -> None:
        """What the current loss has brought is dropped: it counts for no step."""
        self._losses.discard(self._tracker.count)

    def step_begins(self, *, pending: int) -> None:
        """`step()` is called: the backward must have come to its end and brought a gradient.

        Raises:
            BackwardError: the last backward was interrupted while gradients wait; the caller drops them.
            AttachError: a loss was shown and backward ran, as far as can be known, and no hook fired.

        Warns:
            GradlrWarning: several backwards have each updated the weights since the last step (once).
        """
        tracker, losses = self._tracker, len(self._losses)
        is_blind = tracker.count != self._stepped_count and not tracker.has_graph
        is_missing = not losses and not tracker.has_gradient and (tracker.has_begun or is_blind)
        self.forget()
        self.changed = []
        if tracker.is_open and pending:
            raise BackwardError(guards.interrupted(tracker.count, (), pending))
        if is_missing:
            raise guards.no_gradient(tracker.count, self._count)
        if self._is_immediate and losses > 1 and not self._has_warned:
            self._has_warned = True
            warnings.warn(guards.accumulated(losses), GradlrWarning, stacklevel=5)

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
                raise guards.scaled_loss(scale.read(), "The update has been applied")
        for name, count, is_finite in flags:
            if not is_finite.read():
                raise guards.non_finite_before(name, count)
