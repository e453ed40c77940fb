"""`apply="backward"`: each weight is updated as its gradient arrives."""

from __future__ import annotations

import math

import torch

from ..gradient import GradientOperator
from ..tensors import is_async
from .policy import CommitPolicy, require_use_for
from .record import ParamRecord


class InBackward(CommitPolicy):
    """Commits every gradient at once. Errors come at once as well: what was updated before them stays so."""

    refuses_written = True
    _dropped_serial: int | None = None

    def _take(self, record: ParamRecord, gradient: GradientOperator) -> None:
        if self._dropped_serial == self.tracker.serial:
            self.bases.forget(record)
            return
        layout, prepared = record.plan.layout, self.committer.compute(record, gradient)
        if not layout.is_whole:
            # Each process takes part in what the others compute, and all hear of what is not finite.
            is_bad = layout.anywhere(~prepared.check.isfinite())
            prepared.check = torch.where(is_bad, torch.nan, torch.zeros_like(prepared.check))
        if is_async(prepared.check):
            self.checks.read_later(record, prepared.check)
        elif not math.isfinite(prepared.check):
            raise self.checks.not_finite(record)
        self.committer.commit(prepared)

    def _on_bad_loss(self) -> None:
        self._dropped_serial = self.tracker.serial
        self.skipped.skip(is_quiet=False)

    def step(self) -> None:
        """There is nothing left to do but to see that all is well."""
        if written := [record for record in self.store.records if record.plan.parameter.grad is not None]:
            self.committer.changed.clear()  # by their own backward, which is through
            require_use_for(written, self)
        self.checks.on_step(pending=0)
