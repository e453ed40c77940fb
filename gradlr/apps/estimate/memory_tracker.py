"""Which bytes live while real code runs on tensors without values: every birth and death of a storage is counted."""

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

from ...linalg.int8 import Int8Weight, stored_parts
from ...tensors import local
from ..collectives import kind_of, moved_bytes

KINDS = ("weights", "state", "gradients", "activations", "workspace", "exchange")
WEIGHTS, STATE, GRADIENTS, ACTIVATIONS, WORKSPACE, EXCHANGE = KINDS

# What a collective is for: the model's own forward and backward, or gradlr's update.
MODEL, UPDATE = "model", "update"
_COMMUNICATING = {"c10d", "_c10d_functional", "fsdp"}
_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.addmm.default)


@dataclass
class _Entry:
    nbytes: int
    kind: str
    death: weakref.ref[torch.UntypedStorage]
    is_lookup: bool = False


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until the last tensor on it is gone.

    To be entered inside a `FakeTensorMode`: what runs under it is the code that will run, on tensors that have shapes and no
    values. What that code asks of a value is answered as in a step in which nothing goes wrong: flags are true, `a != b` is
    false, a loss is 1, and the last of n numbers that count something is n - 1.

    Args:
        elsewhere: Kinds that lie in another memory than the one that is looked at: no part of the peak.

    Attributes:
        held: Bytes alive by kind.
        largest: The most that each kind has held at one time.
        peak: The most that all have held together.
        at_peak: What each kind held then.
        peak_stage: What was under way then.
        traffic: Collectives that were called: (purpose, operation, "calls" or "bytes") → how many.
    """

    def __init__(self, elsewhere: Iterable[str] = ()) -> None:
        super().__init__()
        self._elsewhere = set(elsewhere)
        self.traffic: Counter[tuple[str, str, str]] = Counter()
        self.held = dict.fromkeys(KINDS, 0)
        self.largest, self.at_peak = dict(self.held), dict(self.held)
        self.peak, self.peak_stage, self._stage = 0, "", ""
        self._entries: dict[int, _Entry] = {}
        self._answers: dict[int, Callable[[Tensor], Any]] = {}
        self._excursions: dict[Hashable, tuple[dict[str, int], Counter[tuple[str, str, str]]]] = {}
        self._summit: dict[str, int] = {}
        self._kind, self._is_aside = ACTIVATIONS, False
        self._pending: dict[str, int] = {}
        self._youngest: _Entry | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in _PRODUCTS and isinstance(args[-1], Int8Weight) and not self._summit:
            return self._int8_product(function, types, args, kwargs or {})
        if any(kind.__name__ == "DTensor" or kind is Int8Weight for kind in types):
            return NotImplemented  # it does the same to what it is made of, and this is counted
        if self._is_aside:
            return function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:  # half of all calls, and nothing is made
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if function is _ATEN._local_scalar_dense.default:
            return self._answer(args[0])
        if function is _ATEN.allclose.default:  # two ways to one thing
            return True
        if function is _ATEN.nonzero.default and args[0].dtype == torch.uint8 and _key(args[0]) in self._answers:
            result = torch.empty((int(self._answer(args[0])), args[0].ndim), dtype=torch.int64, device=args[0].device)
        else:
            result = function(*args, **(kwargs or {}))
        if function.namespace in _COMMUNICATING:
            self._look_at_exchange(function, args, kwargs or {}, result)
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, Tensor):
                self._count(one, self._kind)
        if function is _ATEN.embedding_dense_backward.default:
            self._entries[_key(result)].is_lookup = True
        elif function is _ATEN.ne.Scalar:
            self.tell(result, lambda _: False)
        return result

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """New storages are counted under `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done here is no work of the step, and not counted."""
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
        """Forget traffic and the largest amounts so far, and the peak too unless it is to be kept."""
        self._settle()
        self.traffic.clear()
        self.largest = dict(self.held)
        if not keep_peak:
            self.peak = 0
            self._reach(self.held)

    def move(self, tensors: Iterable[Any], kind: str) -> None:
        """From now on the tensors among these are counted under `kind`, also where no operation has made them."""
        for tensor in _parts(tensors):
            entry = self._count(tensor, kind)
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
        self._count(tensor, self._kind)  # the answer goes when the storage does
        self._answers[_key(tensor)] = answer

    def is_lookup(self, tensor: Tensor) -> bool:
        """Whether it is the gradient of an embedding's lookups and of nothing else."""
        entry = self._entries.get(_key(tensor))
        return entry is not None and entry.is_lookup

    def replay(self, signature: Hashable, work: Callable[[], Any]) -> Any:
        """Do work and return what it makes; where work of the same signature was done, count its excursion and return None.

        A model has hundreds of weights and a handful of shapes: one update of each shape is run.
        """
        self._settle()
        if signature not in self._excursions:
            before, sent = dict(self.held), Counter(self.traffic)
            self._summit = dict(self.held)
            result = work()
            self._settle()
            self._excursions[signature] = {kind: self._summit[kind] - before[kind] for kind in KINDS}, self.traffic - sent
            self._summit = {}
            return result
        extra, traffic = self._excursions[signature]
        self._reach({kind: self.held[kind] + extra[kind] for kind in KINDS})
        self.traffic += traffic
        return None

    def count_exchange(self, purpose: str, operation: str, handed: int, calls: int = 1) -> None:
        """Count collectives that move so many bytes together."""
        self.traffic[purpose, operation, "calls"] += calls
        self.traffic[purpose, operation, "bytes"] += handed

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """A storage has been given memory, or has lost it: what FSDP2 gathers, without calling an operation."""
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            self._settle()
            self.held[entry.kind] -= entry.nbytes
            entry.nbytes, entry.kind = size, EXCHANGE
            self.held[EXCHANGE] += size
            self._note(entry)

    def _count(self, tensor: Tensor, kind: str) -> _Entry | None:
        if tensor.layout != torch.strided:
            return None  # a sparse tensor is made of others, which are counted themselves
        storage = local(tensor).untyped_storage()
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
        self._answers.pop(key, None)
        self.held[entry.kind] -= entry.nbytes

    def _int8_product(self, function: Any, types: Any, args: tuple, kwargs: dict) -> Tensor:
        """A product with int8 weights, a hundred operations on blocks of them: each shape is run once."""
        left, weight = args[-2:]
        form = (function, tuple(left.shape), left.dtype, tuple(weight.shape), weight.group, weight.is_turned)
        with self:
            result = self.replay(form, lambda: Int8Weight.__torch_dispatch__(function, types, args, kwargs))
            return torch.empty((len(left), weight.shape[1]), dtype=left.dtype) if result is None else result

    def _look_at_exchange(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = function._schema.name
        if name in ("fsdp::chunk_cat", "fsdp::chunk_cat_mixed_dtype"):  # the second one since torch 2.15
            self.move(args[0], GRADIENTS)
            self.move([kwargs["out"]], EXCHANGE)
        elif name == "c10d::_allgather_base_":
            self.move([args[0]], EXCHANGE)
        elif name == "c10d::_reduce_scatter_base_":
            self.move([args[0]], GRADIENTS)
        if kind := kind_of(function):
            nbytes = moved_bytes((*args, *kwargs.values(), result))
            self.count_exchange(UPDATE if self._kind == WORKSPACE else MODEL, kind, nbytes)

    def _note(self, born: _Entry | None) -> None:
        # Counted at the next birth only: by then the last one has its right kind, as a gradient has when it is accumulated.
        self._settle()
        self._pending, self._youngest = dict(self.held), born

    def _settle(self) -> None:
        if self._pending:
            if self._summit and sum(self._pending.values()) > sum(self._summit.values()):
                self._summit = self._pending
            self._reach(self._pending)
            self._pending, self._youngest = {}, None

    def _reach(self, held: dict[str, int]) -> None:
        for kind, count in held.items():
            self.largest[kind] = max(self.largest[kind], count)
        here = {kind: 0 if kind in self._elsewhere else count for kind, count in held.items()}
        total = sum(here.values())
        if total >= self.peak:  # of two equal ones the later, when the state has its name
            self.peak, self.at_peak, self.peak_stage = total, here, self._stage

    def _answer(self, scalar: Tensor) -> bool | int | float:
        if (answer := self._answers.get(_key(scalar))) is not None:
            return answer(scalar)
        if scalar.dtype == torch.bool:
            return True
        if scalar.is_floating_point():
            return 1.0
        return scalar.untyped_storage().nbytes() // scalar.element_size() - 1


def _parts(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, of int8 weights those that they are made of."""
    for value in values:
        if isinstance(value, Tensor):
            yield from stored_parts(value)


def _key(tensor: Tensor) -> int:
    return local(tensor).untyped_storage()._cdata if tensor.layout == torch.strided else 0  # a sparse tensor has no storage
