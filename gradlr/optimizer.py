"""GradLR: the optimizer behind `attach`, a facade over the parts of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .capture.adaptor import AdaptorCapture
from .capture.hook import HookCapture, written_gradient
from .capture.one_sided import FittedBases, SharedBases
from .capture.select import captured_layers
from .capture.torch_calls import TorchCalls
from .distributed.communicator import propagate_errors
from .engine.at_step import AtStep
from .engine.attached_parameters import AttachedParameters
from .engine.bases import Bases
from .engine.commit import Committer
from .engine.grad_norm import GradClipper
from .engine.in_backward import InBackward
from .engine.loop_checks import LoopChecks
from .engine.masks import mixes_entries
from .engine.pending import Pending
from .engine.policy import CommitPolicy
from .engine.record import ParamRecord, make_records, state_bytes
from .engine.skipped_steps import SkippedSteps
from .engine.state_dict import extra_of
from .engine.state_store import StateStore
from .engine.sync import Sync
from .errors import ArgumentError, AttachError, CheckpointError, ParallelError, warn
from .gradient import GradientOperator
from .params.groups import ParameterGroup, require_rates
from .report import Observation, Report, describe, report
from .tracker import LossTracker


class GradLR(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose parameters are updated by hooks in backward, or by `step()` from sketches.

    Made by `gradlr.attach`, which documents the arguments. `param_groups` hold lr, beta and weight_decay, which any scheduler
    may change, and lr_scale, what the group's kind takes of lr; everything else is fixed. With `apply="step"`, from the first
    gradient of a step to its end the last group shows one parameter more, whose `.grad` is the global norm of what waits:
    `GradScaler` and `clip_grad_norm_` over these parameters find it there. Held weakly by its hooks: keep it in a variable as
    long as you train.

    Attributes:
        tracker: The tracker that shows it the losses.
        apply: "backward" or "step".
        records: One entry per attached parameter, in the order of `param_groups`.
        clipper: The largest norm of a step's gradients; may be changed between steps.
        store, committer, pending, policy, sync: The parts of the engine, for tools that look into it.
    """

    _is_built = False

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParameterGroup],
        tracker: LossTracker,
        *,
        defaults: dict[str, Any],
        apply: str,
        capture: str,
        max_grad_norm: float | None,
        state_dtype: torch.dtype,
        seed: int,
        sync: Sync,
    ) -> None:
        super().__init__([group.for_torch() for group in groups], defaults)
        self.tracker, self.apply, self.sync, self.clipper = tracker, apply, sync, GradClipper(apply == "step", max_grad_norm)
        self.records = make_records(groups)
        self.store = StateStore(self, self.records, sync, seed=seed, dtype=state_dtype)
        self.bases: Bases = SharedBases(self.store) if sync.shares_bases else FittedBases(self.store, tracker)
        skipped, self.committer = SkippedSteps(), Committer(self.store, self.bases)
        self.pending = Pending(self.store, self.bases, sync, skipped, self.clipper)
        layers = captured_layers(model, self.records, capture, is_immediate=apply == "backward")
        self._checks = LoopChecks(
            tracker, self.committer.changed, len(self.records),
            is_immediate=apply == "backward", may_be_silent=sync.may_be_silent,
        )  # fmt: skip
        self.policy: CommitPolicy = (AtStep if apply == "step" else InBackward)(
            tracker, store=self.store, committer=self.committer, pending=self.pending, checks=self._checks, skipped=skipped,
            attached=AttachedParameters(
                model, [record.plan for record in self.records], may_be_wrapped=sync.comm.size == 1,
                mixed={id(record.plan.parameter) for record in self.records if mixes_entries(record.rule)},
            ),
            bases=self.bases, sync=sync, take_written=written_gradient,
        )  # fmt: skip
        self._captures: tuple[HookCapture, AdaptorCapture, TorchCalls] = (
            HookCapture([record.plan for record in self.records], self),
            AdaptorCapture(layers, self),
            TorchCalls(self.policy),
        )
        self._is_built, self._is_detached = True, False
        tracker.subscribe(self.policy)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients, unscaled, before `max_grad_norm` and after `clip_grad_norm_`.

        None before the first step, and where backward updates. Exact where one backward made the step, that of the sketches where
        several did. Layers that "adaptor" captures are exact only under a limit, and where that backward used them once; with
        "one_sided" never.
        """
        norm = self.policy.grad_norm
        return None if norm is None else float(norm)

    @property
    def skipped(self) -> int:
        """Number of steps left out whole because a loss, a gradient or a norm was not finite.

        On an asynchronous device known one loss late, and with `apply="backward"` not counted there: each gradient is a
        NonFiniteError of its own.
        """
        return self.policy.skipped.count

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Names of the parameters that the last backward or step has updated, where it did not come to its end; else empty."""
        return self._checks.interrupted

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
            NonFiniteError: NaN or infinity, with `apply="backward"` and a finite loss. On an asynchronous device told at the next
                loss; the parameter keeps value and state, its count aside.
        """
        if self.state is not self.store.states or self.param_groups is not self.store.groups:
            self.store.bind(self)
        record = self.store.by_id.get(id(parameter))
        if record is None:
            raise ArgumentError(f"receive: a parameter of shape {tuple(parameter.shape)} is not attached to this optimizer")
        self.policy.receive(record, gradient)
        # Schedulers warn where no step came before theirs; an update in backward is one.
        self._opt_called = getattr(self, "_opt_called", False) or self.apply == "backward"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Write what is pending (`apply="step"`); with `apply="backward"` there is nothing left to do.

        Gradients that somebody has written into `.grad` are pending as well.
        A step is taken whole or not at all: where a loss, a gradient or an update is not finite, nothing changes, what was
        pending is dropped, and `skipped` counts.

        Args:
            closure: Re-evaluates the model, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ArgumentError: a group holds a rate that is negative or not finite; what waits goes on waiting.
            AttachError: a loss was shown and backward ran, but no parameter's hook fired; or the optimizer is detached.
            BackwardError: the last backward was interrupted; what was pending is dropped. Or somebody has written into `.grad`,
                and backward updates, or the parameter's own gradient waits as well.

        Warns:
            GradlrWarning: the step was left out. Not with GradScaler, which expects that and does not call `step` then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._is_detached:
            raise AttachError("opt.step() was called after opt.detach(): nothing is trained any more. Attach again")
        if self.apply == "step":
            require_rates(self.param_groups)
        try:
            self.policy.step()
        except BaseException:  # out of memory, Ctrl-C: nothing of this step may join the next one
            changed = tuple(self.committer.changed)
            self.policy.reset()
            self._checks.step_broke(changed)
            raise
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is pending, as every optimizer drops its gradients, and what somebody has written into `.grad`.

        Where a gradient was not finite, the step that this ends counts as skipped: so it is after `GradScaler.step`.
        """
        self.policy.drop()
        for record in self.records:
            record.plan.parameter.grad = None

    def detach(self) -> None:
        """Remove all hooks: the parameters are ordinary ones again, the state stays. Calling it again does nothing.

        Warns:
            GradlrWarning: gradients wait for `step()`; they are dropped.
        """
        if count := len(self.pending):
            message = f"opt.detach() drops the gradients of {count} parameters that waited for step()"
            warn(f"{message}: call opt.step() or opt.zero_grad() before")
        self.pending.clear()
        for capture in self._captures:
            capture.remove()
        self.tracker.unsubscribe(self.policy)
        self._is_detached = True

    def __enter__(self) -> GradLR:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.pending.clear()
        self.detach()

    def __repr__(self) -> str:
        if not self._is_built:
            return object.__repr__(self)
        processes = self.processes if self.processes > 1 else None
        options = {"apply": self.apply, "processes": processes, "max_grad_norm": self.clipper.max_norm}
        return describe(self.records, self.param_groups, self.state, **options)

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout plus "gradlr": ranks, seed and the tracker. Plain tensors and numbers: loads with `weights_only=True`.

        Raises:
            CheckpointError: gradients are pending; call `step()` or `zero_grad()` first.
            NonFiniteError, BackwardError: on an asynchronous device, what the last backward has left to tell.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        if waiting := self.pending.records():
            first = waiting[0].plan.name
            raise CheckpointError(
                f"{len(waiting)} gradients wait for step() ({first!r} first): save after opt.step() or opt.zero_grad()"
            )
        self.policy.read_skipped()
        self._checks.raise_unread()
        packed = self.store.to_dict({"tracker": self.tracker.state_dict(), "skipped": self.skipped})
        return _through(self._optimizer_state_dict_post_hooks, self, packed)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; momentum rank and rank may differ from the saved ones. State keeps its own dtype.

        Where several processes train, every one loads the same checkpoint at the same time.

        Raises:
            CheckpointError: parameters, kinds or shapes differ; nothing was changed.
            ParallelError: the processes have loaded different ones, or one has failed to load; what was there is put back.
        """
        snapshot, losses = self.store.snapshot(), self.tracker.state_dict()
        with propagate_errors(self.sync.comm):
            self._load(state_dict)
        try:
            told = {"ratio": self.tracker.ratio, "max_loss": self.tracker.max_loss, "progress": self.tracker.progress}
            self.sync.assert_same_state(self.store, told)
        except ParallelError:
            self.store.restore(snapshot)
            self.tracker.load_state_dict(losses)
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        given = dict(state_dict) if isinstance(state_dict, dict) else state_dict  # a hook may write to it
        state_dict = _through(self._optimizer_load_state_dict_pre_hooks, self, given)
        self.store.from_dict(state_dict)
        extra = extra_of(state_dict)
        self.tracker.load_state_dict(extra["tracker"])
        self.policy.restart(extra.get("skipped", 0))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed once attached.

        Raises:
            ArgumentError: always, after construction.
        """
        if self._is_built:
            raise ArgumentError("groups are fixed once attached: call opt.detach() and attach again with groups=[...]")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise AttachError("an optimizer with hooks cannot be copied or pickled: save opt.state_dict() instead")

    @property
    def processes(self) -> int:
        """Number of processes that train the model together."""
        return self.sync.comm.size

    def state_bytes(self) -> int:
        """Bytes of all state tensors, step counters left out."""
        return sum(state_bytes(self.store.of(record)) for record in self.records)

    def observe(self, *match: str) -> Observation:
        """From now on, each update leaves its norms and the gradient's captured share for `report()`; no weight differs for it.

        Takes a second copy of one gradient at a time; with `apply="step"` the observed gradients themselves, until the step.

        Args:
            match: Globs on parameter names; all parameters where none is given.

        Returns:
            Ends the observation: by `stop()`, or as `with opt.observe(): ...`.

        Raises:
            ArgumentError: a glob matches no parameter, or the model is sharded.
        """
        _require_whole("observe", self.records)
        return Observation(self.records, match or ("*",))

    @torch.no_grad()
    def report(self) -> Report:
        """What each parameter's update is made of now, and what it costs beside AdamW: print, show, plot or log it.

        Captured energy, gradient and update are those of the last update inside `observe()`.

        Raises:
            ArgumentError: the model is sharded.
        """
        _require_whole("report", self.records)
        return report(self.records, {record.plan.parameter: self.store.of(record) for record in self.records})


def _through(hooks: Mapping[Any, Callable[..., Any]], optimizer: GradLR, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as its hooks leave it: what one returns stands in its place."""
    for hook in hooks.values():
        found = hook(optimizer, state_dict)
        state_dict = state_dict if found is None else found
    return state_dict


def _require_whole(method: str, records: list[ParamRecord]) -> None:
    if sharded := [record.plan.name for record in records if not record.plan.layout.is_whole]:
        raise ArgumentError(
            f"opt.{method}() looks at whole matrices, and {sharded[0]!r} is sharded: load the checkpoint into a model of one "
            f"process, attach, and call {method} there"
        )
