"""`apply="step"`: gradients wait, compressed, and are committed together, all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial

import torch

from .. import tensors
from ..errors import LossError, ParallelError
from ..gradient import GradientOperator
from ..gradient.batch import stacked
from ..tensors import is_async
from .commit import Prepared
from .policy import CommitPolicy, in_float32, require_use_for
from .record import ParamRecord


class AtStep(CommitPolicy):
    """Adds gradients up until `step()`, which accumulation, clipping, GradScaler and data parallel training need."""

    _is_norm_looked_at = True

    def _take(self, record: ParamRecord, gradient: GradientOperator) -> None:
        if not self.sync.has_begun:
            self.sync.begin(self.tracker, self.pending)
        if is_async(self.pending.norm_proxy.parameter):
            self._is_norm_looked_at = False  # on the device the norm of all tells it, once a step
        else:
            self.skipped.look(gradient.is_finite(), lambda: self.checks.bad_gradient_message(record))
        self.pending.add(record, gradient)

    def _look_at_norm(self) -> None:
        energy = self.pending.norm_proxy.energy
        if energy is not None and not self._is_norm_looked_at:
            self._is_norm_looked_at = True
            self.skipped.look(energy, lambda: "the norm of all gradients is not finite")

    def step(self) -> None:
        """Write all that waits, or nothing: all is prepared before the first weight is written."""
        kind = self.pending.norm_proxy.parameter.device.type
        with in_float32(kind) if kind in tensors.TF32_DEVICES or torch.is_autocast_enabled(kind) else nullcontext():
            self._exchange()
            if self.pending.gradients or self.skipped.reason:
                self._commit_all()
        if self.sync.ranks_follow == "step":
            self.bases.forget_all()
            self.tracker.end_step()
            self._follow_loss()

    def _exchange(self) -> None:
        """See that what waits belongs together, and tell the other processes."""
        losses = self.tracker.recent(self.checks.shown_losses) if self.sync.tells_mean else []
        try:
            if written := [record for record in self.store.records if record.plan.parameter.grad is not None]:
                self._receive_written(written)
            self._look_at_norm()
            self.checks.on_step(pending=len(self.pending.gradients))
            self.sync.check(self.pending)
        except Exception:  # the others wait for this process
            with suppress(ParallelError):
                self.sync.exchange(self.pending, losses, self.skipped, has_failed=True)
            raise
        result = self.sync.exchange(self.pending, losses, self.skipped)
        if result.loss is not None:
            self.tracker.record_mean(result.loss)

    def _receive_written(self, written: Sequence[ParamRecord]) -> None:
        """Take gradients that somebody has written into `.grad`, as every optimizer does: no backward has left one there."""
        name = written[0].plan.name
        if not self.tracker.is_shown:
            raise LossError(
                f"{name!r} holds a gradient in .grad, but the tracker was never shown a loss, or not since a checkpoint was "
                "loaded: before opt.step(), show it the loss that the gradient is of, tracker(loss), of which a number will do. "
                "Nothing was changed"
            )
        require_use_for(written, self)
        # A scaler or clipping over the optimizer's parameters has seen these themselves, beside the norm of what waits.
        self.pending.settle()
        for record in written:
            self.receive(record, self.take_written(record))

    def _commit_all(self) -> None:
        prepared = [] if self.skipped.reason else self._prepare()
        verdict = self.sync.all_finite(self.skipped) if prepared else self.skipped.verdict()
        if self.skipped.reason:
            self.pending.clear()
            self.bases.forget_all()
            self.skipped.skip(is_quiet=False)
            return
        check = None if verdict is None else torch.where(verdict, verdict.float(), torch.nan)
        for one in prepared:
            one.check = one.check if check is None else check
            self.committer.commit(one)
        if verdict is not None:
            self.skipped.await_verdict(verdict, [one.record for one in prepared])
        self.pending.clear()

    def _prepare(self) -> list[Prepared]:
        pending, clipper = self.pending, self.pending.clipper
        norm, factor = pending.norm_proxy.norm(), pending.read_factor()
        if clipper.is_active:
            count = self.tracker.count
            self.skipped.look(norm.isfinite(), lambda: f"the norm of all gradients is not finite at loss number {count}")
            factor = factor * clipper.factor(norm)
        if self.skipped.reason:  # the same in all processes, which know one norm
            return []
        pending.scale(factor)
        prepared: list[Prepared] = []
        for records in pending.batches():
            if len(records) == 1 or self.committer.compiled is not None:
                made = [self.committer.compute(record, pending.pop(record)) for record in records]
            else:
                made = self.committer.compute_batch(records, stacked([pending.pop(record) for record in records]))
            for one in made:
                self.skipped.look(one.check, partial(self.checks.bad_gradient_message, one.record))
            prepared += made
        if not self.skipped.reason:
            self.grad_norm = norm
        return prepared

    def drop(self) -> None:
        """Drop what waits: it counts for no step."""
        self._look_at_norm()
        super().drop()
        self.checks.gradients_dropped()
