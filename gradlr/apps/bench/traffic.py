"""Bytes that collectives move, counted where torch dispatches them: for DDP's reducer in C++ as for anything in Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ArgumentError

# Names of torch.ops.c10d and of torch.ops._c10d_functional, without underscores.
_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
}
_NO_TRAFFIC = ("barrier", "monitoredbarrier", "waittensor", "wraptensorautograd", "checkfornan")
# How often a ring passes the (p - 1) / p of a tensor on: an all-reduce is a reduce-scatter and an all-gather.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}


@dataclass(frozen=True)
class Call:
    """One collective: its kind, and the bytes of the whole tensor that it reduces, gathers or scatters."""

    kind: str
    bytes: int


class Traffic(TorchDispatchMode):
    """Counts the collectives that this process calls while it is entered: `with Traffic() as traffic: ...`.

    The size of a call is that of its whole tensor: what an all-reduce sums, an all-gather ends with, a reduce-scatter starts
    from. Those of DTensors are seen as well, and those of backward where it runs on the calling thread, as on the CPU.

    Attributes:
        calls: In their order.

    Raises:
        ArgumentError: a collective of another kind is called (inside the `with`).
    """

    def __init__(self) -> None:
        from torch.distributed.tensor import DTensor  # not above: a torch built without distributed lacks it

        super().__init__()
        self._sharded = DTensor
        self.calls: list[Call] = []

    def bytes(self) -> dict[str, int]:
        """Kind of collective → bytes, summed over its calls."""
        found: Counter[str] = Counter()
        for call in self.calls:
            found[call.kind] += call.bytes
        return dict(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(kind, self._sharded) for kind in types):
            # It comes again, as what each process does with its own part.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func.name(), (*args, *(kwargs or {}).values(), result))
        return result

    def _count(self, name: str, values: tuple) -> None:
        plain = name.split("::")[1].replace("_", "")
        if plain.startswith(_NO_TRAFFIC):
            return
        kind = next((kind for start, kind in _KINDS.items() if plain.startswith(start)), None)
        if kind is None:
            raise ArgumentError(f"{name} is no collective that is counted here: known are {', '.join(_KINDS.values())}")
        self.calls.append(Call(kind, max(sum(tensor.nbytes for tensor in _tensors(value)) for value in values)))


def sent_bytes(moved: Mapping[str, int], processes: int) -> int:
    """What each process sends, on the mean, where rings do the collectives.

    Args:
        moved: Kind of collective → bytes, as `Traffic.bytes` gives them.
        processes: p; an all-reduce of N bytes sends 2 N (p - 1) / p, every other kind half of that.

    Source: Patarasuk & Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations (2009), section 3.
    """
    return round(sum(_ROUNDS[kind] * count * (processes - 1) / processes for kind, count in moved.items()))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
