"""The ledger: which bytes live while real code runs on tensors without values; every birth and death of a storage is booked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS, STATE, GRADIENTS, ACTIVATIONS, WORKSPACE = KINDS = ("weights", "state", "gradients", "activations", "workspace")


@dataclass
class _Entry:
    nbytes: int
    kind: str
    death: weakref.ref


class Ledger(TorchDispatchMode):
    """Books the bytes of every storage that an operation makes, until the last tensor on it is gone.

    To be entered inside a `FakeTensorMode`: what runs under it is the code that will run, on tensors that have shapes and no
    values. What that code asks of a value is answered as in a step in which nothing goes wrong: flags are true, `a != b` is
    false, a loss is 1, and the last of n numbers that count something is n - 1.

    Attributes:
        held: Bytes alive by kind.
        largest: The most that each kind has held at one time.
        peak: The most that all have held together.
        at_peak: What each kind held then.
        peak_stage: What was under way then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[int, _Entry] = {}
        self._differences: dict[int, weakref.ref] = {}
        self._excursions: dict[Hashable, dict[str, int]] = {}
        self._summit: dict[str, int] | None = None
        self._kind = ACTIVATIONS
        self.held = dict.fromkeys(KINDS, 0)
        self.largest, self.at_peak = dict(self.held), dict(self.held)
        self.peak, self.peak_stage, self._stage = 0, "", ""
        self._pending: dict[str, int] | None = None
        self._youngest: _Entry | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.prim.device.default:  # half of all calls, and nothing is made
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, Tensor):
                self._book(one, self._kind)
        if function is torch.ops.aten.ne.Scalar:
            key = id(result)
            self._differences[key] = weakref.ref(result, lambda _: self._differences.pop(key, None))
        return result

    @contextmanager
    def booking(self, kind: str) -> Iterator[None]:
        """New storages are booked under `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def enter(self, stage: str) -> None:
        """What is under way from now on."""
        self._settle()
        self._stage = stage

    def restart(self, *, keep_peak: bool) -> None:
        """Forget the largest amounts so far, and the peak too unless it is to be kept."""
        self._settle()
        self.largest = dict(self.held)
        if not keep_peak:
            self.peak = 0
            self._reach(self.held)

    def move(self, tensors: Iterable[Tensor], kind: str) -> None:
        """From now on these are booked under `kind`, also where no operation has made them."""
        for tensor in tensors:
            entry = self._book(tensor, kind)
            if entry is None or entry.kind == kind:
                continue
            if entry is not self._youngest:
                self._note(None)
            for held in (self.held, self._pending):
                held[entry.kind] -= entry.nbytes
                held[kind] += entry.nbytes
            entry.kind = kind

    def replay(self, signature: Hashable, work: Callable[[], Any]) -> None:
        """Do work that leaves nothing behind; where work of the same signature was done, book its excursion instead.

        A model has hundreds of weights and a handful of shapes: one update of each shape is run.
        """
        self._settle()
        if signature not in self._excursions:
            before = self._summit = dict(self.held)
            work()
            self._settle()
            self._excursions[signature] = {kind: self._summit[kind] - before[kind] for kind in KINDS}
            self._summit = None
            return
        self._reach({kind: self.held[kind] + extra for kind, extra in self._excursions[signature].items()})

    def _book(self, tensor: Tensor, kind: str) -> _Entry | None:
        if tensor.layout != torch.strided:
            return None  # a sparse tensor is made of others, which are booked themselves
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            death = weakref.ref(storage, lambda _: self._strike(key))
            entry = self._entries[key] = _Entry(storage.nbytes(), kind, death)
            self.held[kind] += entry.nbytes
            self._note(entry)
        return entry

    def _strike(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.held[entry.kind] -= entry.nbytes

    def _note(self, born: _Entry | None) -> None:
        # Counted at the next birth only: by then the last one has its right kind, as a gradient has when it is accumulated.
        self._settle()
        self._pending, self._youngest = dict(self.held), born

    def _settle(self) -> None:
        if self._pending is not None:
            if self._summit is not None and sum(self._pending.values()) > sum(self._summit.values()):
                self._summit = self._pending
            self._reach(self._pending)
            self._pending = self._youngest = None

    def _reach(self, held: dict[str, int]) -> None:
        for kind, count in held.items():
            self.largest[kind] = max(self.largest[kind], count)
        total = sum(held.values())
        if total >= self.peak:  # of two equal ones the later, when the state has its name
            self.peak, self.at_peak, self.peak_stage = total, dict(held), self._stage

    def _answer(self, scalar: Tensor) -> bool | int | float:
        if scalar.dtype == torch.bool:
            return id(scalar) not in self._differences
        if scalar.is_floating_point():
            return 1.0
        return scalar.untyped_storage().nbytes() // scalar.element_size() - 1
