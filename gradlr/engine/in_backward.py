"""`apply="backward"`: each weight is updated as its gradient arrives."""

from __future__ import annotations

from ..gradient import GradientOperator
from ..tensors import is_async
from .policy import CommitPolicy
from .record import ParamRecord


class InBackward(CommitPolicy):
    """Commits every gradient at once. Errors come at once as well: what was updated before them stays so."""

    _dropped_serial: int | None = None

    def _take(self, record: ParamRecord, gradient: GradientOperator) -> None:
        if self._dropped_serial == self.tracker.serial:
            self.bases.forget(record)
            return
        layout = record.plan.layout
        is_finite = gradient.is_finite()
        if layout.is_whole and not is_async(is_finite):
            self.checks.require_finite(record, is_finite)  # rules are promised finite gradients
        prepared = self.committer.compute(record, gradient)
        # Of a sharded parameter each process takes part in what the others compute, and all hear of what is not finite.
        prepared.is_finite = ~layout.anywhere(~prepared.is_finite)
        self.checks.require_finite(record, prepared.is_finite)
        self.committer.commit(prepared)

    def _on_bad_loss(self) -> None:
        self._dropped_serial = self.tracker.serial
        self.skipped.skip(is_quiet=False)

    def step(self) -> None:
        """There is nothing left to do but to see that all is well."""
        self.checks.on_step(pending=0)
