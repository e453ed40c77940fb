"""The loss is shown to the tracker before backward; the tracker remembers it and tells whoever listens."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ArgumentError, CheckpointError, LossError
from .tensors import AsyncScalar, is_async

_HISTORY_LENGTH = 65_536
# Means of all losses whose weights grow as these powers of the step: around 1/2, 2/3 and 4/5 of the way.
_POWERS = (0, 1, 3)
# For a loss that falls evenly, the second mean lies 4/9 of the way from the third to the first; half of its fall is recent.
_WHOLE = 8 / 9
# Variance of the second mean's distance to the third, in that of one loss, times the number of steps: ∫(2u − 4u³)² du.
_SPREAD = 44 / 105
# All that live: one backward may pass through the losses of several.
_trackers: weakref.WeakSet[LossTracker] = weakref.WeakSet()


class LossListener(Protocol):
    """Who is told of every loss before its backward pass, and of the scale as it begins: the policy of each optimizer.

    One that trains with other processes has a true `tells_mean`: it calls `record_mean`. What it holds in `waiting` belongs to a
    step that has not come to its end. Its `label` says what it trains.
    """

    tells_mean: bool
    waiting: Collection[Any]
    label: str

    def on_loss(self, tracker: LossTracker) -> None: ...

    def on_backward(self, scale: Tensor) -> None: ...


class LossTrend:
    """How much of a loss' fall is recent, from a few running means; adding a constant to it or scaling it changes nothing.

    Attributes:
        steps: Number of losses so far.
        means: Of all of them, with weights that grow as powers of the step, so that all lengths of run look alike.
        last: The last loss.
        noise: Mean of half the squared difference of neighbours: the variance of one loss, or more.
    """

    def __init__(self) -> None:
        self.steps, self.means, self.last, self.noise = 0, [0.0] * len(_POWERS), 0.0, 0.0

    def add(self, loss: float) -> float:
        """Take the mean loss of one more step.

        Returns:
            Which share of the fall so far is recent, in [0, 1], or could be, as far as the noise allows.
        """
        if self.steps:
            change = loss - self.last
            self.noise += (change * change / 2 - self.noise) / self.steps
        self.steps, self.last = self.steps + 1, loss
        for place, power in enumerate(_POWERS):
            self.means[place] += (loss - self.means[place]) * ((power + 1) / (self.steps + power))
        early, middle, late = self.means
        # Two standard deviations: what could be recent, counts.
        recent, whole = middle - late + 2 * math.sqrt(_SPREAD * self.noise / self.steps), _WHOLE * (early - late)
        return max(recent / whole, 0.0) if recent < whole and whole > 0 else 1.0


class LossTracker:
    """Records each loss before backward; `tracker(loss)` returns the very same object.

    `progress` is what the default rank follows. It looks at whole steps: where several losses make one, with `apply="step"`, at
    their mean, whatever their order and size; and at those that have come to their end, on every device alike.

    `ratio` is what `ByLoss` follows. The running maximum never falls: after a spike, or a loss on another scale (a sum, an
    evaluation), later ratios stay small. Give `max_loss` where that may happen. On the CPU the ratio holds the loss just shown.
    On CUDA reading it would make the host wait for the device, so the ratio there lags exactly one call: the loss is copied to
    pinned memory in the background and read at the next call.

    With a process group (`attach(process_group=...)`) both follow the mean over all processes instead of the losses shown here.
    It comes with the step's own exchange, so the ratio is that of the last step; 1 in the first one.

    Args:
        max_loss: The loss that stands for the full rank, in the loss' own unit; None for the running maximum.

    Attributes:
        progress: Which share of the loss' fall so far is recent, in [0, 1]: 1/2 where it falls evenly, 0 where all of that lies
            behind. 1 as long as the losses' own noise allows no answer, and where they do not fall.
        is_signed: Whether a loss was below zero, so that the ratio says nothing.
        count: Number of losses shown, those before a checkpoint included.
        serial: Number of losses shown to this object; no checkpoint changes it.
        scale: d(total)/d(loss) of the latest loss' backward, a 0-dim tensor: 1, GradScaler's scale, or 1 / accumulation
            steps. None before its backward.
        is_shown: Whether a loss was shown since the tracker was made or loaded.
        has_graph: Whether the latest one can be called `.backward()` on.
        has_begun: Whether its backward has begun.
        begun_serial: The serial of the latest loss whose backward has begun.
        open_backwards: Backwards since the latest loss was shown that have not come to their end, be they under way or
            interrupted by an exception: number of autograd's graph task → number of the loss, None where it was not shown.
        has_gradient: Whether it has brought a gradient to any parameter of any optimizer of this tracker.
        is_old: Whether its graph was made before the loss before it was shown.

    Raises:
        ArgumentError: `max_loss` is not a positive finite number.

    Example:
        >>> tracker = LossTracker()
        >>> tracker(2.0), tracker(1.0), tracker.ratio
        (2.0, 1.0, 0.5)
    """

    def __init__(self, max_loss: float | None = None) -> None:
        is_number = isinstance(max_loss, (int, float)) and not isinstance(max_loss, bool)
        if max_loss is not None and not (is_number and 0 < max_loss < math.inf):
            raise ArgumentError(f"max_loss={max_loss!r}: it must be a positive finite number, or None for the running maximum")
        self._fixed_max = None if max_loss is None else float(max_loss)
        self._running_max: float | None = None
        self._latest: float | None = None
        self._trend, self.progress = LossTrend(), 1.0
        # Of the step under way.
        self._step_sum, self._step_count = 0.0, 0
        self.is_signed = False
        self._history: deque[float] = deque(maxlen=_HISTORY_LENGTH)
        self._in_flight: AsyncScalar | None = None
        # In the order in which they came: where processes train together, each of them asks in the same one.
        self._listeners: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self.scale: Tensor | None = None
        self.count = self.serial = self.begun_serial = self._shown_at = 0
        self.open_backwards: dict[int, int | None] = {}
        self.is_shown = self.has_graph = self.has_begun = self.has_gradient = self.is_old = False
        _trackers.add(self)

    def __call__(self, loss: float | Tensor) -> float | Tensor:
        """Record a loss and return it.

        Args:
            loss: A number, or a tensor with one element, with or without a graph.

        Raises:
            LossError: `loss` has more than one element, is complex, or is no number at all.
        """
        value = _as_scalar(loss)
        # Nodes of autograd's graph are numbered as they are made, by each thread.
        node = loss.grad_fn if isinstance(loss, Tensor) else None
        self.is_old = node is not None and node._sequence_nr() < self._shown_at
        self._shown_at = torch.autograd._get_sequence_nr()
        if self._in_flight is not None:
            self._collect()
        if self._step_count and not any(getattr(listener, "waiting", None) for listener in self._listeners):
            self.end_step()
        if isinstance(value, Tensor) and is_async(value):
            self._in_flight = AsyncScalar(value)
        else:
            self._record(float(value))
        self.count += 1
        self.serial += 1
        try:
            for listener in list(self._listeners):
                listener.on_loss(self)
        finally:
            self.scale, self.is_shown, self.open_backwards = None, True, {}
            self.has_begun = self.has_gradient = False
            self.has_graph = isinstance(loss, Tensor) and loss.requires_grad
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(_make_loss_hook(weakref.ref(self), self.count))
        return loss

    @property
    def value(self) -> float | None:
        """The latest loss that was read, also NaN or infinity; None before the first. One call late on an asynchronous device."""
        return self._history[-1] if self._history else None

    @property
    def is_current(self) -> bool:
        """Whether `value` is the latest loss shown: not where that one is still on its way from an asynchronous device."""
        return self._in_flight is None and bool(self._history)

    @property
    def max_loss(self) -> float | None:
        """The given maximum, or the largest finite loss so far; None before the first."""
        return self._running_max if self._fixed_max is None else self._fixed_max

    @property
    def ratio(self) -> float:
        """Latest finite loss over `max_loss`, in [0, 1]; 1 where that says nothing: before the first, and from one below 0 on."""
        largest = self._fixed_max or self._running_max
        if self._latest is None or self.is_signed or not largest:
            return 1.0
        return min(max(self._latest / largest, 0.0), 1.0)

    @property
    def history(self) -> list[float]:
        """The losses read so far, oldest first, the last 65,536 of them."""
        return list(self._history)

    def recent(self, count: int) -> list[float]:
        """The last `count` losses, latest first; one on its way from the device is waited for."""
        self._collect()
        return [self._history[-1 - index] for index in range(min(count, len(self._history)))]

    def subscribe(self, listener: LossListener) -> None:
        """Call `listener.on_loss(self)` at every loss, as long as the listener lives (held weakly)."""
        self._listeners[listener] = None

    def unsubscribe(self, listener: LossListener) -> None:
        """Stop calling the listener."""
        self._listeners.pop(listener, None)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and a list of them; a loss still on its way from the device is waited for."""
        self._collect()
        trend = self._trend
        return {
            "max_loss": self._fixed_max,
            "running_max": self._running_max,
            "latest": self._latest,
            "is_signed": int(self.is_signed),
            "trend": [trend.steps, *trend.means, trend.last, trend.noise, self.progress, self._step_sum, self._step_count],
            "count": self.count,
            # No tensor, whose size loaders of distributed checkpoints would compare.
            "history": list(self._history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over another tracker's record.

        Raises:
            CheckpointError: an entry is missing, or is not what a tracker holds there; nothing was changed.
        """
        if not isinstance(state, dict):
            raise CheckpointError(f"tracker state is a {type(state).__name__}: was it written by LossTracker.state_dict()?")
        missing = {"max_loss", "running_max", "latest", "count", "history"} - state.keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise CheckpointError(f"tracker state lacks {names}: was it written by LossTracker.state_dict()?")
        for key, value in state.items():
            if not _is_sound(key, value):
                raise CheckpointError(f"tracker state holds {value!r} as its {key!r}")
        self._in_flight, self.open_backwards = None, {}
        self.is_shown = self.has_graph = self.has_begun = self.has_gradient = False
        self._fixed_max, self._running_max, self._latest = state["max_loss"], state["running_max"], state["latest"]
        self.is_signed = bool(state.get("is_signed", self._latest is not None and self._latest < 0))
        trend = self._trend = LossTrend()  # of which earlier versions knew nothing
        trend.steps, *trend.means, trend.last, trend.noise, self.progress, self._step_sum, self._step_count = state.get(
            "trend", [0, *trend.means, 0.0, 0.0, 1.0, 0.0, 0]
        )
        self.count = int(state["count"])
        history = state["history"]
        self._history = deque(history.tolist() if isinstance(history, Tensor) else history, maxlen=_HISTORY_LENGTH)

    def __getstate__(self) -> dict[str, Any]:
        # For copy and pickle: the record, without listeners and graphs.
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        LossTracker.__init__(self)
        self.load_state_dict(state)

    def _collect(self) -> None:
        # Waits for the previous loss only: deterministic, and the device is past it by the time the next one is shown.
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            self._record(in_flight.read())

    def _record(self, value: float) -> None:
        self._history.append(value)
        for listener in self._listeners:
            if getattr(listener, "tells_mean", False):
                return
        self.record_mean(value)

    def record_mean(self, value: float) -> None:
        """Let ratio, maximum and progress follow this loss; those that are not finite are passed over."""
        if math.isfinite(value):
            self._latest, self.is_signed = value, self.is_signed or value < 0
            self._running_max = value if self._running_max is None else max(self._running_max, value)
            self._step_sum, self._step_count = self._step_sum + value, self._step_count + 1

    def end_step(self) -> None:
        """What was recorded since the last step's end belongs to one, which `progress` follows from here on."""
        if self._step_count:
            self.progress = self._trend.add(self._step_sum / self._step_count)
            self._step_sum, self._step_count = 0.0, 0

    def watch_backward(self, number: int | None = None) -> bool:
        """Called inside a backward: it is open until it comes to its end, which no other backward's end may stand for.

        Args:
            number: Of its loss; None where that is not known.

        Returns:
            Whether nothing was known of this backward.
        """
        task = torch._C._current_graph_task_id()
        if task in self.open_backwards:
            self.open_backwards[task] = self.open_backwards[task] or number
            return False
        if task == -1:
            return False
        self.open_backwards[task] = number
        # Runs when the whole backward has come to its end, and not where an exception ends it.
        torch.autograd.Variable._execution_engine.queue_callback(_make_end(weakref.ref(self), task))
        return True

    def _begin_backward(self, scale: Tensor, number: int) -> None:
        self.scale = scale.detach().reshape(())
        for listener in list(self._listeners):
            listener.on_backward(self.scale)
        self.has_begun = True
        self.begun_serial = self.serial
        self.watch_backward(number)


def others_in_backward(own: LossTracker) -> list[str]:
    """The losses of other trackers that the backward under way has passed through, in words; none where it is this one's."""
    task, found = torch._C._current_graph_task_id(), []
    if own.open_backwards.get(task) is not None:
        return []
    for tracker in _trackers:
        number = tracker.open_backwards.get(task)
        if number is not None:
            labels = " and ".join(listener.label for listener in list(tracker._listeners)) or "nothing"
            found.append(f"loss number {number} of another tracker, which trains {labels}")
    return found


def _as_scalar(loss: float | Tensor) -> float | Tensor:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            shape = tuple(loss.shape)
            raise LossError(f"tracker(loss): the loss has shape {shape}; reduce it to one number first, e.g. loss.mean()")
        if loss.is_complex():
            raise LossError(f"tracker(loss): the loss is complex ({loss.dtype}); show a real number, e.g. loss.abs()")
        return loss.detach().reshape(())
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise LossError(f"tracker(loss): {type(loss).__name__} is no number; show the scalar you call .backward() on") from None


def _is_sound(key: str, value: Any) -> bool:
    if key == "history":
        if isinstance(value, list):
            return all(isinstance(loss, float) for loss in value)
        # What earlier versions wrote.
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        return is_dense and value.ndim == 1 and not value.is_complex()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "count":
        return is_number and value >= 0
    if key == "trend":
        return _is_sound_trend(value)
    return is_number or value is None


def _is_sound_trend(value: Any) -> bool:
    are_numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    if not are_numbers or len(value) != len(_POWERS) + 6:
        return False
    steps, *_, noise, progress, _, count = value
    return type(steps) is type(count) is int and min(steps, noise, count) >= 0 and 0 <= progress <= 1


def _make_loss_hook(reference: weakref.ref[LossTracker], number: int) -> Callable[[Tensor], None]:
    def learn_scale(gradient: Tensor) -> None:
        tracker = reference()
        if tracker is not None:
            tracker._begin_backward(gradient, number)

    return learn_scale


def _make_end(reference: weakref.ref[LossTracker], task: int) -> Callable[[], None]:
    def end_backward() -> None:
        tracker = reference()
        if tracker is not None:
            tracker.open_backwards.pop(task, None)

    return end_backward
