"""What the processes exchange at a step: one flat buffer of sketches, in the order of the parameters, summed over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..capture.select import as_dense, compact
from ..engine.record import ParamRecord, compute_dtype_and_device
from ..errors import ParallelError
from ..gradient import Dense, GradientOperator, RowSparse, Sketched
from ..params.kinds import EMBEDDING
from .communicator import Communicator, ranks_named

# How a process comes to a step: with sound gradients (or none), with NaN or infinity, or with an error.
FINE, NOT_FINITE, FAILED = 0, 1, 2

# Checksums are kept below this, so that float32 holds them exactly.
_CHECKSUMS = 2**23

Bases = Callable[[ParamRecord], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SyncResult:
    """What all processes know of each other after an exchange.

    Attributes:
        loss: Mean over the processes that have shown a finite loss since the last step; None where none has.
        not_finite: Ranks that had NaN or infinity.
        failed: Ranks that came with an error.
    """

    loss: float | None
    not_finite: list[int]
    failed: list[int]


def form_of(record: ParamRecord) -> str:
    """How a parameter's gradient waits and travels: alike on every rank, whatever came there.

    "entries" are all of them, "rows" those of a table that any rank has touched, "sketch" the two products r(m + n) in bases that
    all ranks know, "projection" the one product rm of a one-sided layer.
    """
    shape, rule = record.plan.shape, record.rule
    if rule.is_elementwise:
        return "rows" if record.plan.kind == EMBEDDING and len(shape) == 2 else "entries"
    if record.capture == "one_sided":
        return "projection"
    m, n = shape[-2:]
    return "entries" if record.rank * (m + n) >= m * n else "sketch"


def as_shared(record: ParamRecord, gradient: GradientOperator, bases: Bases) -> GradientOperator:
    """A step's first gradient of a parameter in that form; further ones are added with `add_`."""
    form = form_of(record)
    if form == "rows":
        return compact(gradient)
    if form == "entries":
        return as_dense(gradient)
    right, left = bases(record)
    is_done = isinstance(gradient, Sketched) and gradient.right is right and gradient.left is left
    return gradient if is_done else Sketched.of(gradient, right, left)


def exchange(
    replicas: Communicator, records: Sequence[ParamRecord], bases: Bases, *, losses: Sequence[float], status: int
) -> SyncResult:
    """Put the mean over all processes in the place of what waits; a process where nothing waits counts as zero.

    One all-reduce of `2 + 2 · processes + parameters` numbers and the parameters' own; before it one of a byte per row where
    there are tables. A parameter that no process has used waits nowhere afterwards; where one has NaN or an error, none does.

    Args:
        replicas: The processes.
        records: All parameters, in the same order everywhere.
        bases: X and L of a parameter, the same everywhere.
        losses: Shown here since the last step.
        status: Of this process: `FINE`, `NOT_FINITE` or `FAILED`.

    Raises:
        ParallelError: a process is missing, or the weights are no longer the same.
    """
    replicas.begin_collective()
    if status != FINE:
        for record in records:
            record.pending = None
    touched = _touched_rows(replicas, records)
    watched = records[replicas.meetings % len(records)]
    own = header(replicas, records, watched, losses, status)
    sizes = [[math.prod(shape) for shape in _shapes(record, touched)] for record in records]
    buffer = _packed(own, records, touched, sum(map(sum, sizes)))
    known = {
        record.index: (record.pending.right, record.pending.left) for record in records if isinstance(record.pending, Sketched)
    }
    for record in records:
        record.pending = None
    replicas.all_reduce(buffer)
    told, has_any = read(buffer[: len(own)].tolist(), replicas.size, watched)
    body = buffer[len(own) :].div_(replicas.size)
    is_whole = not (told.not_finite or told.failed)
    for record, own, has in zip(records, body.split([sum(size) for size in sizes]), has_any, strict=True):
        if has and is_whole:
            record.pending = _unpacked(record, own, touched, lambda record: known.get(record.index) or bases(record))
    return told


def _touched_rows(replicas: Communicator, records: Sequence[ParamRecord]) -> dict[int, Tensor]:
    """Row numbers of each table that any process has a gradient of, ascending."""
    tables = [record for record in records if form_of(record) == "rows"]
    if not tables:
        return {}
    counts = [record.plan.shape[0] for record in tables]
    masks = torch.zeros(sum(counts), dtype=torch.uint8, device=tables[0].plan.parameter.device)
    for record, mask in zip(tables, masks.split(counts), strict=True):
        if isinstance(record.pending, RowSparse):
            mask.index_fill_(0, record.pending.rows, 1)
        elif record.pending is not None:
            mask.copy_((record.pending.matrix != 0).any(dim=-1))
    replicas.all_reduce(masks, distributed.ReduceOp.MAX)
    return {record.index: mask.nonzero().squeeze(-1) for record, mask in zip(tables, masks.split(counts), strict=True)}


