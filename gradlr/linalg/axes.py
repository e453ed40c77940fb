"""The rows or the columns of a matrix, of which one process may hold a part: what has to be summed to know the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..tensors import is_async


class Axis:
    """One axis of a matrix, all of which lies in this process; a subclass shares it with others.

    Attributes:
        is_whole: Whether all of it lies here.
        parts: Number of parts.
        first: Place of the first entry that lies here: another one in each part.
    """

    is_whole = True
    parts = 1

    @property
    def first(self) -> int:
        return 0

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of what each part's process gives; `x` may be overwritten. Here `x` itself."""
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The same, the largest entries instead of sums."""
        return x

    def size(self, here: int) -> int:
        """Size of the whole axis, given what lies here."""
        return here

    def local_shard(self, whole: Tensor, dim: int) -> Tensor:
        """What of a tensor with the whole axis belongs here."""
        return whole

    def all_gather(self, here: Tensor, dim: int) -> Tensor:
        """The tensor with the whole axis, of which each process has a part."""
        return here

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """`xᵀ y` of (..., m, r) and (..., m, c), whose m rows lie along this axis: (..., r, c), the same everywhere."""
        product = x.mT @ y
        return product if self.is_whole else self.all_reduce_sum(product)

    def column_peaks(self, x: Tensor) -> Tensor:
        """Largest absolute entry of each column of (..., m, r), whose m rows lie along this axis: (..., 1, r)."""
        if not x.shape[-2]:  # where a process holds no row at all there is nothing to look at
            here = x.new_zeros((*x.shape[:-2], 1, x.shape[-1]))
        elif is_async(x):
            here = torch.linalg.vector_norm(x, torch.inf, dim=-2, keepdim=True)
        else:  # on the CPU ten times faster than the norm
            here = x.abs().amax(dim=-2, keepdim=True)
        return here if self.is_whole else self.all_reduce_max(here)


REPLICATED = Axis()


@dataclass(frozen=True)
class Layout:
    """How (a batch of) m × n matrices lie over processes: a block of rows and columns of some of the batch is here.

    Attributes:
        rows: The axis of size m.
        columns: The axis of size n.
        batch: The axis before them, where there is one; its matrices are independent of each other.
        number: Which of its blocks this is, counted from 0.
    """

    rows: Axis = REPLICATED
    columns: Axis = REPLICATED
    batch: Axis = REPLICATED
    number: int = 0

    @cached_property
    def is_whole(self) -> bool:
        """Whether all of it lies here."""
        return self.rows.is_whole and self.columns.is_whole and self.batch.is_whole

    @property
    def parts(self) -> int:
        """Number of blocks."""
        return self.rows.parts * self.columns.parts * self.batch.parts

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest entries of what each process with a part of the same matrices gives; `x` may be overwritten."""
        return x if self.is_whole else self.columns.all_reduce_max(self.rows.all_reduce_max(x))

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The same, sums instead of the largest entries."""
        return x if self.is_whole else self.columns.all_reduce_sum(self.rows.all_reduce_sum(x))

    def anywhere(self, flag: Tensor) -> Tensor:
        """0-dim boolean: whether it is True in any process that has a part."""
        return flag if self.is_whole else self.batch.all_reduce_max(self.all_reduce_max(flag.to(torch.float32))) > 0

    def whole(self, here: tuple[int, ...]) -> torch.Size:
        """Shape (..., m, n) of the whole, given the shape of what lies here."""
        if self.is_whole:
            return torch.Size(here)
        *batch, m, n = here
        return torch.Size((*map(self.batch.size, batch), self.rows.size(m), self.columns.size(n)))


UNSHARDED = Layout()
