"""GradLR: the optimizer behind `attach`. Gradients arrive as operators, may wait as `pending`, are prepared and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import guards
from .captures import as_dense, captured_layers, compact, operator_of, waits_as_it_is
from .checkpoint import check_groups, fitted_state
from .describe import describe
from .errors import ArgumentError, AttachError, GradlrError
from .gradient import AdaptorCapture, GradientOperator, HookCapture
from .membership import Membership
from .rules import Settings, Update
from .slots import Noise, ParameterGroup, Slot, follow_loss, initial_state, make_slots, torch_group, working_form
from .tracker import LossTracker
from .watch import BackwardWatch
from .write import all_finite, checked, full_precision, keep_where, write


class GradLR(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose parameters are updated by hooks in backward, or by `step()` from sketches.

    Made by `gradlr.attach`, which documents the arguments. `param_groups` hold lr, beta and weight_decay, which any scheduler
    may change; everything else is fixed. Held weakly by its hooks: keep it in a variable as long as you train.

    Attributes:
        tracker: The tracker that shows it the losses.
        apply: "backward" or "step".
        seed: Seed of all random numbers, with each parameter's index and step count.
    """

    def __init__(
        self, model: nn.Module, groups: list[ParameterGroup], tracker: LossTracker, *, apply: str, seed: int, capture: str
    ) -> None:
        if apply not in ("backward", "step"):
            raise ArgumentError(f"apply={apply!r}: use 'backward' (update inside backward) or 'step' (update in opt.step())")
        self.tracker, self.apply, self.seed = tracker, apply, seed
        self._is_built = False
        super().__init__([torch_group(group) for group in groups], {"lr": 0.0, "beta": 0.0, "weight_decay": 0.0})
        self._is_built = True
        self._slots = {id(slot.plan.parameter): slot for slot in make_slots(groups)}
        layers = captured_layers(model, self._slots.values(), capture, is_immediate=apply == "backward")
        self._noise = Noise()
        self._membership = Membership(model, [slot.plan for slot in self._slots.values()])
        self._watch = BackwardWatch(tracker, len(self._slots), is_immediate=apply == "backward")
        for slot in self._slots.values():
            self.state[slot.plan.parameter] = initial_state(slot, self._settings(slot, slot.largest_rank))
        self._capture = HookCapture([(slot.plan.name, slot.plan.parameter) for slot in self._slots.values()], self._take)
        self._adaptors = AdaptorCapture(layers, self)
        self._is_detached = False
        tracker.subscribe(self)

    @torch.no_grad()
    def before_backward(self, tracker: LossTracker) -> None:
        """Called by the tracker at each loss: tell what went wrong since the last one, then fix the ranks."""
        self._watch.loss_shown(pending=len(self._waiting()))
        if tracker.is_open:
            self._give_up()
        self._membership.check()
        for slot in self._slots.values():
            # A sketch that waits, or a basis in use, belongs to the rank that it was made with.
            if not slot.rule.needs_dense and slot.pending is None and slot.basis is None:
                follow_loss(slot, tracker.ratio, self.state[slot.plan.parameter])

    def begin_backward(self, scale: Tensor) -> None:
        """Called by the tracker as backward reaches the loss; `scale` is d(total)/d(loss)."""
        self._watch.backward_begins(scale)

    def _take(self, parameter: Tensor, gradient: Tensor) -> None:
        plan = self._slots[id(parameter)].plan
        operator = operator_of(plan, gradient)
        if operator is None:
            raise guards.unsupported_gradient(plan.name, gradient.layout, gradient.dtype, self._watch.changed)
        self.receive(parameter, operator)

    @torch.no_grad()
    def right_basis(self, parameter: Tensor, covariance_times: Callable[[Tensor], Tensor]) -> Tensor:
        """X, (n, r) orthonormal, on which a one-sided layer projects its input: fixed until the next update of its weight.

        Made in the first forward after an update, of the inputs there; its rank follows the loss shown before that forward.
        """
        slot = self._slots[id(parameter)]
        if slot.basis is None:
            follow_loss(slot, self.tracker.ratio, self.state[parameter])
            known, like = (slot.plan.shape, self._rule_state(slot), self._settings(slot)), working_form(parameter)
            with full_precision(parameter.device):
                slot.basis = slot.rule.right_basis(*known, **like, covariance_times=covariance_times)
        return slot.basis

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
            NonFiniteError: NaN or infinity. On CUDA told at the next loss; the parameter keeps value and state, its count aside.
        """
        slot = self._slots.get(id(parameter))
        if slot is None:
            raise ArgumentError(f"receive: a parameter of shape {tuple(parameter.shape)} is not attached to this optimizer")
        try:
            self._watch.gradient_arrives(slot.plan.name, slot.last_loss)
            with full_precision(gradient.device):
                if self.apply == "backward":
                    self._apply(slot, *self._prepare(slot, gradient))
                else:
                    self._accumulate(slot, gradient)
        except GradlrError:
            self._give_up()
            raise
        slot.last_loss = self.tracker.serial

    def _accumulate(self, slot: Slot, gradient: GradientOperator) -> None:
        self._watch.checked_gradient(slot.plan.name, gradient.is_finite())
        if slot.pending is not None:
            slot.pending = slot.pending.add_(gradient)
        elif waits_as_it_is(slot, gradient):
            slot.pending = compact(gradient)
        else:
            slot.pending = slot.rule.sketch(gradient, self._rule_state(slot), self._settings(slot))

    def _prepare(self, slot: Slot, gradient: GradientOperator) -> tuple[Update, dict[str, Tensor], Settings, Tensor]:
        """What the rule makes of a gradient, found finite; nothing has changed yet."""
        settings, old_state = self._settings(slot), self._rule_state(slot)
        if slot.rule.needs_dense and not slot.rule.takes_factors:
            gradient = as_dense(gradient)
        is_finite = self._watch.checked_gradient(slot.plan.name, gradient.is_finite())  # before the rule consumes it
        try:
            update, new_state = checked(slot.rule, slot.rule.update(gradient, old_state, settings), gradient.shape)
        except torch.linalg.LinAlgError as error:  # products of huge entries have overflowed
            raise guards.non_finite(slot.plan.name, self.tracker.count, self.tracker.value, self._watch.changed) from error
        is_finite = is_finite & all_finite([*update.parts(), *new_state.values()])
        self._watch.require_finite(slot.plan.name, is_finite)
        if is_finite.is_cuda:
            update, new_state = keep_where(is_finite, update, new_state, old_state)
        return update, new_state, settings, is_finite

    def _apply(self, slot: Slot, update: Update, new_state: dict[str, Tensor], settings: Settings, is_finite: Tensor) -> None:
        """Write an update and its state. The only place where a weight changes."""
        group, parameter = self.param_groups[slot.group_index], slot.plan.parameter
        decay = group["weight_decay"]
        if decay and is_finite.is_cuda:
            decay = decay * is_finite
        # A stream of its own: in step() the rules of other parameters have drawn since.
        generator = self._noise.at(parameter.device, self.seed, slot.index, -settings.step)
        write(parameter, slot.plan.view, update, lr=float(group["lr"]), weight_decay=decay, generator=generator)
        state = self.state[parameter]
        state.update(new_state, step=state["step"] + 1)
        slot.basis = None
        if slot.schedule.needs_spectrum and update.spectrum is not None:
            state["spectrum"] = update.spectrum
        self._watch.changed.append(slot.plan.name)
        self._opt_called = True  # schedulers warn where no step came before theirs; an update in backward is one

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Write what is pending (`apply="step"`); with `apply="backward"` there is nothing left to do.

        Args:
            closure: Re-evaluates the model, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            AttachError: a loss was shown and backward ran, but no parameter's hook fired; or the optimizer is detached.
            BackwardError: the last backward was interrupted; what was pending is dropped.
            NonFiniteError: an update overflows; nothing was changed, and what was pending is dropped. On CUDA, see `receive`.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._is_detached:
            raise AttachError("opt.step() was called after opt.detach(): nothing is trained any more. Attach again")
        try:
            self._watch.step_begins(pending=len(self._waiting()))
            with full_precision(self.param_groups[0]["params"][0].device):
                self._write_pending()
        except GradlrError:
            self._give_up()
            raise
        return result

    def _write_pending(self) -> None:
        # All are prepared before the first is written: a step is taken whole or not at all.
        for slot, parts in [(slot, self._prepare(slot, slot.pending)) for slot in self._waiting()]:
            slot.pending = None
            self._apply(slot, *parts)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is pending, as every optimizer drops its gradients; `.grad` is None already."""
        for slot in self._slots.values():
            slot.pending, slot.plan.parameter.grad = None, None
        if self.apply == "step":
            self._watch.gradients_dropped()

    def detach(self) -> None:
        """Remove all hooks: the parameters are ordinary ones again, the state stays. Calling it again does nothing."""
        self._capture.remove()
        self._adaptors.remove()
        self.tracker.unsubscribe(self)
        self._is_detached = True

    def __enter__(self) -> GradLR:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

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
    def slots(self) -> list[Slot]:
        """One entry per attached parameter, in the order of `param_groups`."""
        return list(self._slots.values())

    def state_bytes(self) -> int:
        """Bytes of all state tensors, step counters left out."""
        return sum(value.nbytes for slot in self._slots.values() for value in self._rule_state(slot).values())

    def __repr__(self) -> str:
        return describe(self) if self._is_built else object.__repr__(self)

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout plus "gradlr": ranks, seed and the tracker. Plain tensors and numbers: loads with `weights_only=True`.

        Raises:
            CheckpointError: gradients are pending; call `step()` or `zero_grad()` first.
            NonFiniteError, BackwardError: on CUDA, what the last backward has left to tell.
        """
        if waiting := self._waiting():
            raise guards.unfinished_step([slot.plan.name for slot in waiting])
        self._watch.raise_unread()
        state = super().state_dict()
        ranks = [slot.rank for slot in self._slots.values()]
        return {**state, "gradlr": {"version": 1, "seed": self.seed, "ranks": ranks, "tracker": self.tracker.state_dict()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; momentum rank and rank may differ from the saved ones. State keeps its own dtype.

        Raises:
            CheckpointError: parameters, kinds or shapes differ; nothing was changed.
        """
        check_groups(state_dict, self.param_groups)
        extra, slots = state_dict["gradlr"], self.slots
        ranks = [min(rank, slot.largest_rank) for rank, slot in zip(extra["ranks"], slots, strict=True)]
        states = [
            fitted_state(slot, state_dict["state"].get(slot.index), self.state[slot.plan.parameter], self._settings(slot, rank))
            for slot, rank in zip(slots, ranks, strict=True)
        ]
        self.tracker.load_state_dict(extra["tracker"])
        # Torch's own loader would cast float32 state of bfloat16 parameters to bfloat16: give it the groups only.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.seed = extra["seed"]
        self._watch.forget()
        for slot, rank, state in zip(slots, ranks, states, strict=True):
            slot.restart(rank)
            self.state[slot.plan.parameter] = state

    def _rule_state(self, slot: Slot) -> dict[str, Tensor]:
        return {key: value for key, value in self.state[slot.plan.parameter].items() if key not in ("step", "spectrum")}

    def _settings(self, slot: Slot, rank: int | None = None) -> Settings:
        parameter = slot.plan.parameter
        step = int(self.state[parameter]["step"]) + 1 if parameter in self.state else 1
        generator = self._noise.at(parameter.device, self.seed, slot.index, step)
        beta = self.param_groups[slot.group_index]["beta"]
        return Settings(rank or slot.rank, slot.momentum_rank, beta, step, generator, slot.schedule.needs_spectrum)

    def _waiting(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.pending is not None]

    def _give_up(self) -> None:
        # The error or warning at hand says what happened; the next loss begins afresh.
        self.zero_grad()
        self._watch.gradients_dropped()
