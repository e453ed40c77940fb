"""The first of two rounds in which replicas sketch their gradients: they agree on the directions while backward still runs.

As in PowerSGD (arXiv 1905.13727): the mean of `G X` over all processes gives them one basis B, each keeps the `Gᵀ B` of its own
gradient, and the mean of these follows when the step is taken. That is the power step of one process on the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engine.pending import Pending, as_dense, is_small
from ..engine.record import ParamRecord
from ..gradient import GradientOperator, Sketched
from ..params.kinds import EMBEDDING
from ..tensors import compute_dtype_and_device
from .communicator import Communicator


def form_of(record: ParamRecord) -> str:
    """How a parameter's gradient waits and travels: alike on every rank, whatever came there, and as where one process trains.

    "entries" are all of them, "rows" those of an embedding that any rank has touched, "sketch" the two products r(m + n) in
    directions that all ranks share, "projection" the one product rm of a one-sided layer.
    """
    if not record.rule.has_rank:
        return "rows" if record.plan.kind == EMBEDDING and len(record.plan.shape) == 2 else "entries"
    if record.capture == "one_sided":
        return "projection"
    return "entries" if record.capture == "hook" and is_small(record) else "sketch"


class Directions(NamedTuple):
    """In which directions all processes sketch a matrix until the step is taken.

    Attributes:
        right: X, (..., n, r).
        left: L, (..., m, l), or None.
        left_spans: Whether L spans the mean of `G X`: then `Gᵀ L` tells all that is known, as long as nothing is added.
    """

    right: Tensor
    left: Tensor | None
    left_spans: bool


class Queued(GradientOperator):
    """Gradients of one parameter that have not had their turn yet, as they came.

    Args:
        record: The parameter.
        first: The one that gives the directions; None where what has come was zero.
    """

    def __init__(self, record: ParamRecord, first: GradientOperator | None = None) -> None:
        form = compute_dtype_and_device(record.plan.parameter)
        self.shape, self.dtype, self.device = torch.Size(record.plan.shape), form["dtype"], form["device"]
        self.first, self.rest = first, None  # type: GradientOperator | None, GradientOperator | None

    @property
    def is_sum(self) -> bool:
        """Whether several have come."""
        return self.rest is not None

    def add_(self, gradient: GradientOperator) -> Queued:
        if self.first is None:
            self.first = gradient
        else:
            self.rest = gradient if self.rest is None else as_dense(self.rest).add_(gradient)
        return self


class _MeanImage(GradientOperator):
    """`G x` is the mean over all processes, `Gᵀ y` this process' own: a rule's sketch of it has directions that all share.

    Args:
        record: The parameter.
        own: Its gradient here; None for zero.
        comm: The other processes.

    Attributes:
        is_seen: 0-dim boolean: whether the mean was not zero.
        is_finite_image: Likewise, whether it held no NaN or infinity.
    """

    is_seen: Tensor
    is_finite_image: Tensor

    def __init__(self, record: ParamRecord, own: GradientOperator | None, comm: Communicator) -> None:
        form = compute_dtype_and_device(record.plan.parameter)
        self.shape, self.dtype, self.device = torch.Size(record.plan.shape), form["dtype"], form["device"]
        self.operand_dtype = None if own is None else own.operand_dtype
        self._own, self._comm = own, comm

    def matmul(self, x: Tensor) -> Tensor:
        self._x, self._image = x, self.own_image(x)
        mean = self._image.clone(memory_format=torch.contiguous_format)
        self._comm.all_reduce(mean)
        mean /= self._comm.size
        self.is_seen, self.is_finite_image = mean.any(), mean.isfinite().all()
        # Directions of NaN would outlive the batch that has brought it.
        return torch.where(self.is_finite_image, mean, 0.0)

    def rmatmul(self, y: Tensor) -> Tensor:
        return y.new_zeros((*self.shape[:-2], self.shape[-1], y.shape[-1])) if self._own is None else self._own.rmatmul(y)

    def own_image(self, x: Tensor) -> Tensor:
        """`G x` of this process alone."""
        if x is getattr(self, "_x", None):
            return self._image
        return x.new_zeros((*self.shape[:-1], x.shape[-1])) if self._own is None else self._own.matmul(x)


class FirstRound:
    """Takes the matrices in one order on all ranks, each as soon as its gradient is there, at the end of backward otherwise.

    A rank whose backward brings none counts as zero. So no rank waits for more than the others' backward, and all ask for the
    same: a small all-reduce for each matrix. Gradients that come out of turn wait whole until then.

    Args:
        comm: The other processes.

    Attributes:
        directions: Number of a parameter → its directions in this step.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._order = comm, []  # type: Communicator, list[ParamRecord]
        self.restart()

    def join(self, model: nn.Module, records: Iterable[ParamRecord]) -> None:
        """Learn the order: as backward mostly takes them, from the model's last parameter to its first."""
        places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        self._order = sorted(records, key=lambda record: places[id(record.plan.parameter)], reverse=True)

    def restart(self) -> None:
        """A new step begins."""
        self.directions: dict[int, Directions] = {}
        self._place, self._is_over = 0, False
        self._is_seen: dict[int, Tensor] = {}
        self._unseen: list[ParamRecord] = []

    def hold(self, record: ParamRecord, gradient: GradientOperator, pending: Pending) -> GradientOperator:
        """What waits of a parameter's gradient: its sketch, or itself, until it has its turn."""
        known = self.directions.get(record.index)
        if known is not None and record not in self._unseen:
            return Sketched.of(gradient, known.right, known.left)
        pending.gradients[record.index] = Queued(record, gradient)
        if known is None:
            self._advance(pending)
        return pending.gradients[record.index]

    def finish(self, pending: Pending) -> None:
        """Backward has ended, or has brought nothing here: nothing more will come to this round."""
        if self._is_over:
            return
        self._advance(pending, is_last=True)
        self._is_over = True
        seen = torch.stack(list(self._is_seen.values())).tolist() if self._is_seen else []
        unseen = {index for index, is_seen in zip(self._is_seen, seen, strict=True) if not is_seen}
        self._unseen = [record for record in self._order if record.index in unseen]
        for record in self._unseen:
            if record.index in pending.gradients:
                pending.gradients[record.index] = Queued(record)

    def repeat(self, pending: Pending, waiting: Sequence[float]) -> None:
        """What no process had a gradient of, and some have meanwhile: after a second backward, say.

        Args:
            pending: What waits here.
            waiting: For each parameter, whether anything waits anywhere.
        """
        for record in self._unseen:
            if waiting[record.index]:
                self._sketch(record, pending)

    def _advance(self, pending: Pending, *, is_last: bool = False) -> None:
        while self._place < len(self._order):
            record = self._order[self._place]
            if form_of(record) == "sketch":
                if not is_last and record.index not in pending.gradients:
                    return
                self._sketch(record, pending)
            self._place += 1

    def _sketch(self, record: ParamRecord, pending: Pending) -> None:
        queued, store = pending.gradients.get(record.index), pending.store
        first, rest = (queued.first, queued.rest) if isinstance(queued, Queued) else (None, None)
        mean = _MeanImage(record, first, self._comm)
        made = record.rule.sketch(mean, store.read(record), store.context(record))
        self.directions[record.index] = Directions(made.right, made.left, made.left_spans)
        self._is_seen[record.index] = mean.is_seen
        if queued is not None:
            made.right_sketch = mean.own_image(made.right)
            if made.left_sketch is not None:  # as large entries give it, whose products overflow
                made.left_sketch = torch.where(mean.is_finite_image, made.left_sketch, torch.nan)
            pending.gradients[record.index] = made if rest is None else made.add_(rest)
