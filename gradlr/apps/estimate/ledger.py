"""The ledger: which bytes live while real code runs on tensors without values; every birth and death of a storage is booked."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...params.kinds import local
from .collectives import MODEL, UPDATE, collective

KINDS = ("weights", "state", "gradients", "activations", "workspace", "exchange")
WEIGHTS, STATE, GRADIENTS, ACTIVATIONS, WORKSPACE, EXCHANGE = KINDS

_COMMUNICATING = {"c10d", "_c10d_functional", "fsdp"}


@dataclass
class _Entry:
    nbytes: int
    kind: str
    death: weakref.ref
    is_lookup: bool = False


class MemoryTracker(TorchDispatchMode):
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
        traffic: Collectives that were called: (purpose, operation) → number of calls, bytes that they move.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[int, _Entry] = {}
        self._differences: dict[int, weakref.ref] = {}
        self._excursions: dict[Hashable, tuple[dict[str, int], Counter]] = {}
        self._told: dict[int, Callable[[Tensor], Any]] = {}
        self.traffic: Counter[tuple[str, str, str]] = Counter()
        self._summit: dict[str, int] | None = None
        self._kind = ACTIVATIONS
        self.held = dict.fromkeys(KINDS, 0)
        self.largest, self.at_peak = dict(self.held), dict(self.held)
        self.peak, self.peak_stage, self._stage = 0, "", ""
        self._is_aside = False
        self._pending: dict[str, int] | None = None
        self._youngest: _Entry | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it does the same to what lies here, and this is booked
        if self._is_aside:
            return function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:  # half of all calls, and nothing is made
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        if function is torch.ops.aten.nonzero.default and (answer := self._told_of(args[0])) is not None:
            result = torch.empty((answer(args[0]), args[0].ndim), dtype=torch.int64, device=args[0].device)
            self._book(result, self._kind)
            return result
        result = function(*args, **(kwargs or {}))
        if function.namespace in _COMMUNICATING:
            self._look_at_exchange(function, args, kwargs or {}, result)
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, Tensor):
                self._book(one, self._kind)
        if function is torch.ops.aten.embedding_dense_backward.default:
            self._book(result, self._kind).is_lookup = True
        if function is torch.ops.aten.ne.Scalar:
            key = id(result)
            self._differences[key] = weakref.ref(result, lambda _: self._differences.pop(key, None))
        return result

    def __enter__(self) -> MemoryTracker:
        # FSDP2 gives and takes memory where no operation is called.
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exception)

    @contextmanager
    def booking(self, kind: str) -> Iterator[None]:
        """New storages are booked under `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done here is no work of the step, and not booked."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

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

    def tell(self, tensor: Tensor, answer: Callable[[Tensor], Any]) -> None:
        """Asked for a value of this tensor, answer so: given a 0-dim view of it, or for `nonzero` the view that is asked."""
        self._told = {tensor.untyped_storage()._cdata: answer}

    def is_lookup(self, tensor: Tensor) -> bool:
        """Whether it is the gradient of an embedding's lookups and of nothing else."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry.is_lookup

    def replay(self, signature: Hashable, work: Callable[[], Any]) -> None:
        """Do work that leaves nothing behind; where work of the same signature was done, book its excursion instead.

        A model has hundreds of weights and a handful of shapes: one update of each shape is run.
        """
        self._settle()
        if signature not in self._excursions:
            before, sent = dict(self.held), Counter(self.traffic)
            self._summit = dict(self.held)
            work()
            self._settle()
            self._excursions[signature] = {kind: self._summit[kind] - before[kind] for kind in KINDS}, self.traffic - sent
            self._summit = None
            return
        extra, traffic = self._excursions[signature]
        self._reach({kind: self.held[kind] + extra[kind] for kind in KINDS})
        self.traffic += traffic

    def _book(self, tensor: Tensor, kind: str) -> _Entry | None:
        if tensor.layout != torch.strided:
            return None  # a sparse tensor is made of others, which are booked themselves
        tensor = local(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            death = weakref.ref(storage, lambda _: self._strike(key))
            entry = self._entries[key] = _Entry(storage.nbytes(), kind, death)
            self.held[kind] += entry.nbytes
            self._note(entry)
        return entry

    def _resized(self, storage: Any, size: int) -> Any:
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            self._settle()
            self.held[entry.kind] -= entry.nbytes
            entry.nbytes, entry.kind = size, EXCHANGE
            self.held[EXCHANGE] += size
            self._note(entry)
        return self._resize(storage, size)

    def _look_at_exchange(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = function._schema.name
        if name in ("fsdp::chunk_cat", "fsdp::chunk_cat_mixed_dtype"):  # the second one since torch 2.15
            self.move(args[0], GRADIENTS)
            self.move([kwargs["out"]], EXCHANGE)
        if (found := collective(name, args, result)) is None:
            return
        operation, handed = found
        self.count_exchange(UPDATE if self._kind == WORKSPACE else MODEL, operation, handed)
        if name == "c10d::_allgather_base_":
            self.move([args[0]], EXCHANGE)
        elif name == "c10d::_reduce_scatter_base_":
            self.move([args[0]], GRADIENTS)

    def count_exchange(self, purpose: str, operation: str, handed: int, calls: int = 1) -> None:
        """Count a collective that moves so many bytes."""
        self.traffic[purpose, operation, "calls"] += calls
        self.traffic[purpose, operation, "bytes"] += handed

    def _strike(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._told.pop(key, None)
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

    def _told_of(self, tensor: Tensor) -> Callable[[Tensor], Any] | None:
        return self._told.get(tensor.untyped_storage()._cdata)

    def _answer(self, scalar: Tensor) -> bool | int | float:
        if (answer := self._told_of(scalar)) is not None:
            return answer(scalar)
        if scalar.dtype == torch.bool:
            return id(scalar) not in self._differences
        if scalar.is_floating_point():
            return 1.0
        return scalar.untyped_storage().nbytes() // scalar.element_size() - 1
