"""Bytes that collectives move, counted where torch dispatches them: for DDP's reducer in C++ as for anything in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ArgumentError
from ..estimate.collectives import ring_bytes

# How names of torch.ops.c10d and of torch.ops._c10d_functional begin, without underscores; None where nothing travels.
_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
    **dict.fromkeys(("barrier", "monitoredbarrier", "waittensor", "wraptensorautograd", "checkfornan")),
}


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
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            plain = func.name().split("::")[1].replace("_", "")
            start = next((start for start in _KINDS if plain.startswith(start)), None)
            if start is None:
                known = ", ".join(filter(None, _KINDS.values()))
                raise ArgumentError(f"{func.name()} is no collective that is counted here: known are {known}")
            if (kind := _KINDS[start]) is not None:
                values = (*args, *(kwargs or {}).values(), result)
                self.calls.append((kind, max(sum(tensor.nbytes for tensor in _tensors(value)) for value in values)))
        return result


def sent_bytes(moved: Mapping[str, int], processes: int) -> int:
    """What each of some processes sends, on the mean, where rings do the collectives; of `moved` as `Traffic.bytes` gives it."""
    return sum(ring_bytes(kind, count, processes) for kind, count in moved.items())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