def header(
    replicas: Communicator, records: Sequence[ParamRecord], watched: ParamRecord, losses: Sequence[float], status: int
) -> list[float]:
    """What a process tells of itself, to be summed: mean loss, status, checksum of a parameter, and what waits of `records`."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    own = [0.0] * (2 * replicas.size)
    own[replicas.rank], own[replicas.size + replicas.rank] = status, checksum(watched.plan.parameter)
    loss = [sum(finite) / len(finite), 1.0] if finite else [0.0, 0.0]
    return [*loss, *own, *(float(record.pending is not None) for record in records)]


def checksum(*tensors: Tensor) -> int:
    """Of the bits of tensors on one device: another one where two replicas have drifted apart, almost surely."""
    return int(torch.stack([_sum_of_bits(tensor.detach()) for tensor in tensors]).sum() % _CHECKSUMS) if tensors else 0


def _sum_of_bits(tensor: Tensor) -> Tensor:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(bits).sum(dtype=torch.int64)


def read(header: list[float], size: int, watched: ParamRecord) -> tuple[SyncResult, list[float]]:
    """The sum of all headers: what was told, and what stands behind it.

    Raises:
        ParallelError: the watched parameter is not the same everywhere.
    """
    loss, count = header[:2]
    statuses, sums, has_any = header[2 : 2 + size], header[2 + size : 2 + 2 * size], header[2 + 2 * size :]
    told = SyncResult(
        loss / count if count else None,
        [rank for rank, status in enumerate(statuses) if status == NOT_FINITE],
        [rank for rank, status in enumerate(statuses) if status == FAILED],
    )
    drifted = [rank for rank, checksum in enumerate(sums) if checksum != sums[0]]
    if drifted and not told.failed:
        raise ParallelError(
            f"{watched.plan.name!r} has other weights on {ranks_named(drifted)} than on rank 0: the replicas have drifted apart. "
            "Load the same checkpoint on every rank, change weights on all ranks alike, and run them on the same hardware"
        )
    return told, has_any


def _shapes(record: ParamRecord, touched: dict[int, Tensor]) -> list[tuple[int, ...]]:
    form, shape = form_of(record), tuple(record.plan.shape)
    if form == "entries":
        return [shape]
    *batch, m, n = shape
    if form == "rows":
        return [(len(touched[record.index]), n)]
    sides = (m, n) if form == "sketch" else (m,)
    return [(*batch, side, record.rank) for side in sides]


def _packed(header: list[float], records: Sequence[ParamRecord], touched: dict[int, Tensor], count: int) -> Tensor:
    forms = [compute_dtype_and_device(record.plan.parameter) for record in records]
    dtype = max((form["dtype"] for form in forms), key=lambda dtype: dtype.itemsize)
    buffer = torch.zeros(len(header) + count, dtype=dtype, device=forms[0]["device"])
    buffer[: len(header)] = torch.tensor(header, dtype=dtype)
    start = len(header)
    for record in records:
        shapes = _shapes(record, touched)
        for shape, part in zip(shapes, _parts(record, touched) or [None] * len(shapes), strict=True):
            end = start + math.prod(shape)
            if part is not None:
                buffer[start:end].view(shape).copy_(part)
            start = end
    return buffer


def _parts(record: ParamRecord, touched: dict[int, Tensor]) -> list[Tensor]:
    waiting = record.pending
    if waiting is None:
        return []
    if isinstance(waiting, Sketched):
        return [waiting.right_sketch] if waiting.left is None else [waiting.right_sketch, waiting.left_sketch]
    if record.index not in touched:
        return [waiting.matrix]
    rows = touched[record.index]
    if isinstance(waiting, RowSparse):
        places = torch.searchsorted(rows, waiting.rows)
        return [waiting.values.new_zeros((len(rows), waiting.shape[1])).index_add_(0, places, waiting.values)]
    return [waiting.matrix[rows]]


def _unpacked(record: ParamRecord, numbers: Tensor, touched: dict[int, Tensor], bases: Bases) -> GradientOperator:
    shapes, form = _shapes(record, touched), form_of(record)
    numbers = numbers.to(compute_dtype_and_device(record.plan.parameter)["dtype"])
    parts = [part.view(shape) for part, shape in zip(numbers.split([math.prod(shape) for shape in shapes]), shapes, strict=True)]
    if form == "entries":
        return Dense(parts[0], is_owned=True)
    if form == "rows":
        rows, count = touched[record.index], record.plan.shape[0]
        return Dense(parts[0], is_owned=True) if len(rows) == count else RowSparse(rows, parts[0], count)
    right, left = bases(record)
    return Sketched(right, parts[0], left, parts[1] if form == "sketch" else None)
