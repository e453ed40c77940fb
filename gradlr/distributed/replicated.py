"""Replicas: each process trains the whole model on its own batches, and `step()` exchanges what waits.

One flat buffer of sketches, in the order of the parameters, is summed over all processes: r(m + n) numbers per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from ..params.kinds import EMBEDDING
from ..tensors import compute_dtype_and_device, widest
from .communicator import Communicator, ranks_named
from .fingerprint import checksum, fingerprint, state_fingerprint


class Replicated(Sync):
    """The other processes of a group, each with a replica of the model.

    Args:
        comm: Talks to them.
    """

    tells_mean = True
    ranks_follow = "step"
    shares_bases = True

    def __init__(self, comm: Communicator) -> None:
        self.comm: Communicator = comm

    def join(self, model: nn.Module, store: StateStore, options: Mapping[str, Any]) -> None:
        self.comm.assert_same_on_all_ranks(fingerprint(store, options))
        self.comm.broadcast(model)

    def hold(self, record: ParamRecord, gradient: GradientOperator, pending: Pending) -> GradientOperator:
        form = form_of(record)
        if form == "rows":
            return without_activations(gradient)
        if form == "entries":
            return as_dense(gradient)
        right, left = pending.bases.both(record)
        is_done = isinstance(gradient, Sketched) and gradient.right is right and gradient.left is left
        return gradient if is_done else Sketched.of(gradient, right, left)

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

        One all-reduce of `2 + 2 · processes + parameters` numbers and the parameters' own; before it one of a byte per row where
        there are embeddings. A parameter that no process has used waits nowhere afterwards; where one has NaN or an error, none
        does.

        Raises:
            ParallelError: a process is missing or has failed, or the weights are no longer the same.
        """
        status, own_reason = step_status(skipped, has_failed=has_failed)
        self.comm.begin_collective()
        records = pending.store.records
        if status != StepStatus.OK:
            pending.clear()
        watched = records[self.comm.meetings % len(records)]
        touched = _touched_rows(self.comm, pending)
        header = _header(self.comm, pending, watched, losses, status)
        shapes = {record.index: _shapes(record, touched) for record in records}
        buffer = _packed(header, pending, touched, shapes)
        sketched = {index: one for index, one in pending.gradients.items() if isinstance(one, Sketched)}
        pending.clear()
        self.comm.all_reduce(buffer)
        result, has_any = _read_header(buffer[: len(header)].tolist(), self.comm.size, watched)
        apply_sync_result(result, skipped, self.comm.rank, own_reason)
        if not result.not_finite:
            numbers = buffer[len(header) :].div_(self.comm.size)
            self._unpack(pending, numbers, has_any, touched, shapes, sketched)
        return result

    def _unpack(
        self,
        pending: Pending,
        numbers: Tensor,
        has_any: Sequence[float],
        touched: Mapping[int, Tensor],
        shapes: Mapping[int, list[tuple[int, ...]]],
        sketched: Mapping[int, Sketched],
    ) -> None:
        """Let the mean wait, with its norm."""
        records = pending.store.records
        parts = numbers.split([sum(map(math.prod, shapes[record.index])) for record in records])
        for record, own, has in zip(records, parts, has_any, strict=True):
            if not has:
                continue
            own = own.to(compute_dtype_and_device(record.plan.parameter)["dtype"])
            sizes = shapes[record.index]
            tensors = [part.view(size) for part, size in zip(own.split([math.prod(size) for size in sizes]), sizes, strict=True)]
            gradient = self._operator(record, tensors, touched, sketched, pending)
            pending.gradients[record.index] = gradient
            pending.norm_proxy.record(record.index, gradient.squared_norm())

    def _operator(
        self,
        record: ParamRecord,
        tensors: list[Tensor],
        touched: Mapping[int, Tensor],
        sketched: Mapping[int, Sketched],
        pending: Pending,
    ) -> GradientOperator:
        form = form_of(record)
        if form == "rows" and len(tensors[0]) < record.plan.shape[0]:
            return RowSparse(touched[record.index], tensors[0], record.plan.shape[0])
        if form in ("rows", "entries"):
            return Dense(tensors[0], is_owned=True)
        own = sketched.get(record.index)
        right, left = pending.bases.both(record) if own is None else (own.right, own.left)
        return Sketched(right, tensors[0], left, tensors[1] if form == "sketch" else None)

    def assert_same_state(self, store: StateStore, options: Mapping[str, Any]) -> None:
        self.comm.assert_same_on_all_ranks(state_fingerprint(store, options))


