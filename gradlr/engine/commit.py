"""From gradients to weights: what waits for `step()`, what a rule makes of it, and the one place where a weight changes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture.one_sided import Projections
from ..capture.select import as_dense, compact, waits_as_it_is
from ..distributed import FAILED, FINE, NOT_FINITE, Communicator, Shards, as_shared, exchange
from ..errors import ParallelError
from ..gradient import GradientOperator, OuterProduct, Sketched
from ..params.kinds import local
from ..report.metrics import UpdateMetrics, kept, seen_gradient, seen_update
from ..rules import State, Update, UpdateContext
from ..tensors import AsyncScalar
from ..tracker import LossTracker
from . import messages as guards
from .apply_update import all_finite, checked, full_precision, keep_where, write
from .grad_norm import GradClipper, GradNormProxy
from .loop_checks import BackwardWatch
from .record import ParameterGroup, ParamRecord, compute_dtype_and_device, follow_loss, mixed_seed
from .skipped_steps import Skips


@dataclass
class Prepared:
    """What a rule has made of one gradient; nothing has changed yet. No update where the host knows that it is not finite."""

    record: ParamRecord
    context: UpdateContext
    is_finite: Tensor
    update: Update | None = None
    new_state: State | None = None
    observed: UpdateMetrics | None = None


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
        limit: GradClipper,
        replicas: Communicator | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(groups, tracker, seed, state_dtype, replicas, shards)
        self.limit, self._is_immediate = limit, is_immediate
        self._watch = BackwardWatch(tracker, len(self._records), is_immediate=is_immediate, may_be_silent=shards is not None)
        self._skips = Skips()
        self._grad_norm: Tensor | None = None
        self._gauge = GradNormProxy(**compute_dtype_and_device(self.records[0].plan.parameter))
        # Loaders of distributed checkpoints look for every parameter of a group in the model.
        if not is_immediate and shards is None:
            self.param_groups[-1]["params"].append(self._gauge.parameter)

    def _update(self, record: ParamRecord, gradient: GradientOperator) -> None:
        """Update one weight at once."""
        is_finite = gradient.is_finite()
        if not is_finite.is_cuda and self._shards is None:
            self._watch.require_finite(record.plan.name, is_finite)
        prepared = self._prepare(record, gradient, is_finite)
        # With blocks in several processes, each takes part in what the others compute, and all hear of it.
        prepared.is_finite = ~record.plan.layout.anywhere(~prepared.is_finite)
        self._watch.require_finite(record.plan.name, prepared.is_finite)
        self._apply(prepared)

    def _accumulate(self, record: ParamRecord, gradient: GradientOperator) -> None:
        """Add a gradient to what waits."""
        is_sound = self._skips.look(gradient.is_finite(), self._blame(record))
        if self._replicas is not None:
            self._accumulate_shared(record, gradient if is_sound else None)
            return
        if not is_sound and self._shards is None:
            self._gauge.record(record.index, torch.full((), torch.nan, dtype=torch.float64, device=gradient.device))
            return
        if self._gauge.is_touched:  # clipped between two micro-batches: what has come so far is scaled, what comes now is not
            factor = self._read_gauge()
            self._scale_waiting(factor)
            self._gauge.settle(factor)
        if record.is_pending_blank is not None and record.is_pending_blank.read():
            record.pending = None  # zeros, as of an empty micro-batch: bases that came from them would serve nobody
        record.is_pending_blank = None
        # The norm of a gradient that was never formed costs as much as forming it: its sketch's will do, unless it matters.
        is_first = record.pending is None
        is_known = is_first and (self.limit.is_active or not isinstance(gradient, OuterProduct))
        energy = gradient.squared_norm() if is_known else None
        if not is_first:
            record.pending = record.pending.add_(gradient)
        elif waits_as_it_is(record, gradient):
            record.pending = compact(gradient)
        else:
            record.pending = record.rule.sketch(gradient, self._rule_state(record), self._settings(record))
            record.pending.whole = as_dense(gradient) if record.is_observed else None
        if is_first and isinstance(record.pending, Sketched):
            record.is_pending_blank = AsyncScalar(record.pending.is_blank())
        energy = record.pending.squared_norm() if energy is None else energy
        self._gauge.record(record.index, energy if self._shards is None else energy / self._shards.copies(record))

    def _accumulate_shared(self, record: ParamRecord, gradient: GradientOperator | None) -> None:
        """The same in bases that all processes know; the norm is not known before they have exchanged what waits."""
        # A mark that shows whether somebody clips or unscales here, which each process would do to its own part.
        self._gauge.record(record.index, torch.ones((), dtype=torch.float64, device=record.plan.parameter.device))
        if gradient is None:
            return
        if record.pending is None:
            record.pending = as_shared(record, gradient, self._shared_bases)
        else:
            record.pending = record.pending.add_(gradient)

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
        told = exchange(self._replicas, self.records, self._shared_bases, losses=losses, status=status)
        self._apply_sync_result(told.failed, told.not_finite, own_reason)
        if told.loss is not None:
            self.tracker.record_mean(told.loss)
        self._gauge.clear()
        for record in self._waiting():
            self._gauge.record(record.index, record.pending.squared_norm())

    def _own_status(self, has_failed: bool) -> tuple[int, str]:
        """How this process comes to a step, and what was not finite, if anything was."""
        verdict = self._skips.verdict()
        is_finite = self._skips.reason is None and (verdict is None or bool(verdict))
        reason = self._skips.reason or "a gradient held NaN or infinity"
        self._skips.clear()
        return FAILED if has_failed else FINE if is_finite else NOT_FINITE, reason

    def _apply_sync_result(self, failed: list[int], not_finite: list[int], own_reason: str) -> None:
        if failed:
            raise guards.failed_elsewhere(failed)
        if not_finite:
            self._skips.reason = guards.not_finite_on(not_finite, self.comm.rank, own_reason)

    def _meet_shards(self, losses: list[float], *, has_failed: bool = False) -> None:
        """Learn the norm of all gradients; the step is left out where a part of one is not finite."""
        status, own_reason = self._own_status(has_failed)
        waiting, device = [record.index for record in self._waiting()], self._gauge.parameter.device
        energy, statuses = self._shards.meet_at_step(self._gauge.energy, status, waiting, device)
        at = {kind: [rank for rank, other in enumerate(statuses) if other == kind] for kind in (FAILED, NOT_FINITE)}
        self._apply_sync_result(at[FAILED], at[NOT_FINITE], own_reason)
        self._gauge.become(energy)

    def _agree_on_updates(self, verdict: Tensor | None) -> Tensor | None:
        """All blocks of an update are written, or none: what overflowed in one process is nowhere written."""
        flag = verdict if verdict is not None else torch.tensor(self._skips.reason is None, device=self._gauge.parameter.device)
        agreed = self._shards.all_true(flag)
        if verdict is not None:
            return agreed
        if not agreed and self._skips.reason is None:
            self._skips.reason = "an update was not finite in the part of another rank"
        return None

    def _follow_group(self) -> None:
        """After a step, the ranks of the next one: by the mean loss of all processes, once a step on each."""
        self._forget_bases()
        for record in self._records.values():
            if not record.rule.is_elementwise:
                follow_loss(record, self.tracker.ratio, self.state[record.plan.parameter])

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
            self._skips.await_verdict(verdict, lambda: self._uncount([one.record for one in prepared]))
        self._gauge.clear()

    def _prepare_waiting(self) -> list[Prepared]:
        norm, factor = self._gauge.norm(), self._read_gauge()
        if self.limit.is_active:
            self._skips.look(norm.isfinite(), f"the norm of all gradients is not finite at loss number {self.tracker.count}")
            limiting = self.limit.factor(norm)
            factor = factor * limiting
        self._scale_waiting(factor)
        prepared = []
        for record in self._waiting():
            if self._skips.reason and self._shards is None:
                break
            gradient, record.pending = record.pending, None
            prepared.append(self._prepare(record, gradient, gradient.is_finite()))
            self._skips.look(prepared[-1].is_finite, self._blame(record))
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
            for record in self._waiting():
                record.pending = record.pending.scaled(factor.to(record.pending.dtype))

    def _prepare(self, record: ParamRecord, gradient: GradientOperator, is_finite: Tensor) -> Prepared:
        # `is_finite` was asked for before the rule consumes the gradient.
        context, old_state = self._settings(record), self._rule_state(record)
        if record.rule.is_elementwise and not record.rule.accepts_row_factors:
            gradient = as_dense(gradient)
        whole = kept(gradient) if record.is_observed else None
        try:
            update, new_state = checked(record.rule, record.rule.update(gradient, old_state, context), gradient.shape)
        except torch.linalg.LinAlgError:  # products of huge entries have overflowed
            return Prepared(record, context, torch.zeros_like(is_finite))
        is_finite = is_finite & all_finite([*update.parts(), *new_state.values()])
        observed = None if whole is None else seen_gradient(whole, update, context.step, record.plan.kind, record.rule)
        return Prepared(record, context, is_finite, update, new_state, observed)

    def _apply(self, prepared: Prepared) -> None:
        """Write an update and its state, on CUDA only where the flag says so. The only place where a weight changes."""
        record, update, is_finite = prepared.record, prepared.update, prepared.is_finite
        group, parameter = self.param_groups[record.group_index], record.plan.parameter
        new_state = self._narrowed_in_parts(record, prepared.new_state, prepared.context.step)
        # A stream of its own: in step() the rules of other parameters have drawn since.
        seed = mixed_seed(self.seed, record.plan.layout.number, 0) if record.plan.layout.number else self.seed
        generator = self._noise.at(parameter.device, seed, record.index, -prepared.context.step)
        new_state, decay = self._narrowed(new_state, generator), group["weight_decay"]
        if is_finite.is_cuda:
            update, new_state = keep_where(is_finite, update, new_state, self.state[parameter])
            decay = decay * is_finite if decay else decay
        if prepared.observed is not None:
            weight = record.plan.view.of(parameter)
            record.observed = seen_update(prepared.observed, weight, update, lr=float(group["lr"]), weight_decay=decay)
        self._write(local(parameter), record.plan.view, update, lr=float(group["lr"]), weight_decay=decay, generator=generator)
        state = self.state[parameter]
        state.update(new_state, step=state["step"] + 1)
        record.basis = None
        if record.schedule.needs_spectrum and update.spectrum is not None:
            state["spectrum"] = record.plan.layout.batch.all_gather(update.spectrum, 0)
        self._watch.changed.append(record.plan.name)
        self._opt_called = True  # schedulers warn where no step came before theirs; an update in backward is one

    def _waiting(self) -> list[ParamRecord]:
        return [record for record in self._records.values() if record.pending is not None]

    def _drop_waiting(self) -> None:
        for record in self._records.values():
            record.pending = None
        self._gauge.clear()

    def _uncount(self, records: list[ParamRecord]) -> None:
        for record in records:
            self.state[record.plan.parameter]["step"] -= 1

    def _blame(self, record: ParamRecord) -> str:
        return guards.bad_gradient(record.plan.name, self.tracker.count, self.tracker.value)
