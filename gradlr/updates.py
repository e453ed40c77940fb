"""From gradients to weights: what waits for `step()`, what a rule makes of it, and the one place where a weight changes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import guards
from .captures import as_dense, compact, waits_as_it_is
from .deferred import Deferred
from .errors import ParallelError
from .gauge import Gauge, NormLimit
from .gradient import Factored, GradientOperator, Sketched
from .observe import Observed, kept, seen_gradient, seen_update
from .parallel import FAILED, FINE, NOT_FINITE, Replicas, Shards, as_shared, exchange
from .parameters import local
from .projections import Projections
from .rules import Settings, State, Update
from .skips import Skips
from .slots import ParameterGroup, Slot, follow_loss, mixed_seed, working_form
from .tracker import LossTracker
from .watch import BackwardWatch
from .write import all_finite, checked, full_precision, keep_where, write


@dataclass
class Prepared:
    """What a rule has made of one gradient; nothing has changed yet. No update where the host knows that it is not finite."""

    slot: Slot
    settings: Settings
    is_finite: Tensor
    update: Update | None = None
    new_state: State | None = None
    observed: Observed | None = None


class Updates(Projections):
    """Turns gradients into updates: each at once, or all together in a step that is taken whole or not at all.

    Args:
        groups, tracker, seed, state_dtype: As for `KeptState`.
        is_immediate: Whether weights change inside backward.
        limit: On the global norm of a step's gradients.
        replicas: The processes that train together; None where this one trains alone.
        shards: The processes that each hold a part of the model; None where it is not sharded.
    """

    _write = staticmethod(write)

    def __init__(
        self,
        groups: list[ParameterGroup],
        tracker: LossTracker,
        *,
        seed: int,
        state_dtype: torch.dtype,
        is_immediate: bool,
        limit: NormLimit,
        replicas: Replicas | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(groups, tracker, seed, state_dtype, replicas, shards)
        self.limit, self._is_immediate = limit, is_immediate
        self._watch = BackwardWatch(tracker, len(self._slots), is_immediate=is_immediate, may_be_silent=shards is not None)
        self._skips = Skips()
        self._grad_norm: Tensor | None = None
        self._gauge = Gauge(**working_form(self.slots[0].plan.parameter))
        # Loaders of distributed checkpoints look for every parameter of a group in the model.
        if not is_immediate and shards is None:
            self.param_groups[-1]["params"].append(self._gauge.parameter)

    def _update(self, slot: Slot, gradient: GradientOperator) -> None:
        """Update one weight at once."""
        is_finite = gradient.is_finite()
        if not is_finite.is_cuda and self._shards is None:
            self._watch.require_finite(slot.plan.name, is_finite)
        prepared = self._prepare(slot, gradient, is_finite)
        # With blocks in several processes, each takes part in what the others compute, and all hear of it.
        prepared.is_finite = ~slot.plan.layout.anywhere(~prepared.is_finite)
        self._watch.require_finite(slot.plan.name, prepared.is_finite)
        self._apply(prepared)

    def _accumulate(self, slot: Slot, gradient: GradientOperator) -> None:
        """Add a gradient to what waits."""
        is_sound = self._skips.look(gradient.is_finite(), self._blame(slot))
        if self._replicas is not None:
            self._accumulate_shared(slot, gradient if is_sound else None)
            return
        if not is_sound and self._shards is None:
            self._gauge.record(slot.index, torch.full((), torch.nan, dtype=torch.float64, device=gradient.device))
            return
        if self._gauge.is_touched:  # clipped between two micro-batches: what has come so far is scaled, what comes now is not
            factor = self._read_gauge()
            self._scale_waiting(factor)
            self._gauge.settle(factor)
        if slot.is_pending_blank is not None and slot.is_pending_blank.read():
            slot.pending = None  # zeros, as of an empty micro-batch: bases that came from them would serve nobody
        slot.is_pending_blank = None
        # The norm of a gradient that was never formed costs as much as forming it: its sketch's will do, unless it matters.
        is_first = slot.pending is None
        is_known = is_first and (self.limit.is_active or not isinstance(gradient, Factored))
        energy = gradient.squared_norm() if is_known else None
        if not is_first:
            slot.pending = slot.pending.add_(gradient)
        elif waits_as_it_is(slot, gradient):
            slot.pending = compact(gradient)
        else:
            slot.pending = slot.rule.sketch(gradient, self._rule_state(slot), self._settings(slot))
            slot.pending.whole = as_dense(gradient) if slot.is_observed else None
        if is_first and isinstance(slot.pending, Sketched):
            slot.is_pending_blank = Deferred(slot.pending.is_blank())
        energy = slot.pending.squared_norm() if energy is None else energy
        self._gauge.record(slot.index, energy if self._shards is None else energy / self._shards.copies(slot))

    def _accumulate_shared(self, slot: Slot, gradient: GradientOperator | None) -> None:
        """The same in bases that all processes know; the norm is not known before they have exchanged what waits."""
        # A mark that shows whether somebody clips or unscales here, which each process would do to its own part.
        self._gauge.record(slot.index, torch.ones((), dtype=torch.float64, device=slot.plan.parameter.device))
        if gradient is None:
            return
        if slot.pending is None:
            slot.pending = as_shared(slot, gradient, self._shared_bases)
        else:
            slot.pending = slot.pending.add_(gradient)

    def _begin_step(self) -> None:
        """See that what waits belongs together, and where several processes train, exchange it."""
        meet = self._exchange if self._replicas is not None else None if self._shards is None else self._meet_shards
        if meet is None or self._is_immediate:
            self._watch.step_begins(pending=len(self._waiting()))
            return
        losses = self.tracker.recent(self._watch.shown_losses)
        try:
            self._watch.step_begins(pending=len(self._waiting()))
            if self._replicas is not None and self._gauge.is_changed():
                raise guards.clipped_alone()
        except Exception:  # the others wait for this process
            with contextlib.suppress(ParallelError), full_precision(self._gauge.parameter.device):
                meet(losses, has_failed=True)
            raise
        with full_precision(self._gauge.parameter.device):
            meet(losses)

    def _exchange(self, losses: list[float], *, has_failed: bool = False) -> None:
        """Put the mean over all processes in the place of what waits here; the step is left out where one is not finite."""
        status, own_reason = self._own_status(has_failed)
        told = exchange(self._replicas, self.slots, self._shared_bases, losses=losses, status=status)
        self._heed(told.failed, told.not_finite, own_reason)
        if told.loss is not None:
            self.tracker.record_mean(told.loss)
        self._gauge.clear()
        for slot in self._waiting():
            self._gauge.record(slot.index, slot.pending.squared_norm())

    def _own_status(self, has_failed: bool) -> tuple[int, str]:
        """How this process comes to a step, and what was not finite, if anything was."""
        verdict = self._skips.verdict()
        is_finite = self._skips.reason is None and (verdict is None or bool(verdict))
        reason = self._skips.reason or "a gradient held NaN or infinity"
        self._skips.clear()
        return FAILED if has_failed else FINE if is_finite else NOT_FINITE, reason

    def _heed(self, failed: list[int], not_finite: list[int], own_reason: str) -> None:
        if failed:
            raise guards.failed_elsewhere(failed)
        if not_finite:
            self._skips.reason = guards.not_finite_on(not_finite, self.everyone.rank, own_reason)

    def _meet_shards(self, losses: list[float], *, has_failed: bool = False) -> None:
        """Learn the norm of all gradients; the step is left out where a part of one is not finite."""
        status, own_reason = self._own_status(has_failed)
        waiting, device = [slot.index for slot in self._waiting()], self._gauge.parameter.device
        energy, statuses = self._shards.meet_at_step(self._gauge.energy, status, waiting, device)
        at = {kind: [rank for rank, other in enumerate(statuses) if other == kind] for kind in (FAILED, NOT_FINITE)}
        self._heed(at[FAILED], at[NOT_FINITE], own_reason)
        self._gauge.become(energy)

    def _agree_on_updates(self, verdict: Tensor | None) -> Tensor | None:
        """All blocks of an update are written, or none: what overflowed in one process is nowhere written."""
        flag = verdict if verdict is not None else torch.tensor(self._skips.reason is None, device=self._gauge.parameter.device)
        agreed = self._shards.agreed(flag)
        if verdict is not None:
            return agreed
        if not agreed and self._skips.reason is None:
            self._skips.reason = "an update was not finite in the part of another rank"
        return None

    def _follow_group(self) -> None:
        """After a step, the ranks of the next one: by the mean loss of all processes, once a step on each."""
        self._forget_bases()
        for slot in self._slots.values():
            if not slot.rule.needs_dense:
                follow_loss(slot, self.tracker.ratio, self.state[slot.plan.parameter])

    def _take_step(self) -> None:
        """Write all that waits, or nothing: all is prepared before the first weight is written."""
        if not (self._waiting() or self._skips.reason):
            return
        prepared = [] if self._skips.reason else self._prepare_waiting()
        verdict = self._skips.verdict()
        if prepared and self._shards is not None:
            verdict = self._agree_on_updates(verdict)
        if self._skips.reason:
            self._drop_waiting()
            self._forget_bases()
            self._skips.skip(is_quiet=False)
            return
        for one in prepared:
            one.is_finite = one.is_finite if verdict is None else verdict
            self._apply(one)
        if verdict is not None:
            self._skips.await_verdict(verdict, lambda: self._uncount([one.slot for one in prepared]))
        self._gauge.clear()

    def _prepare_waiting(self) -> list[Prepared]:
        norm, factor = self._gauge.norm(), self._read_gauge()
        if self.limit.is_active:
            self._skips.look(norm.isfinite(), f"the norm of all gradients is not finite at loss number {self.tracker.count}")
            limiting = self.limit.factor(norm)
            factor = factor * limiting
        self._scale_waiting(factor)
        prepared = []
        for slot in self._waiting():
            if self._skips.reason and self._shards is None:
                break
            gradient, slot.pending = slot.pending, None
            prepared.append(self._prepare(slot, gradient, gradient.is_finite()))
            self._skips.look(prepared[-1].is_finite, self._blame(slot))
        if not self._skips.reason:
            self._grad_norm = norm
            self.limit.last = norm * limiting if self.limit.is_active else None
        return prepared

    def _read_gauge(self) -> Tensor:
        # Cut values tell nothing of the gradients' own entries: an error, or on CUDA, where asking would wait, a step left out.
        if not self._skips.look(self._gauge.is_even(), "value clipping"):
            raise guards.clipped_values()
        return self._gauge.factor()

    def _scale_waiting(self, factor: Tensor) -> None:
        if factor.is_cuda or factor != 1:
            for slot in self._waiting():
                slot.pending = slot.pending.scaled(factor.to(slot.pending.dtype))

    def _prepare(self, slot: Slot, gradient: GradientOperator, is_finite: Tensor) -> Prepared:
        # `is_finite` was asked for before the rule consumes the gradient.
        settings, old_state = self._settings(slot), self._rule_state(slot)
        if slot.rule.needs_dense and not slot.rule.takes_factors:
            gradient = as_dense(gradient)
        whole = kept(gradient) if slot.is_observed else None
        try:
            update, new_state = checked(slot.rule, slot.rule.update(gradient, old_state, settings), gradient.shape)
        except torch.linalg.LinAlgError:  # products of huge entries have overflowed
            return Prepared(slot, settings, torch.zeros_like(is_finite))
        is_finite = is_finite & all_finite([*update.parts(), *new_state.values()])
        observed = None if whole is None else seen_gradient(whole, update, settings.step, slot.plan.kind, slot.rule)
        return Prepared(slot, settings, is_finite, update, new_state, observed)

    def _apply(self, prepared: Prepared) -> None:
        """Write an update and its state, on CUDA only where the flag says so. The only place where a weight changes."""
        slot, update, is_finite = prepared.slot, prepared.update, prepared.is_finite
        group, parameter = self.param_groups[slot.group_index], slot.plan.parameter
        new_state = self._narrowed_in_parts(slot, prepared.new_state, prepared.settings.step)
        # A stream of its own: in step() the rules of other parameters have drawn since.
        seed = mixed_seed(self.seed, slot.plan.layout.number, 0) if slot.plan.layout.number else self.seed
        generator = self._noise.at(parameter.device, seed, slot.index, -prepared.settings.step)
        new_state, decay = self._narrowed(new_state, generator), group["weight_decay"]
        if is_finite.is_cuda:
            update, new_state = keep_where(is_finite, update, new_state, self.state[parameter])
            decay = decay * is_finite if decay else decay
        if prepared.observed is not None:
            weight = slot.plan.view.of(parameter)
            slot.observed = seen_update(prepared.observed, weight, update, lr=float(group["lr"]), weight_decay=decay)
        self._write(local(parameter), slot.plan.view, update, lr=float(group["lr"]), weight_decay=decay, generator=generator)
        state = self.state[parameter]
        state.update(new_state, step=state["step"] + 1)
        slot.basis = None
        if slot.schedule.needs_spectrum and update.spectrum is not None:
            state["spectrum"] = slot.plan.layout.batch.gathered(update.spectrum, 0)
        self._watch.changed.append(slot.plan.name)
        self._opt_called = True  # schedulers warn where no step came before theirs; an update in backward is one

    def _waiting(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.pending is not None]

    def _drop_waiting(self) -> None:
        for slot in self._slots.values():
            slot.pending = None
        self._gauge.clear()

    def _uncount(self, slots: list[Slot]) -> None:
        for slot in slots:
            self.state[slot.plan.parameter]["step"] -= 1

    def _blame(self, slot: Slot) -> str:
        return guards.bad_gradient(slot.plan.name, self.tracker.count, self.tracker.value)