def form_of(record: ParamRecord) -> str:
    """How a parameter's gradient waits and travels: alike on every rank, whatever came there.

    "entries" are all of them, "rows" those of an embedding that any rank has touched, "sketch" the two products r(m + n) in bases
    that all ranks know, "projection" the one product rm of a one-sided layer.
    """
    shape = record.plan.shape
    if not record.rule.has_rank:
        return "rows" if record.plan.kind == EMBEDDING and len(shape) == 2 else "entries"
    if record.capture == "one_sided":
        return "projection"
    m, n = shape[-2:]
    return "entries" if record.rank * (m + n) >= m * n else "sketch"


def _touched_rows(comm: Communicator, pending: Pending) -> dict[int, Tensor]:
    """Row numbers of each embedding that any process has a gradient of, ascending."""
    tables = [record for record in pending.store.records if form_of(record) == "rows"]
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


def _header(
    comm: Communicator, pending: Pending, watched: ParamRecord, losses: Sequence[float], status: StepStatus
) -> list[float]:
    """What a process tells of itself, to be summed: mean loss, status, checksum of a parameter, and what waits."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    own = [0.0] * (2 * comm.size)
    own[comm.rank], own[comm.size + comm.rank] = float(status), float(checksum(watched.plan.parameter))
    loss = [sum(finite) / len(finite), 1.0] if finite else [0.0, 0.0]
    return [*loss, *own, *(float(record.index in pending.gradients) for record in pending.store.records)]


def _read_header(header: list[float], size: int, watched: ParamRecord) -> tuple[SyncResult, list[float]]:
    """The sum of all headers: what was told, and which parameters any process has a gradient of.

    Raises:
        ParallelError: the watched parameter is not the same everywhere.
    """
    loss, count = header[:2]
    statuses, sums, has_any = header[2 : 2 + size], header[2 + size : 2 + 2 * size], header[2 + 2 * size :]
    result = SyncResult(loss / count if count else None, *ranks_with_trouble(statuses))
    drifted = [rank for rank, one in enumerate(sums) if one != sums[0]]
    if drifted and not result.failed:
        raise ParallelError(
            f"{watched.plan.name!r} has other weights on {ranks_named(drifted)} than on rank 0: the replicas have drifted apart. "
            "Load the same checkpoint on every rank, change weights on all ranks alike, and run them on the same hardware"
        )
    return result, has_any


def ranks_with_trouble(statuses: Sequence[float]) -> tuple[list[int], list[int]]:
    """Of each process' status: the ranks that had NaN or infinity, and those that came with an error."""
    kinds = (StepStatus.NOT_FINITE, StepStatus.FAILED)
    not_finite, failed = ([rank for rank, status in enumerate(statuses) if status == kind] for kind in kinds)
    return not_finite, failed


def _shapes(record: ParamRecord, touched: Mapping[int, Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what a parameter has in the buffer."""
    form, shape = form_of(record), tuple(record.plan.shape)
    if form == "entries":
        return [shape]
    *batch, m, n = shape
    if form == "rows":
        return [(len(touched[record.index]), n)]
    return [(*batch, side, record.rank) for side in ((m, n) if form == "sketch" else (m,))]


def _packed(
    header: list[float], pending: Pending, touched: Mapping[int, Tensor], shapes: Mapping[int, list[tuple[int, ...]]]
) -> Tensor:
    """The buffer: the header, then what waits here; zeros where nothing does."""
    records = pending.store.records
    forms = [compute_dtype_and_device(record.plan.parameter) for record in records]
    dtype = max((form["dtype"] for form in forms), key=lambda dtype: dtype.itemsize)
    count = sum(math.prod(shape) for record in records for shape in shapes[record.index])
    buffer = torch.zeros(len(header) + count, dtype=dtype, device=forms[0]["device"])
    buffer[: len(header)] = torch.tensor(header, dtype=dtype)
    start = len(header)
    for record in records:
        parts = _parts(pending.gradients.get(record.index), touched.get(record.index))
        for place, shape in enumerate(shapes[record.index]):
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
