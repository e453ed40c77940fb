"""A matrix that exists a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class RowsOnDemand:
    """A matrix (m, r) that is made where it is read, a few rows at a time: a part of an `Update`.

    Args:
        make: Makes the rows of a slice, as a new tensor.
        shape: (m, r).
        row_numbers: How many numbers a row takes while it is made; r where None.
    """

    def __init__(self, make: Callable[[slice], Tensor], shape: Sequence[int], row_numbers: int | None = None) -> None:
        self._make, self.shape = make, torch.Size(shape)
        self.row_numbers = row_numbers or self.shape[-1]

    def __getitem__(self, index: Any) -> Tensor:
        """Whole rows: of a slice before the last axis, as in `[..., 2:4, :]`, or all of them, `[...]`."""
        index = index if isinstance(index, tuple) else (index,)
        return self._make(index[-2] if len(index) > 1 else slice(0, self.shape[0]))

    def where(self, flag: Tensor) -> RowsOnDemand:
        """The same, zeros where the 0-dim flag is False."""
        return RowsOnDemand(lambda rows: torch.where(flag, self._make(rows), 0.0), self.shape, self.row_numbers)

    def mapped(self, function: Callable[[slice, Tensor], Tensor]) -> RowsOnDemand:
        """What a function makes of it: of the rows of a slice and of the slice, each time that these are made."""
        return RowsOnDemand(lambda rows: function(rows, self._make(rows)), self.shape, self.row_numbers)
