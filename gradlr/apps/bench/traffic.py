"""Bytes that collectives move, counted where torch dispatches them: for DDP's reducer in C++ as for anything in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ArgumentError
from ..collectives import KINDS, kind_of, moved_bytes, ring_bytes


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
