"""GradLR: the optimizer behind `attach`. It owns the captures, hears the tracker, and says what belongs together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .capture.adaptor import AdaptorCapture
from .capture.hook import HookCapture, ParameterLock
from .capture.layer_swap import CapturedLayer, LayerCapture
from .capture.select import captured_layers, operator_of
from .distributed import Communicator, Shards, propagate_errors, state_fingerprint
from .engine import messages as guards
from .engine.apply_update import full_precision
from .engine.attached_parameters import AttachedParameters
from .engine.commit import Updates
from .engine.grad_norm import GradClipper
from .engine.record import ParameterGroup, compute_dtype_and_device, follow_loss
from .engine.state_dict import extra_of
from .errors import ArgumentError, AttachError, GradlrError, GradlrWarning, ParallelError
from .gradient import GradientOperator
from .report.summary import describe
from .tracker import LossTracker


class GradLR(Updates):
    """A `torch.optim.Optimizer` whose parameters are updated by hooks in backward, or by `step()` from sketches.

    Made by `gradlr.attach`, which documents the arguments. `param_groups` hold lr, beta and weight_decay, which any scheduler
    may change; everything else is fixed. With `apply="step"`, the last group holds one parameter more, whose `.grad` is the
    global norm of what waits: there `GradScaler` and `clip_grad_norm_` over these parameters find it. Held weakly by its hooks:
    keep it in a variable as long as you train.

    Attributes:
        tracker: The tracker that shows it the losses.
        apply: "backward" or "step".
        seed: Seed of all random numbers, with each parameter's index and step count.
        limit: The largest norm of a step's gradients, and growth of that norm; may be changed between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParameterGroup],
        tracker: LossTracker,
        *,
        apply: str,
        seed: int,
        capture: str,
        limit: GradClipper,
        state_dtype: torch.dtype,
        replicas: Communicator | None = None,
        shards: Shards | None = None,
    ) -> None:
        is_immediate = apply == "backward"
        how = {"is_immediate": is_immediate, "limit": limit, "replicas": replicas, "shards": shards}
        super().__init__(groups, tracker, seed=seed, state_dtype=state_dtype, **how)
        self.apply = apply
        self._dropped_serial: int | None = None
        self._bad_backward: tuple[int, str] | None = None
        self._bad_loss: str | None = None
        layers = captured_layers(model, self.records, capture, is_immediate=is_immediate)
        self._membership = AttachedParameters(model, [record.plan for record in self.records], is_alone=self.comm is None)
        self._capture, self._adaptors = self._captured(layers)
        self._is_detached = False
        tracker.subscribe(self)

    def _captured(self, layers: list[CapturedLayer]) -> tuple[ParameterLock, LayerCapture]:
        named = [(record.plan.name, record.plan.parameter) for record in self.records]
        return HookCapture(named, self._take), AdaptorCapture(layers, self)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients, unscaled, before `max_grad_norm` and after `clip_grad_norm_`.

        None before the first step, and where backward updates. Exact where one backward made the step, that of the sketches where
        several did. Layers that "adaptor" captures are exact only under a limit, and where that backward used them once; with
        "one_sided" never.
        """
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def skipped(self) -> int:
        """Number of steps left out whole because a loss, a gradient or a norm was not finite. On CUDA known one loss late, and
        with `apply="backward"` not counted there: each gradient is a NonFiniteError of its own."""
        return self._skips.count

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Names of the parameters that the last backward or step has updated, where it did not come to its end; else empty."""
        return self._watch.interrupted

    @torch.no_grad()
    def before_backward(self, tracker: LossTracker) -> None:
        """Called by the tracker at each loss: tell what went wrong since the last one, then fix the ranks."""
        self._skips.read()
        self._watch.loss_shown(pending=len(self._waiting()))
        if tracker.open_backwards:
            self._give_up()
        self._membership.check()
        if self._shards is not None:
            self._bad_loss = self._hear_losses()
        for record in self._records.values():
            # A sketch that waits, or a basis in use, belongs to the rank that it was made with.
            # Processes that train together set it in step(), from what they all know.
            is_free = record.pending is None and record.basis is None and self._replicas is None
            if is_free and not record.rule.is_elementwise:
                follow_loss(record, tracker.ratio, self.state[record.plan.parameter])

    def begin_backward(self, scale: Tensor) -> None:
        """Called by the tracker as backward reaches the loss; `scale` is d(total)/d(loss)."""
        self._watch.backward_begins(scale)
        reason = self._bad_loss
        if self._shards is None and self.tracker.is_current and not math.isfinite(self.tracker.value):
            reason = guards.bad_loss(self.tracker.count, self.tracker.value)
        if reason is not None:
            # Everything that this backward brings is left out; where it brings nothing, it was another optimizer's.
            self._bad_backward = torch._C._current_graph_task_id(), reason

    def _look_at_loss(self) -> None:
        if self._bad_backward is None or self._bad_backward[0] not in self.tracker.open_backwards:
            return
        self._skips.reason, self._bad_backward = self._bad_backward[1], None
        if self.apply == "backward":
            self._dropped_serial = self.tracker.serial
            self._skips.skip(is_quiet=False)

    def _take(self, parameter: Tensor, gradient: Tensor) -> None:
        plan = self._records[id(parameter)].plan
        operator = operator_of(plan, gradient)
        if operator is None:
            raise guards.unsupported_gradient(plan.name, gradient.layout, gradient.dtype, self._watch.changed)
        self.receive(parameter, operator)

    @torch.no_grad()
    def receive(self, parameter: Tensor, gradient: GradientOperator) -> None:
        """Take the gradient of one parameter: update at once (`apply="backward"`) or keep its sketch (`apply="step"`).

        Args:
            parameter: One of the attached parameters.
            gradient: An operator of the shape of the parameter's view; it may be consumed.

        Raises:
            ArgumentError: the parameter is not attached.
            LossError: the tracker was never shown a loss.
            BackwardError: a second gradient for one loss, with `apply="backward"`.
            NonFiniteError: NaN or infinity, with `apply="backward"` and a finite loss. On CUDA told at the next loss; the
                parameter keeps value and state, its count aside.
        """
        record = self._records.get(id(parameter))
        if record is None:
            raise ArgumentError(f"receive: a parameter of shape {tuple(parameter.shape)} is not attached to this optimizer")
        try:
            self._watch.gradient_arrives(record.plan.name, record.last_loss)
            self._look_at_loss()
            with full_precision(gradient.device):
                if self.apply == "step":
                    self._accumulate(record, gradient)
                elif self._dropped_serial != self.tracker.serial:
                    self._update(record, gradient)
                else:
                    record.basis = None
        except GradlrError:
            self._give_up()
            raise
        record.last_loss = self.tracker.serial

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Write what is pending (`apply="step"`); with `apply="backward"` there is nothing left to do.

        A step is taken whole or not at all: where a loss, a gradient or an update is not finite, nothing changes, what was
        pending is dropped, and `skipped` counts.

        Args:
            closure: Re-evaluates the model, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            AttachError: a loss was shown and backward ran, but no parameter's hook fired; or the optimizer is detached.
            BackwardError: the last backward was interrupted; what was pending is dropped.

        Warns:
            GradlrWarning: the step was left out. Not with GradScaler, which expects that and does not call `step` then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._is_detached:
            raise AttachError("opt.step() was called after opt.detach(): nothing is trained any more. Attach again")
        try:
            self._begin_step()
            if self.apply == "step":
                with full_precision(self._gauge.parameter.device):
                    self._take_step()
            if self._replicas is not None:
                self._follow_group()
        except BaseException:  # out of memory, Ctrl-C: nothing of this step may join the next one
            changed = tuple(self._watch.changed)
            self._give_up()
            self._watch.step_broke(changed)
            raise
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is pending, as every optimizer drops its gradients; `.grad` is None already.

        Where a gradient was not finite, the step that this ends counts as skipped: so it is after `GradScaler.step`.
        """
        if self._skips.reason:
            self._skips.skip(is_quiet=True)
            self._forget_bases()
        self._drop_waiting()
        for record in self._records.values():
            record.plan.parameter.grad = None
        if self.apply == "step":
            self._watch.gradients_dropped()

    def detach(self) -> None:
        """Remove all hooks: the parameters are ordinary ones again, the state stays. Calling it again does nothing.

        Warns:
            GradlrWarning: gradients wait for `step()`; they are dropped.
        """
        if waiting := self._waiting():
            warnings.warn(guards.detached_early(len(waiting)), GradlrWarning, stacklevel=2)
        self._drop_waiting()
        self._capture.remove()
        self._adaptors.remove()
        self.tracker.unsubscribe(self)
        self._is_detached = True

    def __enter__(self) -> GradLR:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._drop_waiting()
        self.detach()

    def __repr__(self) -> str:
        if not self._is_built:
            return object.__repr__(self)
        processes = self.processes if self.processes > 1 else None
        options = {"apply": self.apply, "processes": processes, "max_grad_norm": self.limit.max_norm}
        return describe(self.records, self.param_groups, self.state, **options)

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout plus "gradlr": ranks, seed and the tracker. Plain tensors and numbers: loads with `weights_only=True`.

        Raises:
            CheckpointError: gradients are pending; call `step()` or `zero_grad()` first.
            NonFiniteError, BackwardError: on CUDA, what the last backward has left to tell.
        """
        if waiting := self._waiting():
            raise guards.unfinished_step([record.plan.name for record in waiting])
        self._skips.read()
        self._watch.raise_unread()
        last = None if self.limit.last is None else float(self.limit.last)
        return self._saved({"skipped": self.skipped, "last_norm": last})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; momentum rank and rank may differ from the saved ones. State keeps its own dtype.

        With a process group, every process loads the same one at the same time.

        Raises:
            CheckpointError: parameters, kinds or shapes differ; nothing was changed.
            ParallelError: the processes have loaded different ones, or one has failed to load; what was there is put back.
        """
        before = self._remembered()
        with propagate_errors(self.comm):
            self._load(state_dict)
        if self.comm is None:
            return
        options = {"seed": self.seed, "ratio": self.tracker.ratio, "max_loss": self.tracker.max_loss}
        try:
            self.comm.assert_same_on_all_ranks(state_fingerprint(self.records, self.state, self.param_groups, options))
        except ParallelError:
            self._put_back(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._restore(state_dict)
        extra = extra_of(state_dict)
        last = extra.get("last_norm")
        self.limit.last = None if last is None else torch.tensor(last, **compute_dtype_and_device(self._gauge.parameter))
        self._skips.count = extra.get("skipped", 0)
        self._gauge.clear()
        self._skips.clear()
        self._watch.forget()

    def _give_up(self) -> None:
        # The error or warning at hand says what happened; the next loss begins afresh.
        self._skips.clear()
        self.zero_grad()
        self._watch.gradients_dropped()
