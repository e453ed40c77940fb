"""Watches one training loop between a loss, its backward and its step, and tells once where they do not belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AttachError, BackwardError, LossError, NonFiniteError, warn
from ..tensors import AsyncScalar, is_async
from ..tracker import LossTracker, others_in_backward
from .record import ParamRecord

# More micro-batches than anybody accumulates into one step.
_MANY_LOSSES = 256
# Not everywhere, as it is not public: where it is missing, nothing is told.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)
_graph_task = torch._C._current_graph_task_id
_SKIP_ADVICE = "Skip batches whose loss is not finite before backward, lower lr, or look for an overflow in the forward pass"


class LoopChecks:
    """What has happened since the last loss and the last step.

    Args:
        tracker: The optimizer's tracker.
        changed: Names of the parameters updated since the last loss, or in the step under way; emptied here, in place.
        count: Number of attached parameters, for messages.
        is_immediate: Whether weights change inside backward, so that a scaled loss is wrong.
        may_be_silent: Whether a backward may bring no gradient, as under FSDP2 with `set_requires_gradient_sync(False)`.
    """

    def __init__(
        self, tracker: LossTracker, changed: list[str], count: int, *, is_immediate: bool, may_be_silent: bool = False
    ) -> None:
        self._tracker, self.changed, self._count = tracker, changed, count
        self._is_immediate, self._may_be_silent = is_immediate, may_be_silent
        self._unread_scales: list[AsyncScalar] = []
        self._late = LateChecks()
        self._told: set[str] = set()
        # Backwards of other trackers' losses that have brought gradients which wait: numbers of autograd's graph tasks.
        self._of_others: dict[int, str] = {}
        # Backwards that an exception has ended, and that were told of or dropped since: numbers of autograd's graph tasks.
        self._settled: set[int] = set()
        self._interrupted: tuple[str, ...] = ()
        self._broken: tuple[str, ...] = ()
        self.forget()

    def forget(self) -> None:
        """After a step, or a checkpoint was loaded: nothing has happened since."""
        self._loss_count, self._last_serial = 0, -1
        self._stepped_serial = self._tracker.serial
        self._of_others = {}

    @property
    def shown_losses(self) -> int:
        """Number of losses shown since the last step."""
        return self._tracker.serial - self._stepped_serial

    @property
    def interrupted(self) -> tuple[str, ...]:
        """What the last backward or step had updated when an exception ended it; empty where it came to its end."""
        if self._broken:
            return self._broken
        if self._tracker.open_backwards:
            return tuple(self.changed)
        return () if self._tracker.has_begun else self._interrupted

    def on_loss(self, *, pending: int) -> None:
        """A new loss: tell what the last backward left unsaid.

        Args:
            pending: Number of parameters whose gradients wait; the caller drops them where the last backward was interrupted.

        Raises:
            BackwardError, NonFiniteError: as `raise_unread`.

        Warns:
            GradlrWarning: the last backward did not end, or reached no attached parameter; its updates came after this loss was
                computed; or gradients wait for a step() that 256 losses have not brought.
        """
        tracker = self._tracker
        self._interrupted, self._broken = self.interrupted, ()
        if self._unread_scales or self._late:
            self.raise_unread()
        if tracker.open_backwards and self._is_interrupted():
            self._discard_interrupted()
            warn(self._interrupted_message(self.changed, pending))
        elif tracker.has_begun and not tracker.has_gradient and not self._may_be_silent:
            warn(self._no_gradient_message(tracker.count - 1))
        elif pending and self._loss_count == _MANY_LOSSES:
            warn(
                f'the gradients of {_MANY_LOSSES} losses wait and no weight has changed: with apply="step", call opt.step() '
                "after backward"
            )
        if self._is_immediate and tracker.is_old and self.changed:
            self.warn_once("graph", _old_graph_message(tracker.count, self.changed))
        self.changed.clear()

    def on_backward(self, scale: Tensor) -> None:
        """Backward has reached the loss; `scale` is d(total)/d(loss).

        Raises:
            BackwardError: the loss is scaled, and weights change inside backward. Where the device runs behind the host, at the
                next loss.
        """
        if not self._is_immediate:
            self._of_others.pop(_graph_task(), None)  # it is ours as well
            return
        if is_async(scale):
            self._unread_scales.append(AsyncScalar(scale))
        elif scale != 1:
            raise _scaled_loss(float(scale), changed_message(self.changed))

    def on_gradient(self, record: ParamRecord) -> None:
        """A gradient of a parameter has arrived.

        Raises:
            LossError: no loss was shown.
            BackwardError: the gradient is none of the shown loss', or the second one where weights change at once.

        Warns:
            GradlrWarning: the graph is kept for another backward, and weights change in this one.
        """
        tracker, name = self._tracker, record.plan.name
        if not tracker.is_shown:
            raise _not_shown_error(name, others_in_backward(tracker))
        # Where gradients wait for step(), backwards may add up as they do in torch.
        if self._is_immediate and tracker.has_graph and not tracker.has_begun:
            raise _wrong_backward(
                tracker, name, self.changed,
                f"a gradient of {name!r} arrived from a backward that does not pass through loss number {tracker.count}, the "
                "last one shown, or reaches it later. Show the tracker the scalar that you call backward on (the sum, where a "
                "loss has several terms); models that train against each other need a tracker each",
            )  # fmt: skip
        if self._is_immediate and record.last_loss == tracker.serial:
            raise _wrong_backward(
                tracker, name, self.changed,
                f"a second gradient of {name!r} arrived for loss number {tracker.count}, and its first has been applied. To "
                'accumulate gradients, or where backward reaches a weight twice, attach with apply="step" and call opt.step(); '
                "otherwise show every loss to the tracker before its backward: tracker(loss).backward()",
            )  # fmt: skip
        if self._is_immediate and not tracker.has_gradient and _graph_task() != -1 and _keeps_graph():
            self.warn_once("graph", _kept_graph_message(tracker.count))
        tracker.has_gradient = True
        if tracker.watch_backward() and (others := others_in_backward(tracker)):
            if self._is_immediate:
                raise _wrong_backward(tracker, name, self.changed)
            self._of_others[_graph_task()] = " and ".join(others)
        if self._last_serial != tracker.serial:
            self._loss_count, self._last_serial = self._loss_count + 1, tracker.serial

    def not_finite(self, record: ParamRecord) -> NonFiniteError:
        """A gradient, or what a rule made of it, is not finite, and the host knows before anything is written."""
        return NonFiniteError(f"{self.bad_gradient_message(record)}. {changed_message(self.changed)}. {_SKIP_ADVICE}")

    def read_later(self, record: ParamRecord, check: Tensor) -> None:
        """Read at the next loss whether a 0-dim number is finite: its device runs behind the host."""
        self._late.add(record.plan.name, self._tracker.count, check)
        # After the last parameter, so that the copy is under way before the next forward pass.
        if len(self._late) == self._count:
            self._late.send()

    def bad_gradient_message(self, record: ParamRecord) -> str:
        """Why a step is left out: a gradient, or what a rule made of it."""
        return (
            f"the gradient of {record.plan.name!r} holds NaN or infinity, or is too large for its update to be finite, at loss "
            f"number {self._tracker.count} (loss {self._tracker.value})"
        )

    def on_step(self, *, pending: int) -> None:
        """`step()` is called: the backward must have come to its end and brought a gradient.

        Raises:
            BackwardError: a backward was interrupted while gradients wait; the caller drops them.
            AttachError: the backward of a shown loss ran, and no hook fired.

        Warns:
            GradlrWarning: losses were shown and no backward has begun since the last step; several backwards have each
                updated the weights since then; or gradients wait that are of no shown loss (each told once or at its step).
        """
        tracker, losses, stepped, others = self._tracker, self._loss_count, self._stepped_serial, self._of_others
        self.forget()
        self.changed.clear()
        if pending and self._is_interrupted():
            raise BackwardError(self._interrupted_message((), pending))
        if not losses and not tracker.has_gradient:
            self._require_gradient(has_losses=tracker.serial != stepped)
        if pending and others:
            self.warn_once("others", _of_others_message(list(others.values())))
        elif pending and tracker.serial == stepped:
            self.warn_once(
                "not shown",
                f"opt.step() writes gradients of a loss that the tracker was not shown; the last one it saw was number "
                f"{tracker.count}, so the rank follows that. Write tracker(loss).backward() for every loss",
            )
        if self._is_immediate and losses > 1:
            self.warn_once(
                "several",
                f"{losses} backward passes have each updated the weights since the last opt.step(). If they were meant to "
                'accumulate into one step, attach with apply="step"',
            )

    def _require_gradient(self, *, has_losses: bool) -> None:
        if self._tracker.has_begun:
            raise AttachError(self._no_gradient_message(self._tracker.count))
        if has_losses:
            warn(
                f"opt.step() has nothing to do: since the last step, none of the {self._count} attached parameters received a "
                "gradient, though losses were shown. Was backward called, on a loss of this very model (not a copy)?"
            )

    def gradients_dropped(self) -> None:
        """What the last backward has brought is dropped: it counts for no step, and its interruption is settled."""
        self._discard_interrupted()
        self._of_others = {}
        self._settled = set(self._tracker.open_backwards)

    def step_broke(self, changed: Sequence[str]) -> None:
        """An exception has ended a step; `changed` are the parameters that it had written.

        Warns:
            GradlrWarning: there are some, and others were not written.
        """
        self._broken = tuple(changed)
        if changed:
            warn(
                f"opt.step() did not come to its end: {len(changed)} of {self._count} parameters were updated ({changed[0]!r} "
                "first), the others were not, and what waited for them is dropped. Load the last checkpoint, or go on with a "
                "step half taken"
            )

    def raise_unread(self) -> None:
        """Read what was sent from the device during the last backward.

        Raises:
            BackwardError: the loss was scaled, with updates in backward.
            NonFiniteError: a gradient was not finite.
        """
        scales, self._unread_scales = self._unread_scales, []
        bad = self._late.read()
        for scale in scales:
            if scale.read() != 1:
                raise _scaled_loss(scale.read(), "The update has been applied")
        if bad is not None:
            name, count = bad
            raise NonFiniteError(
                f"the gradient of {name!r} held NaN or infinity, or was too large for its update to be finite, at loss "
                f"number {count}. Told one loss late, as always where the device runs behind the host: this parameter kept "
                f"its value, those of that step with finite gradients were updated. {_SKIP_ADVICE}"
            )

    def _is_interrupted(self) -> bool:
        return not self._settled.issuperset(self._tracker.open_backwards)

    def _discard_interrupted(self) -> None:
        if self._last_serial == self._tracker.begun_serial:
            self._loss_count, self._last_serial = self._loss_count - 1, -1

    def _interrupted_message(self, changed: Sequence[str], dropped: int) -> str:
        number = next(number for task, number in self._tracker.open_backwards.items() if task not in self._settled)
        loss = "a loss that was not shown" if number is None else f"loss number {number}"
        waited = f"The gradients that waited for step() ({dropped} parameters) are dropped"
        what = waited if dropped else changed_message(changed)
        return f"the backward of {loss} did not come to its end (an exception in a layer?). {what}"

    def _no_gradient_message(self, loss_number: int) -> str:
        return (
            f"a backward pass ran for loss number {loss_number}, and none of the {self._count} attached parameters received a "
            "gradient. Was the loss computed with this very model (not a copy), outside torch.no_grad() and without detach()?"
        )

    def warn_once(self, kind: str, message: str) -> None:
        """Warn of one kind of trouble, once."""
        if kind not in self._told:
            self._told.add(kind)
            warn(message)


class LateChecks:
    """Numbers on a device that must be finite, each with the parameter and the loss that it belongs to; copied together."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, int, Tensor]] = []
        self._sent: list[tuple[list[tuple[str, int]], AsyncScalar]] = []

    def __len__(self) -> int:
        return len(self._waiting) + sum(len(names) for names, _ in self._sent)

    def add(self, name: str, count: int, check: Tensor) -> None:
        """A check of this parameter, at this loss."""
        self._waiting.append((name, count, check))

    def send(self) -> None:
        """Start to copy what waits to the host: one copy for each device."""
        by_device: dict[torch.device, list[tuple[str, int, Tensor]]] = {}
        for one in self._waiting:
            by_device.setdefault(one[2].device, []).append(one)
        for known in by_device.values():
            numbers = torch.stack([check.float() for _, _, check in known])
            self._sent.append(([(name, count) for name, count, _ in known], AsyncScalar(numbers)))
        self._waiting = []

    def read(self) -> tuple[str, int] | None:
        """The first parameter whose number is not finite, and its loss; None where all are. Waits, and forgets all."""
        self.send()
        sent, self._sent = self._sent, []
        for names, numbers in sent:
            for name, number in zip(names, numbers.read_all(), strict=True):
                if not math.isfinite(number):
                    return name
        return None


