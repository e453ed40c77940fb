"""An axis in pieces, where what is made of all of it at once would be too large."""

from __future__ import annotations

from collections.abc import Iterator


def pieces(count: int, width: float, most: int, *, multiple: int = 1) -> Iterator[slice]:
    """Slices of an axis that have at most so many numbers each.

    Args:
        count: Size of the axis.
        width: Numbers an entry of it, on average.
        most: Bound; of a single entry, or `multiple` of them, there may be more.
        multiple: What the length of all slices but the last is a multiple of.
    """
    size = max(1, int(most / max(1, width * multiple))) * multiple
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
