"""Watches one optimizer between a loss, its backward and its step, and raises where they do not belong together."""

from __future__ import annotations

import warnings

from torch import Tensor

from ..errors import BackwardError, GradlrWarning
from ..tensors import AsyncScalar
from ..tracker import LossTracker
from . import messages as guards

# More micro-batches than anybody accumulates into one step.
_MANY_LOSSES = 256


class BackwardWatch:
    """What has happened since the last loss and the last step.

    Args:
        tracker: The optimizer's tracker.
        count: Number of attached parameters, for messages.
        is_immediate: Whether weights change inside backward, so that a scaled loss is wrong.
        may_be_silent: Whether a backward may bring no gradient, as under FSDP2 with `set_requires_gradient_sync(False)`.

    Attributes:
        changed: Names of the parameters updated since the last loss, or in the step under way.
    """

    def __init__(self, tracker: LossTracker, count: int, *, is_immediate: bool, may_be_silent: bool = False) -> None:
        self._tracker, self._count, self._is_immediate = tracker, count, is_immediate
        self._may_be_silent = may_be_silent
        self._unread_scales: list[AsyncScalar] = []
        self._unread_flags: list[tuple[str, int, AsyncScalar]] = []
        self._has_warned = False
        self._handled: set[int] = set()
        self.changed: list[str] = []
        self._interrupted: tuple[str, ...] = ()
        self._broken: tuple[str, ...] = ()
        self.forget()

    def forget(self) -> None:
        """After a step, or a checkpoint was loaded: nothing has happened since."""
        self._loss_count, self._last_serial = 0, -1
        self._stepped_serial = self._tracker.serial

    @property
    def shown_losses(self) -> int:
        """Number of losses shown since the last step."""
        return self._tracker.serial - self._stepped_serial

    @property
    def is_interrupted(self) -> bool:
        """Whether an exception has ended a backward, and nobody has told or dropped anything since."""
        return not self._handled.issuperset(self._tracker.open_backwards)

    @property
    def interrupted(self) -> tuple[str, ...]:
        """What the last backward or step had updated when an exception ended it; empty where it came to its end."""
        if self._broken:
            return self._broken
        if self._tracker.open_backwards:
            return tuple(self.changed)
        return () if self._tracker.has_begun else self._interrupted

    def gradients_dropped(self) -> None:
        """What the last backward has brought is dropped: it counts for no step, and its interruption is settled."""
        self._discard_interrupted()
        self._handled = set(self._tracker.open_backwards)

    def _failed_number(self) -> int | None:
        return next(number for task, number in self._tracker.open_backwards.items() if task not in self._handled)

    def _discard_interrupted(self) -> None:
        if self._last_serial == self._tracker.begun_serial:
            self._loss_count, self._last_serial = self._loss_count - 1, -1

    def loss_shown(self, *, pending: int) -> None:
        """A new loss: tell what the last backward left unsaid.

        Args:
            pending: Number of parameters whose gradients wait; the caller drops them where the last backward was interrupted.

        Raises:
            BackwardError, NonFiniteError: as `raise_unread`.

        Warns:
            GradlrWarning: the last backward did not end, or reached no attached parameter; or gradients wait for a step() that
                256 losses have not brought.
        """
        self._interrupted, self._broken = self.interrupted, ()
        self.raise_unread()
        last = self._tracker.count - 1
        if self.is_interrupted:
            self._discard_interrupted()
            warnings.warn(guards.interrupted(self._failed_number(), self.changed, pending), GradlrWarning, stacklevel=5)
        elif self._tracker.has_begun and not self._tracker.has_gradient and not self._may_be_silent:
            warnings.warn(str(guards.no_gradient(last, self._count)), GradlrWarning, stacklevel=5)
        elif pending and self._loss_count == _MANY_LOSSES:
            warnings.warn(guards.never_stepped(_MANY_LOSSES), GradlrWarning, stacklevel=5)
        self.changed = []

    def backward_begins(self, scale: Tensor) -> None:
        """Backward has reached the loss; on CUDA the scale is looked at when the next loss is shown.

        Raises:
            BackwardError: the loss is scaled, and weights change inside backward.
        """
        if self._is_immediate and scale.is_cuda:
            self._unread_scales.append(AsyncScalar(scale))
        elif self._is_immediate and scale != 1:
            raise guards.scaled_loss(float(scale), guards.changed_message(self.changed))

    def gradient_arrives(self, name: str, last_loss: int | None) -> None:
        """A hook has fired for a parameter whose last gradient belonged to loss number `last_loss`.

        Raises:
            LossError: no loss was shown.
            BackwardError: the gradient is none of the shown loss', or the second one where weights change at once.
        """
        tracker = self._tracker
        if not tracker.is_shown:
            raise guards.unshown_loss(name)
        # Where gradients wait for step(), backwards may add up as they do in torch.
        if self._is_immediate and tracker.has_graph and not tracker.has_begun:
            raise guards.foreign_backward(name, tracker.count, self.changed)
        if self._is_immediate and last_loss == tracker.serial:
            raise guards.second_gradient(name, tracker.count, self.changed)
        tracker.has_gradient = True
        tracker.watch_backward()
        if self._last_serial != tracker.serial:
            self._loss_count, self._last_serial = self._loss_count + 1, tracker.serial

    def step_begins(self, *, pending: int) -> None:
        """`step()` is called: the backward must have come to its end and brought a gradient.

        Raises:
            BackwardError: a backward was interrupted while gradients wait; the caller drops them.
            AttachError: the backward of a shown loss ran, and no hook fired.

        Warns:
            GradlrWarning: losses without a graph were shown and no hook fired since the last step; several backwards have each
                updated the weights since then; or gradients wait and no loss was shown (each told once or at its step).
        """
        tracker, losses = self._tracker, self._loss_count
        is_missing = not losses and not tracker.has_gradient
        is_unshown = bool(pending) and tracker.serial == self._stepped_serial
        is_blind = tracker.serial != self._stepped_serial and not tracker.has_graph
        self.forget()
        self.changed = []
        if self.is_interrupted and pending:
            raise BackwardError(guards.interrupted(self._failed_number(), (), pending))
        if is_missing and tracker.has_begun:
            raise guards.no_gradient(tracker.count, self._count)
        if is_missing and is_blind:
            warnings.warn(guards.no_gradient_known(self._count), GradlrWarning, stacklevel=5)
        if is_unshown and not self._has_warned:
            self._has_warned = True
            warnings.warn(guards.unshown_losses(tracker.count), GradlrWarning, stacklevel=5)
        if self._is_immediate and losses > 1 and not self._has_warned:
            self._has_warned = True
            warnings.warn(guards.accumulated(losses), GradlrWarning, stacklevel=5)

    def step_broke(self, changed: tuple[str, ...]) -> None:
        """An exception has ended a step; `changed` are the parameters that it had written.

        Warns:
            GradlrWarning: there are some, and others were not written.
        """
        self._broken = changed
        if changed:
            warnings.warn(guards.half_step(changed, self._count), GradlrWarning, stacklevel=4)

    def require_finite(self, name: str, is_finite: Tensor) -> None:
        """Raise now where the flag can be read without waiting, at the next loss where it lies on a CUDA device.

        Raises:
            NonFiniteError: the flag is False.
        """
        if is_finite.is_cuda:
            self._unread_flags.append((name, self._tracker.count, AsyncScalar(is_finite)))
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