def changed_message(changed: Sequence[str]) -> str:
    """What has happened to the weights: `changed` are the parameters that this backward or step has updated already."""
    if not changed:
        return "Nothing was changed"
    plural = "s were" if len(changed) > 1 else " was"
    return f"{len(changed)} parameter{plural} updated before it ({changed[0]!r} first), the others were not"


def _not_shown_error(name: str, others: Sequence[str]) -> LossError:
    what = "show it to the tracker of this model as well" if others else "write tracker(loss).backward()"
    whose = f" in the backward of {others[0]}" if others else ""
    return LossError(
        f"a gradient of {name!r} arrived{whose}, but the tracker was never shown a loss, or not since a checkpoint was loaded: "
        f"{what}, with the tracker that attach was given. In a trainer, which calls backward itself, use "
        "gradlr.integrations.transformers.Trainer, alone or in front of TRL's and others' (class T(Trainer, SFTTrainer)), or "
        "ShowLosses() of gradlr.integrations.lightning. Nothing was changed"
    )


# Raised by autograd's C++, where nothing can be added to it: it is told before.
_TORCHS_ERROR = 'torch\'s "one of the variables needed for gradient computation has been modified by an inplace operation"'
_NOT_MEANT = (
    "If it is to train this model too, show the loss to both trackers; if not, keep it out: model.requires_grad_(False) around "
    "that loss' forward and backward"
)


