"""Replicas: each process trains the whole model on its own batches, and `step()` exchanges what waits.

One flat buffer, in the order of the parameters, is summed over all processes: of a matrix nr numbers, mr having gone before in
backward (`first_round`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..engine.pending import Pending, as_dense, without_activations
from ..engine.record import ParamRecord
from ..engine.skipped_steps import SkippedSteps
from ..engine.state_store import StateStore
from ..engine.sync import StepStatus, Sync, SyncResult, apply_sync_result, step_status
from ..errors import ArgumentError, ParallelError
from ..gradient import Dense, GradientOperator, RowSparse, Sketched
from ..tensors import compute_dtype_and_device, device_traits, full_precision, widest
from ..tracker import LossTracker
from .communicator import Communicator, ranks_named
from .fingerprint import checksum, fingerprint, state_fingerprint
from .first_round import FirstRound, Queued, form_of


class Replicated(Sync):
    """The other processes of a group, each with a replica of the model.

    Args:
        comm: Talks to them.
    """

    tells_mean = True
    ranks_follow = "step"
    shares_bases = True
    has_begun = False

    def __init__(self, comm: Communicator) -> None:
        self.comm: Communicator = comm
        self._round = FirstRound(comm)

    def join(self, model: nn.Module, store: StateStore, options: Mapping[str, Any]) -> None:
        self.comm.assert_same_on_all_ranks(fingerprint(store, options))
        self.comm.broadcast(model)
        self._round.join(model, store.records)

    def begin(self, tracker: LossTracker, pending: Pending) -> None:
        self._begin()
        if torch._C._current_graph_task_id() != -1:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, tracker, pending))

    def _begin(self) -> None:
        self.has_begun = True
        self.comm.begin_collective()

    @torch.no_grad()
    def _end_backward(self, tracker: LossTracker, pending: Pending) -> None:
        # Reentrant checkpointing runs backwards inside of one; the outer one goes on then, and brings more.
        if not tracker.open_backwards:
            with full_precision(pending.norm_proxy.parameter.device):
                self._round.finish(pending)

    def hold(self, record: ParamRecord, gradient: GradientOperator, pending: Pending) -> GradientOperator:
        form = form_of(record)
        if form == "rows":
            return without_activations(gradient)
        if form == "entries":
            return as_dense(gradient)
        if form == "sketch":
            return self._round.hold(record, gradient, pending)
        right = pending.bases.known(record)
        return gradient if isinstance(gradient, Sketched) and gradient.right is right else Sketched.of(gradient, right)

    def energy(self, record: ParamRecord, energy: Tensor | None, held: GradientOperator) -> Tensor:
        # The norm is not known before the exchange: a mark shows whether somebody clips or unscales here until then.
        return widest(torch.ones((), device=held.device))

    def check(self, pending: Pending) -> None:
        if pending.norm_proxy.is_changed():
            raise ArgumentError(
                "the gradients were clipped or unscaled over opt.param_groups (clip_grad_norm_, GradScaler?), but with a process "
                "group each process holds its own part of them until opt.step(). Give max_grad_norm= to attach, and train in "
                "bfloat16 rather than with a GradScaler. What waited for this step is dropped"
            )

    def exchange(
        self, pending: Pending, losses: Sequence[float], skipped: SkippedSteps, *, has_failed: bool = False
    ) -> SyncResult:
        """Put the mean over all processes in the place of what waits; a process where nothing waits counts as zero.

        One all-reduce of `2 + 2 · processes + parameters` numbers, where there are embeddings one of a byte per row, and one
        of the parameters' own numbers. A parameter that no process has used waits nowhere afterwards; where one has NaN or an
        error, none does.

        Raises:
            ParallelError: a process is missing or has failed, or the weights are no longer the same.
        """
        try:
            return self._exchange(pending, losses, skipped, has_failed=has_failed)
        finally:
            self._restart()

    def _exchange(self, pending: Pending, losses: Sequence[float], skipped: SkippedSteps, *, has_failed: bool) -> SyncResult:
        status, own_reason = step_status(skipped, has_failed=has_failed)
        if not self.has_begun:  # without a gradient here
            self._begin()
        if status != StepStatus.OK:
            pending.clear()
        self._round.finish(pending)
        records = pending.store.records
        watched = records[self.comm.meetings % len(records)]
        header = _header(self.comm, pending, watched, losses, status)
        self.comm.all_reduce(header)
        result, waiting = _read_header(header.tolist(), self.comm.size, watched)
        apply_sync_result(result, skipped, self.comm.rank, own_reason)
        if result.not_finite:
            pending.clear()
        else:
            self._round.repeat(pending, waiting)
            self._take_mean(pending, waiting)
        return result

    def _take_mean(self, pending: Pending, waiting: Sequence[float]) -> None:
        """Let the mean over all processes wait, with its norm."""
        used = [record for record in pending.store.records if waiting[record.index]]
        touched = _touched_rows(self.comm, pending, used)
        shapes = [self._shapes(record, touched, is_sum=waiting[record.index] > self.comm.size) for record in used]
        buffer = _packed(pending, used, touched, shapes)
        projected = {index: one.right for index, one in pending.gradients.items() if isinstance(one, Sketched)}
        pending.clear()
        self.comm.all_reduce(buffer)
        parts = buffer.div_(self.comm.size).split([sum(map(math.prod, sizes)) for sizes in shapes])
        for record, own, sizes in zip(used, parts, shapes, strict=True):
            own = own.to(compute_dtype_and_device(record.plan.parameter)["dtype"])
            tensors = [part.view(size) for part, size in zip(own.split([math.prod(size) for size in sizes]), sizes, strict=True)]
            gradient = self._operator(record, tensors, touched, projected, pending)
            pending.gradients[record.index] = gradient
            pending.norm_proxy.record(record.index, gradient.squared_norm())

    def _shapes(self, record: ParamRecord, touched: Mapping[int, Tensor], *, is_sum: bool) -> list[tuple[int, ...]]:
        """Shapes of what a parameter has in the buffer."""
        form, shape = form_of(record), tuple(record.plan.shape)
        *batch, m, n = (1, 1, *shape)[-max(2, len(shape)) :]
        if form == "entries":
            return [shape]
        if form == "rows":
            return [(len(touched[record.index]), n)]
        if form == "projection":
            return [(*batch, m, record.rank)]
        right, left, left_spans = self._round.directions[record.index]
        # Where `Gᵀ L` tells all, `G X` has travelled before, and need not again.
        image = [] if left_spans and not is_sum else [(*batch, m, right.shape[-1])]
        return image if left is None else [*image, (*batch, n, left.shape[-1])]

    def _operator(
        self,
        record: ParamRecord,
        tensors: list[Tensor],
        touched: Mapping[int, Tensor],
        projected: Mapping[int, Tensor],
        pending: Pending,
    ) -> GradientOperator:
        form = form_of(record)
        if form == "rows" and len(tensors[0]) < record.plan.shape[0]:
            return RowSparse(touched[record.index], tensors[0], record.plan.shape[0])
        if form in ("rows", "entries"):
            return Dense(tensors[0], is_owned=True)
        if form == "projection":
            right = projected.get(record.index)
            return Sketched(pending.bases.known(record) if right is None else right, tensors[0])
        right, left, _ = self._round.directions[record.index]
        if left is None or len(tensors) == 2:
            return Sketched(right, tensors[0], left, tensors[1] if left is not None else None)
        (seen,) = tensors
        return Sketched(right, left @ (seen.mT @ right), left, seen, left_spans=True)

    def assert_same_state(self, store: StateStore, options: Mapping[str, Any]) -> None:
        self._restart()
        self.comm.assert_same_on_all_ranks(state_fingerprint(store, options))

    def _restart(self) -> None:
        self.has_begun = False
        self._round.restart()


def _touched_rows(comm: Communicator, pending: Pending, used: Sequence[ParamRecord]) -> dict[int, Tensor]:
    """Row numbers of each embedding that any process has a gradient of, ascending."""
    tables = [record for record in used if form_of(record) == "rows"]
    if not tables:
        return {}
    counts = [record.plan.shape[0] for record in tables]
    masks = torch.zeros(sum(counts), dtype=torch.uint8, device=tables[0].plan.parameter.device)
    for record, mask in zip(tables, masks.split(counts), strict=True):
        gradient = pending.gradients.get(record.index)
        if isinstance(gradient, RowSparse):
            mask.index_fill_(0, gradient.rows, 1)
        elif gradient is not None:
            mask.copy_((gradient.matrix != 0).any(dim=-1))
    comm.all_reduce(masks, distributed.ReduceOp.MAX)
    return {record.index: mask.nonzero().squeeze(-1) for record, mask in zip(tables, masks.split(counts), strict=True)}


def _header(comm: Communicator, pending: Pending, watched: ParamRecord, losses: Sequence[float], status: StepStatus) -> Tensor:
    """What a process tells of itself, to be summed: mean loss, status, checksum of a parameter, and what waits.

    A one where a gradient waits; more than all ones together where that is a sum of several.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    loss = [sum(finite) / len(finite), 1.0] if finite else [0.0, 0.0]
    own, waiting = [0.0] * (2 * comm.size), pending.gradients
    own[comm.rank], own[comm.size + comm.rank] = float(status), float(checksum(watched.plan.parameter))
    held = [waiting.get(record.index) for record in pending.store.records]
    told = [0.0 if one is None else 1.0 + comm.size * _is_sum(one) for one in held]
    device = watched.plan.parameter.device
    return torch.tensor([*loss, *own, *told], dtype=device_traits(device).widest_float, device=device)


