"""What waits for `opt.step()`: a sketch of each matrix's gradient, or the gradient itself where that is smaller."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from torch import Tensor

from ..errors import ArgumentError
from ..gradient import Dense, GradientOperator, OuterProduct, RowSparse, Sketched
from ..gradient.batch import batch_key, batch_numbers
from ..tensors import AsyncScalar, compute_dtype_and_device, is_async
from .bases import Bases
from .grad_norm import GradClipper, GradNormProxy
from .record import ParamRecord
from .skipped_steps import SkippedSteps
from .state_store import StateStore

# Numbers that are copied into one batch: half as many as a gradient has, for which backward had room, but 4 to 24 MiB in float32.
_BATCH_NUMBERS = 2**20, 6 * 2**20


class Holder(Protocol):
    """Who decides in which form a gradient waits: `Sync`."""

    shares_bases: bool
    norm_in_groups: bool

    def hold(self, record: ParamRecord, gradient: GradientOperator, pending: Pending) -> GradientOperator: ...

    def energy(self, record: ParamRecord, energy: Tensor | None, held: GradientOperator) -> Tensor: ...


class Pending:
    """The gradients of a step, as operators that add, and their global norm.

    Args:
        store: State of the parameters.
        bases: In which gradients are sketched where these are known before the gradient.
        sync: The other processes.
        skipped: Told where values were clipped.
        clipper: Whether the norm must be known exactly.

    Attributes:
        gradients: Number of a parameter → what waits for it; one dict for good.
        norm_proxy: The global norm, where `GradScaler` and `clip_grad_norm_` look for it: among the parameters of the last group,
            as long as something waits. Who walks the groups at other times finds the model's parameters there, and no others.
    """

    def __init__(self, store: StateStore, bases: Bases, sync: Holder, skipped: SkippedSteps, clipper: GradClipper) -> None:
        self.store, self.bases, self.sync, self.skipped, self.clipper = store, bases, sync, skipped, clipper
        self.gradients: dict[int, GradientOperator] = {}
        self.norm_proxy = GradNormProxy(**compute_dtype_and_device(store.records[0].plan.parameter))
        self._blank: dict[int, AsyncScalar] = {}

    def __len__(self) -> int:
        return len(self.gradients)

    def records(self) -> list[ParamRecord]:
        """The parameters that have a gradient here, in their order."""
        return [record for record in self.store.records if record.index in self.gradients]

    def batches(self) -> list[list[ParamRecord]]:
        """The same, those together whose updates can be made as one."""
        alike: dict[Hashable, list[ParamRecord]] = {}
        for record in self.records():
            rule, shape = record.rule, self.gradients[record.index].shape
            is_alone = not rule.is_batched or len(shape) > 2 or record.observer is not None or not record.plan.layout.is_whole
            key = (id(rule), shape, record.rank, record.momentum_rank, record.group_index)
            alike.setdefault(record.index if is_alone else key, []).append(record)
        return [batch for records in alike.values() for batch in ([records] if len(records) == 1 else self._split(records))]

    def _split(self, records: list[ParamRecord]) -> list[list[ParamRecord]]:
        """By the form of the gradient and the number of the step, so few at a time that their copies stay small."""
        alike: dict[Hashable, list[ParamRecord]] = {}
        for record in records:
            key = batch_key(self.gradients[record.index])
            alike.setdefault(record.index if key is None else (key, int(self.store.of(record)["step"])), []).append(record)
        found, (least, most) = [], _BATCH_NUMBERS
        for same in alike.values():
            gradient = self.gradients[same[0].index]
            size = max(1, min(max(gradient.shape.numel() // 2, least), most) // batch_numbers(gradient))
            found += [same[start : start + size] for start in range(0, len(same), size)]
        return found

    def add(self, record: ParamRecord, gradient: GradientOperator) -> None:
        """Add a gradient to what waits for its parameter."""
        if self.norm_proxy.is_touched:
            self.settle()  # clipped between two micro-batches: what has come so far is scaled, what comes now is not
        if not self.gradients and self.sync.norm_in_groups:
            self.store.groups[-1]["params"].append(self.norm_proxy.parameter)
        held, energy = self._not_blank(record.index), None
        if held is not None:
            held = held.add_(gradient)
        else:
            # The norm of a gradient that was never formed costs as much as forming it: its sketch's will do, unless it matters.
            if not self.sync.shares_bases and (self.clipper.is_active or not isinstance(gradient, OuterProduct)):
                energy = gradient.squared_norm()
            held = self.sync.hold(record, gradient, self)
            if isinstance(held, Sketched):
                self._blank[record.index] = AsyncScalar(held.is_blank())
        self.gradients[record.index] = held
        self.norm_proxy.record(record.index, self.sync.energy(record, energy, held))

    def _not_blank(self, index: int) -> GradientOperator | None:
        # A sketch of zeros, as of an empty micro-batch, is dropped: bases that came from it would serve no other gradient.
        flag = self._blank.pop(index, None)
        return None if flag is not None and flag.read() else self.gradients.get(index)

    def sketched(self, record: ParamRecord, gradient: GradientOperator) -> GradientOperator:
        """A step's first gradient in the bases that suit it, or as it is where nothing smaller would serve."""
        if not record.rule.has_rank or isinstance(gradient, Sketched) or (isinstance(gradient, Dense) and is_small(record)):
            return without_activations(gradient)
        sketch = record.rule.sketch(gradient, self.store.read(record), self.store.context(record))
        sketch.whole = as_dense(gradient) if record.observer is not None else None
        return sketch

    def read_factor(self) -> Tensor:
        """What a scaler or clipping has multiplied the norm with, 0-dim.

        Raises:
            ArgumentError: values were clipped instead. Where asking would wait for the device, the step is left out.
        """
        if not self.skipped.look(self.norm_proxy.is_even(), lambda: "value clipping"):
            raise ArgumentError(
                "gradients were clipped by value, or row by row (clip_grad_value_, adaptive_clip_grad?), over opt.param_groups: "
                "what waits for step() is a sketch, whose entries are not the gradient's. Clip by norm instead: "
                "torch.nn.utils.clip_grad_norm_, or max_grad_norm= of attach. What waited for this step is dropped"
            )
        return self.norm_proxy.factor()

    def settle(self) -> None:
        """Let a scaler or clipping act on what waits by now, and not on what comes later.

        Raises:
            ArgumentError: values were clipped instead.
        """
        if not self.sync.shares_bases:
            factor = self.read_factor()
            self.scale(factor)
            self.norm_proxy.settle(factor)

    def scale(self, factor: Tensor) -> None:
        """Multiply all that waits."""
        if is_async(factor) or factor != 1:
            for index, gradient in self.gradients.items():
                self.gradients[index] = gradient.scaled(factor.to(gradient.dtype))

    def pop(self, record: ParamRecord) -> GradientOperator:
        """Take a gradient out: it waits no longer, so that its memory is free as soon as its update is made."""
        return self.gradients.pop(record.index)

    def drop(self, record: ParamRecord) -> None:
        """Drop what waits for one parameter, if anything does."""
        if record.index in self.gradients:
            self.settle()
            del self.gradients[record.index]
            self._blank.pop(record.index, None)
            self.norm_proxy.forget(record.index)
            if not self.gradients:
                self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self.gradients.clear()
        self._blank.clear()
        self.norm_proxy.clear()
        shown = self.store.groups[-1]["params"]
        if shown and shown[-1] is self.norm_proxy.parameter:
            shown.pop()


def is_small(record: ParamRecord) -> bool:
    """Whether a matrix has no more entries than its sketch has numbers, so that the gradient waits as it is.

    Asked of the whole matrix, wherever its parts lie: any number of processes make the same update.
    """
    if len(record.plan.shape) < 2:  # whatever its rule says of ranks
        return True
    # A sketch has two bases and two products: r columns on the right, r + k on the left.
    m, n = record.plan.shape[-2:]
    return (2 * record.rank + record.momentum_rank) * (m + n) >= m * n


def without_activations(gradient: GradientOperator) -> GradientOperator:
    """The gradient in its own numbers: the activations that make an outer product would be kept alive until `step()`."""
    return gradient if isinstance(gradient, Dense | RowSparse | Sketched) else as_dense(gradient)


def as_dense(gradient: GradientOperator) -> Dense:
    """The gradient with its entries in memory."""
    return gradient if isinstance(gradient, Dense) else Dense(gradient.matrix, is_owned=True)