def _wrong_backward(tracker: LossTracker, name: str, changed: Sequence[str], what: str = "") -> BackwardError:
    """A gradient that may not change its weight: that of another tracker's loss, where the backward is its, or else as said."""
    if others := others_in_backward(tracker):
        what = (
            f"a gradient of {name!r} arrived in the backward of {' and '.join(others)}; the tracker of this model was not shown "
            f'that loss. {_NOT_MEANT}; or attach with apply="step", where it waits until zero_grad() drops it, as in torch'
        )
    return BackwardError(f"{what}. {changed_message(changed)}")


def _of_others_message(others: Sequence[str]) -> str:
    return (
        f"opt.step() writes gradients that came in the backward of {' and '.join(others)}; the tracker of this model was not "
        f"shown that loss. {_NOT_MEANT}, or call opt.zero_grad() (or the model's) before this model's own backward"
    )


def _kept_graph_message(number: int) -> str:
    return (
        f'the backward of loss number {number} keeps its graph (retain_graph=True, create_graph=True), but with apply="backward" '
        f"it changes the weights that another backward through this graph needs: that one ends with {_TORCHS_ERROR}. For several "
        'losses of one forward call backward once, on their sum, or attach with apply="step"'
    )


def _old_graph_message(number: int, changed: Sequence[str]) -> str:
    return (
        f"loss number {number} was computed before the backward of the loss before it has updated {len(changed)} parameters "
        f"({changed[0]!r} first). If it needs one of them, its backward ends with {_TORCHS_ERROR}. Compute each loss after the "
        'backward of the one before, call backward once, on their sum, or attach with apply="step"'
    )


def _scaled_loss(scale: float, what: str) -> BackwardError:
    return BackwardError(
        f"the loss shown to the tracker enters this backward multiplied by {scale:g}. An update inside backward would be wrong. "
        'For a GradScaler, or a division by accumulation steps, attach with apply="step" and call opt.step(); otherwise show the '
        f"tracker the very scalar that you call backward on. {what}"
    )
