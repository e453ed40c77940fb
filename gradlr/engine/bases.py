"""In which directions a gradient is looked at where these must be known before there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .record import ParamRecord


class Bases(Protocol):
    """Keeps X, (n, r) orthonormal, of each parameter from its first use after an update to the next update."""

    def right(self, record: ParamRecord, covariance_matmul: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X, on which a one-sided layer projects its input in forward."""

    def known(self, record: ParamRecord) -> Tensor:
        """X of a one-sided layer, of state and random numbers alone: the same in every process."""

    def held(self, record: ParamRecord) -> Tensor | None:
        """X, while a graph or a sketch holds it, so that the rank may not change."""

    def forget(self, record: ParamRecord) -> None:
        """The parameter was updated."""

    def forget_all(self) -> None:
        """Whatever holds a basis is of no further use."""
