"""The optimizer under stock DistributedDataParallel, which averages what it finds in `.grad` before `step()` reads it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import guards
from .captures import operator_of
from .errors import ParallelError
from .gradient import CapturedLayer, Claim, GradientOperator, LayerCapture, RegisteredCapture, Sketched
from .optimizer import GradLR
from .parallel import FAILED, FINE, NOT_FINITE, compare
from .slots import Slot
from .tracker import LossTracker
from .write import full_precision


class AveragedGradLR(GradLR):
    """`GradLR` for `capture="ddp"`: no hook takes a gradient; `step()` reads the mean that every `.grad` holds by then.

    The sketches of captured matrices are the `.grad` of two small parameters each. These stand in the last group of
    `param_groups`, so that `GradScaler` and `clip_grad_norm_` treat them as the gradients they stand for.
    """

    def _captured(self, layers: list[CapturedLayer]) -> tuple[Claim, LayerCapture]:
        by_weight = {id(slot.plan.parameter): slot for slot in self.slots}
        taken = [by_weight[id(layer.module.weight)] for layer in layers]
        claim = Claim((slot.plan.name, slot.plan.parameter) for slot in self.slots)
        capture = RegisteredCapture([(layer, slot.largest_rank) for layer, slot in zip(layers, taken, strict=True)], self)
        pairs = zip(capture.sketches[::2], capture.sketches[1::2], strict=True)
        self._carriers: dict[int, tuple[Tensor, ...]] = {slot.index: (slot.plan.parameter,) for slot in self.slots}
        self._carriers |= {slot.index: pair for slot, pair in zip(taken, pairs, strict=True)}
        for slot in self.slots:
            slot.capture = "ddp" if len(self._carriers[slot.index]) == 2 else "grad"
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}
        self._averaged: list[Tensor] = []
        self._membership.expect(capture.sketches)
        self.param_groups[-1]["params"] += capture.sketches
        return claim, capture

    @torch.no_grad()
    def bases(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """X and L of a captured weight: made in its first forward after an update, the same tensors until the next one."""
        slot = self._slots[id(parameter)]
        if slot.index not in self._bases:
            with full_precision(parameter.device):
                self._bases[slot.index] = self._shared_bases(slot)
        return self._bases[slot.index]

    def before_backward(self, tracker: LossTracker) -> None:
        self._tell_of_gradients()
        super().before_backward(tracker)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._tell_of_gradients()
        super().zero_grad(set_to_none)

    def _tell_of_gradients(self) -> None:
        # No hook has told of the last backward's gradients, which DistributedDataParallel writes at its end.
        waiting = self._waiting()
        if waiting and self.tracker.is_shown and not self.tracker.open_backwards:
            self._watch.gradient_arrives(waiting[0].plan.name, None)

    def detach(self) -> None:
        super().detach()
        own = {id(sketch) for pair in self._carriers.values() if len(pair) == 2 for sketch in pair}
        params = self.param_groups[-1]["params"]
        params[:] = [parameter for parameter in params if id(parameter) not in own]

    def _waiting(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.pending is not None or self._is_held(slot)]

    def _is_held(self, slot: Slot) -> bool:
        return any(carrier.grad is not None for carrier in self._carriers[slot.index])

    def _drop_waiting(self) -> None:
        super()._drop_waiting()
        self._bad_backward, self._averaged = None, []
        for carriers in self._carriers.values():
            for carrier in carriers:
                carrier.grad = None

    def _forget_bases(self) -> None:
        super()._forget_bases()
        self._bases.clear()

    def _restore(self, state_dict) -> None:
        super()._restore(state_dict)
        self._forget_bases()

    def _begin_step(self) -> None:
        try:
            for slot in self.slots:
                self._collect(slot)
        except Exception:  # the others wait for this process
            with contextlib.suppress(ParallelError):
                self._exchange([], has_failed=True)
            raise
        super()._begin_step()

    def _collect(self, slot: Slot) -> None:
        """Make an operator of the mean that a parameter's carriers hold, and free them."""
        gradients = []
        for carrier in self._carriers[slot.index]:
            gradient, carrier.grad = carrier.grad, None
            if gradient is not None:
                # Sorted: on CUDA the sum of a row's parts would round as it happens to come.
                gradients.append(gradient.coalesce() if gradient.is_sparse else gradient)
        if not gradients:
            return
        self._watch.gradient_arrives(slot.plan.name, slot.last_loss)
        slot.pending, slot.last_loss = self._operator(slot, gradients), self.tracker.serial
        self._averaged += [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]

    def _operator(self, slot: Slot, gradients: list[Tensor]) -> GradientOperator:
        if slot.capture == "ddp":
            right, left = self.bases(slot.plan.parameter)
            of_right, of_left = (gradient[:, : right.shape[-1]] for gradient in gradients)
            return Sketched(right, of_right, left, of_left)
        operator = operator_of(slot.plan, gradients[0])
        if operator is None:
            raise guards.unsupported_gradient(slot.plan.name, gradients[0].layout, gradients[0].dtype, self._watch.changed)
        return operator

    def _exchange(self, losses: list[float], *, has_failed: bool = False) -> None:
        """See that all processes hold the same gradients, and tell each other the losses."""
        bad_loss = None if self._bad_backward is None else self._bad_backward[1]
        status = FAILED if has_failed else FINE if bad_loss is None else NOT_FINITE
        gradients, self._averaged, self._bad_backward = self._averaged, [], None
        told = compare(self._replicas, self.slots, gradients, losses=losses, status=status)
        self._heed(told.failed, told.not_finite, bad_loss or "")
        if told.loss is not None:
            self.tracker.record_mean(told.loss)
        for slot in self._waiting():
            self._gauge.record(slot.index, slot.pending.squared_norm())
