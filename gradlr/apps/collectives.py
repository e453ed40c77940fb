"""What devices send each other: which collectives are called, and how much they move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

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