def _is_sum(held: GradientOperator) -> bool:
    """Whether a sketch is not, or will not be, in the directions of a single gradient."""
    return held.is_sum if isinstance(held, Queued) else isinstance(held, Sketched) and not held.left_spans


def _read_header(header: list[float], size: int, watched: ParamRecord) -> tuple[SyncResult, list[float]]:
    """The sum of all headers: what was told, and what of each parameter waits anywhere.

    Raises:
        ParallelError: the watched parameter is not the same everywhere.
    """
    (loss, count), statuses, sums = header[:2], header[2 : 2 + size], header[2 + size : 2 + 2 * size]
    result = SyncResult(loss / count if count else None, *ranks_with_trouble(statuses))
    drifted = [rank for rank, one in enumerate(sums) if one != sums[0]]
    if drifted and not result.failed:
        raise ParallelError(
            f"{watched.plan.name!r} has other weights on {ranks_named(drifted)} than on rank 0: the replicas have drifted apart. "
            "Load the same checkpoint on every rank, change weights on all ranks alike, and run them on the same hardware"
        )
    return result, header[2 + 2 * size :]


def ranks_with_trouble(statuses: Sequence[float]) -> tuple[list[int], list[int]]:
    """Of each process' status: the ranks that had NaN or infinity, and those that came with an error."""
    kinds = (StepStatus.NOT_FINITE, StepStatus.FAILED)
    not_finite, failed = ([rank for rank, status in enumerate(statuses) if status == kind] for kind in kinds)
    return not_finite, failed


