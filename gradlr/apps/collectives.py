"""What devices send each other, seen where torch dispatches it: for DDP's reducer in C++ as for anything in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST = KINDS = ("all-reduce", "all-gather", "reduce-scatter", "broadcast")
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# How names of operations in these begin, without underscores, when nothing travels.
_SILENT = ("barrier", "monitoredbarrier", "waittensor", "wraptensorautograd", "checkfornan")


def kind_of(function: Any) -> str | None:
    """Which collective a dispatched operation is, "" where nothing travels; None for a collective of another kind."""
    if function.namespace not in _NAMESPACES:
        return ""
    name = function.name().split("::")[1].replace("_", "")
    known = {kind.replace("-", ""): kind for kind in KINDS} | dict.fromkeys(_SILENT, "")
    return next((kind for start, kind in known.items() if name.startswith(start)), None)


def moved_bytes(values: Iterable[Any]) -> int:
    """Bytes of a collective's whole tensor, from its arguments and result: what an all-reduce sums, an all-gather ends with, a
    reduce-scatter starts from."""
    return max(sum(tensor.nbytes for tensor in _tensors(value)) for value in values)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def ring_bytes(operation: str, handed: int, gpus: int) -> int:
    """Bytes that each of N devices in a ring sends: 2(N - 1)/N of what is all-reduced, (N - 1)/N of all else.

    Args:
        operation: One of `KINDS`.
        handed: Bytes of the whole.
        gpus: N.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009).
    """
    return round((2 if operation == ALL_REDUCE else 1) * handed * (gpus - 1) / gpus)


class Traffic(TorchDispatchMode):
    """Counts the collectives that this process calls while it is entered: `with Traffic() as traffic: ...`.

    The size of a call is that of its whole tensor: what an all-reduce sums, an all-gather ends with, a reduce-scatter starts
    from. Those of DTensors are seen as well, and those of backward where it runs on the calling thread, as on the CPU.

    Attributes:
        calls: Kind and bytes of each, in their order.

    Raises:
        ArgumentError: a collective of another kind is called (inside the `with`).
    """

    def __init__(self) -> None:
        from torch.distributed.tensor import DTensor  # not above: a torch built without distributed lacks it

        super().__init__()
        self._sharded = DTensor
        self.calls: list[tuple[str, int]] = []

    def bytes(self) -> dict[str, int]:
        """Kind of collective → bytes, summed over its calls."""
        found: dict[str, int] = {}
        for kind, count in self.calls:
            found[kind] = found.get(kind, 0) + count
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(kind, self._sharded) for kind in types):
            # It comes again, as what each process does with its own part.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        kind = kind_of(func)
        if kind is None:
            raise ArgumentError(f"{func.name()} is no collective that is counted here: known are {', '.join(KINDS)}")
        if kind:
            self.calls.append((kind, moved_bytes((*args, *(kwargs or {}).values(), result))))
        return result


def sent_bytes(moved: Mapping[str, int], processes: int) -> int:
    """What each of some processes sends, on the mean, where rings do the collectives; of `moved` as `Traffic.bytes` gives it."""
    return sum(ring_bytes(kind, count, processes) for kind, count in moved.items())
