"""What devices send each other in a step: which collectives are called, and how much they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
# What a collective is for: the model's own forward and backward, or gradlr's update.
MODEL, UPDATE = "model", "update"

# Operation → which collective it is, and where the whole of what it moves stands: a number of an argument, or the result.
_OPERATIONS: dict[str, tuple[str, int | None]] = {
    "c10d::allreduce_": (ALL_REDUCE, 0),
    "c10d::_allgather_base_": (ALL_GATHER, 0),
    "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "_c10d_functional::all_reduce": (ALL_REDUCE, 0),
    "_c10d_functional::all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional::all_gather_into_tensor": (ALL_GATHER, None),
    "_c10d_functional::reduce_scatter_tensor": (REDUCE_SCATTER, 0),
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step, on one device.

    Attributes:
        operation: "all-reduce", "all-gather" or "reduce-scatter".
        purpose: "model" (forward, backward, gradients) or "update" (what gradlr exchanges besides).
        calls: How many.
        handed: Bytes of all that they move: what is reduced, what comes out of a gather, what goes into a scatter.
        sent: Bytes that this device sends where the devices form a ring.
    """

    operation: str
    purpose: str
    calls: int
    handed: int
    sent: int


def ring_bytes(operation: str, handed: int, gpus: int) -> int:
    """Bytes that each of N devices in a ring sends: 2(N - 1)/N of what is all-reduced, (N - 1)/N of a gather or scatter.

    Args:
        operation: "all-reduce", "all-gather" or "reduce-scatter".
        handed: Bytes of the whole.
        gpus: N.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009).
    """
    return round((2 if operation == ALL_REDUCE else 1) * handed * (gpus - 1) / gpus)


def collective(name: str, args: tuple[Any, ...], result: Any) -> tuple[str, int] | None:
    """Which collective an operation is, and the bytes that it moves; None for everything else.

    Args:
        name: Of the operation, as "c10d::allreduce_".
        args, result: Of its call.
    """
    if name not in _OPERATIONS:
        return None
    operation, place = _OPERATIONS[name]
    whole = result if place is None else args[place]
    return operation, sum(one.nbytes for one in ([whole] if isinstance(whole, Tensor) else whole))