def _packed(
    pending: Pending,
    used: Sequence[ParamRecord],
    touched: Mapping[int, Tensor],
    shapes: Sequence[list[tuple[int, ...]]],
) -> Tensor:
    """The buffer: what waits here of each parameter, zeros where nothing does."""
    forms = [compute_dtype_and_device(record.plan.parameter) for record in pending.store.records]
    dtype = max((form["dtype"] for form in forms), key=lambda dtype: dtype.itemsize)
    buffer = torch.zeros(sum(math.prod(shape) for sizes in shapes for shape in sizes), dtype=dtype, device=forms[0]["device"])
    start = 0
    for record, sizes in zip(used, shapes, strict=True):
        parts = _parts(pending.gradients.get(record.index), touched.get(record.index))
        # Of a sketch the last ones, where the first need not travel.
        parts = parts[-len(sizes) :]
        for place, shape in enumerate(sizes):
            end = start + math.prod(shape)
            if parts:
                buffer[start:end].view(shape).copy_(parts[place])
            start = end
    return buffer


def _parts(gradient: GradientOperator | None, rows: Tensor | None) -> list[Tensor]:
    if gradient is None:
        return []
    if isinstance(gradient, Sketched):
        return [part for part in (gradient.right_sketch, gradient.left_sketch) if part is not None]
    if rows is None:
        return [gradient.matrix]
    if isinstance(gradient, RowSparse):
        places = torch.searchsorted(rows, gradient.rows)
        return [gradient.values.new_zeros((len(rows), gradient.shape[1])).index_add_(0, places, gradient.values)]
    return [gradient.matrix[rows]]
