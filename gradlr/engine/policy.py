"""What both ways of taking updates have in common: how a loss, a backward and a gradient are received."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .. import tensors
from ..errors import BackwardError, GradlrError, warn
from ..gradient import GradientOperator
from ..params.groups import require_rates
from ..ranks import ByLoss
from ..tracker import LossTracker
from .attached_parameters import AttachedParameters
from .bases import Bases
from .commit import Committer
from .loop_checks import LoopChecks
from .pending import Pending
from .record import ParamRecord
from .skipped_steps import SkippedSteps
from .state_store import StateStore
from .sync import Sync

_AS_IT_IS = nullcontext()


def in_float32(kind: str) -> AbstractContextManager[None]:
    """Where rules compute on such a device: in float32 or wider, whatever autocast and TF32 do for the model.

    Gram matrices in TF32 lose what is below a fiftieth of the largest singular value. Of a gradient of few directions rounding
    errors are left, which the residual would spread over all others.
    """
    is_tf32 = kind in tensors.TF32_DEVICES and tensors.allows_tf32()
    # A context costs more than many an operation.
    return _in_float32(kind) if is_tf32 or torch.is_autocast_enabled(kind) else _AS_IT_IS


@contextmanager
def _in_float32(kind: str) -> Iterator[None]:
    with tensors.without_tf32(), torch.autocast(kind, enabled=False):
        yield


class CommitPolicy:
    """Hears the tracker, receives gradients, and decides when they are committed; a subclass says when.

    Args:
        tracker: Shown each loss; calls `on_loss` and `on_backward`.
        store: State of the parameters.
        committer: Makes and writes updates.
        pending: What waits for `step()`; stays empty where weights change inside backward.
        checks: Tells what is wrong with a loop.
        attached: Tells what has become of the model.
        skipped: Steps left out because something was not finite.
        bases: What one-sided layers project on.
        sync: The other processes.
        take_written: Takes a gradient out of a parameter's `.grad`, where somebody has written one.

    Attributes:
        grad_norm: Global norm of the last step's gradients, 0-dim; None before the first, and where backward updates.
        tells_mean: Whether the tracker hears of the mean loss of several processes from here.
        waiting: What the step under way has brought so far.
        label: What it trains, for messages.
        refuses_written: Whether there is no use for a gradient that somebody has written into `.grad`.
    """

    grad_norm: Tensor | None = None
    refuses_written = False

    def __init__(
        self,
        tracker: LossTracker,
        *,
        store: StateStore,
        committer: Committer,
        pending: Pending,
        checks: LoopChecks,
        attached: AttachedParameters,
        skipped: SkippedSteps,
        bases: Bases,
        sync: Sync,
        take_written: Callable[[ParamRecord], GradientOperator],
    ) -> None:
        self.tracker, self.store, self.committer, self.pending = tracker, store, committer, pending
        self.checks, self.attached, self.skipped, self.bases, self.sync = checks, attached, skipped, bases, sync
        self.label = attached.label
        self._followers = [record for record in store.records if record.rule.has_rank]
        self._reads_ratio = any(isinstance(record.schedule, ByLoss) for record in self._followers)
        self.tells_mean, self.take_written = sync.tells_mean, take_written
        self.waiting: Collection[object] = pending.gradients
        self._bad_loss: str | None = None
        # Number of autograd's graph task whose gradients are to be left out, and why.
        self._bad_backward: tuple[int, str] | None = None

    @torch.no_grad()
    def on_loss(self, tracker: LossTracker) -> None:
        """A loss was shown: tell what went wrong since the last one, then fix the ranks."""
        if self.skipped.unread:
            self.read_skipped()
        require_rates(self.store.groups)
        self.checks.on_loss(pending=len(self.pending.gradients))
        if tracker.open_backwards:
            self.reset()
        self.attached.check()
        if self.refuses_written and (written := [one for one in self.store.records if one.plan.parameter.grad is not None]):
            require_use_for(written, self)
        self._bad_loss = self.sync.on_loss(tracker, self.store)
        if self.sync.ranks_follow == "loss":
            self._follow_loss()

    def read_skipped(self) -> None:
        """Learn which steps the device has left out: the host has counted them."""
        for record in self.skipped.read():
            self.store.uncount(record)

    def _follow_loss(self) -> None:
        if self._reads_ratio and self.tracker.is_signed:
            self._reads_ratio = False
            warn(
                f"loss number {self.tracker.count} or one before it is below zero, where loss over largest loss says nothing: "
                "from here on ByLoss stays at its largest rank. ByProgress, the default, follows any loss"
            )
        # A sketch that waits, or a basis in use, belongs to the rank that it was made with.
        for record in self._followers:
            if record.index not in self.pending.gradients and self.bases.held(record) is None:
                record.follow_loss(self.tracker)

    def on_backward(self, scale: Tensor) -> None:
        """Backward has reached the loss; `scale` is d(total)/d(loss)."""
        self.checks.on_backward(scale)
        # Autograd would add to it, and the hook see the sum.
        if written := [record for record in self.store.records if record.plan.parameter.grad is not None]:
            require_use_for(written, self)
        if self._bad_loss is not None:
            # Everything that this backward brings is left out; where it brings nothing, it was another optimizer's.
            self._bad_backward = torch._C._current_graph_task_id(), self._bad_loss

    def receive(self, record: ParamRecord, gradient: GradientOperator) -> None:
        """Take the gradient of one parameter."""
        try:
            self.checks.on_gradient(record)
            if self._bad_backward is not None:
                self._leave_out_bad_backward()
            kind = gradient.device.type
            with in_float32(kind) if kind in tensors.TF32_DEVICES or torch.is_autocast_enabled(kind) else _AS_IT_IS:
                self._take(record, gradient)
        except GradlrError:
            self.reset()
            raise
        record.last_loss = self.tracker.serial

    def _leave_out_bad_backward(self) -> None:
        if self._bad_backward is not None and self._bad_backward[0] in self.tracker.open_backwards:
            self.skipped.reason, self._bad_backward = self._bad_backward[1], None
            self._on_bad_loss()

    def _on_bad_loss(self) -> None:
        """The loss of the backward under way is not finite; `skipped.reason` says so."""

    def _take(self, record: ParamRecord, gradient: GradientOperator) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """`opt.step()` was called."""
        raise NotImplementedError

    def drop(self) -> None:
        """Drop what waits, as `opt.zero_grad()` does; a step that was to be left out ends here, and counts as skipped."""
        if self.skipped.drop():
            self.bases.forget_all()
        self.pending.clear()

    def drop_of(self, parameters: Container[int]) -> None:
        """Drop what waits for some parameters, as the `zero_grad` of a module that holds them does; by their `id`."""
        records = [record for record in self.store.records if id(record.plan.parameter) in parameters]
        waiting = self.pending.gradients.keys()
        if len(records) == len(self.store.records) or (waiting and waiting <= {record.index for record in records}):
            self.drop()
            return
        for record in records:
            self.pending.drop(record)

    def taken(self, parameters: Sequence[Tensor]) -> list[str]:
        """Names of those whose gradient backward has taken, so that who looks for it in `.grad` finds none.

        None where the norm of what waits is among them.
        """
        if any(parameter is self.pending.norm_proxy.parameter for parameter in parameters):
            return []
        records = [self.store.by_id[id(one)] for one in parameters if id(one) in self.store.by_id and one.grad is None]
        is_applied = self.refuses_written  # in backward; else it waits
        return [
            record.plan.name
            for record in records
            if record.index in self.pending.gradients or (is_applied and record.last_loss == self.tracker.serial)
        ]

    def reset(self) -> None:
        """The error or warning at hand says what happened: the next loss begins afresh."""
        self.skipped.clear()
        self.pending.clear()
        for record in self.store.records:
            record.plan.parameter.grad = None
        self.checks.gradients_dropped()

    def restart(self, skipped: int) -> None:
        """A checkpoint was loaded, with that number of skipped steps: nothing has happened since."""
        self.skipped.count = skipped
        self.skipped.clear()
        self.pending.clear()
        self.bases.forget_all()
        self.checks.forget()
        if self.sync.ranks_follow == "step":
            self.tracker.end_step()  # which others may not hear of from a loss of their own


def require_use_for(written: Sequence[ParamRecord], policy: CommitPolicy) -> None:
    """Raise a BackwardError where gradients that somebody has written into `.grad` cannot be taken."""
    if policy.refuses_written:
        raise _written_error(written)
    if twice := [record for record in written if record.index in policy.pending.gradients]:
        raise _written_twice_error(twice)


def _written_twice_error(twice: Sequence[ParamRecord]) -> BackwardError:
    """Somebody has written gradients into `.grad` of parameters whose own gradients wait."""
    return BackwardError(
        f"{twice[0].plan.name!r} has a gradient that waits since backward, and another one that somebody wrote into .grad "
        f"({len(twice)} parameters in all). In torch the second would have taken the first one's place, or been made of it; here "
        ".grad is None after backward, since what waits is a sketch. Take gradients that you want to change with "
        "torch.autograd.grad(loss, parameters), write them into .grad and call opt.step(); or call opt.zero_grad() before "
        "writing. Both are dropped"
    )


def _written_error(written: Sequence[ParamRecord]) -> BackwardError:
    """Somebody has written gradients into `.grad`, where nothing takes them."""
    plural = "s hold gradients" if len(written) > 1 else " holds a gradient"
    return BackwardError(
        f"{len(written)} parameter{plural} ({written[0].plan.name!r} first) that no backward has left in .grad, since each takes "
        'its own along: somebody wrote it there, and with apply="backward" it would reach no weight, or join an update that is '
        'not its own. Attach with apply="step", where what .grad holds is taken at opt.step() as any other gradient; or drop it '
        "with opt.zero_grad()"
    )
