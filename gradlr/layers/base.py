"""What is known of a type of layer: how its weight is seen as matrices, and which linear map of the weight it computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import EinopsError, rearrange
from einops.parsing import ParsedExpression
from torch import Tensor, nn

# Each axis of a tensor as the names that it is composed of; none where its size is 1.
Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class View:
    """A parameter seen as (a batch of) matrices.

    Attributes:
        pattern: An einops expression "parameter axes -> [batch axis] m n", e.g. "o i h w -> o (i h w)"; None for as it is.
        sizes: Of named axes that the parameter's shape leaves open.
    """

    pattern: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The view (..., m, n); shares memory with `tensor` wherever strides allow."""
        return tensor if self.pattern is None else rearrange(tensor, self.pattern, **dict(self.sizes))

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `of`, for a parameter of the given shape."""
        if self.pattern is None:
            return matrix
        before, after = self.pattern.split("->")
        return rearrange(matrix, f"{after} -> {before}", **self.named_axes(shape)[2])

    def named_axes(self, shape: Sequence[int]) -> tuple[Axes, Axes, dict[str, int]]:
        """Names that make up each axis of a parameter of that shape, each axis of its view, and the size of each name."""
        names = " ".join(f"axis{index}" for index in range(len(shape)))
        before, after = axes_of(self.pattern or f"{names} -> {names}")
        sizes = dict(self.sizes)
        for axis, size in zip(before, shape, strict=True):
            # einops has seen that all names of an axis but one are given.
            known = math.prod(sizes[name] for name in axis if name in sizes)
            sizes |= {name: size // known for name in axis if name not in sizes}
        return before, after, sizes


AS_IT_IS = View()


@lru_cache(maxsize=1024)
def axes_of(pattern: str) -> tuple[Axes, Axes]:
    """The axes on both sides of an einops expression.

    Raises:
        EinopsError: it cannot be read, or names an axis by a keyword of Python.
    """
    sides = pattern.split("->")
    if len(sides) != 2:
        raise EinopsError(f'It has {len(sides) - 1} arrows: write "parameter axes -> [batch axes] m n"')
    if "..." in pattern or "…" in pattern:
        raise EinopsError("It leaves axes out by an ellipsis: name each one")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            before, after = (ParsedExpression(side).composition for side in sides)
        except RuntimeWarning as discouraged:
            raise EinopsError(str(discouraged)) from None
    # Axes of another number than 1 stay in, as einops' own objects, for einops to refuse them.
    return tuple(map(tuple, before)), tuple(map(tuple, after))


def pattern_of(before: Iterable[Sequence[str]], after: Iterable[Sequence[str]]) -> str:
    """The einops expression with these axes; the same axes give the same string, so that equal views compare equal."""

    def written(axis: Sequence[str]) -> str:
        return (axis[0] if len(axis) == 1 else f"({' '.join(axis)})") if axis else "1"

    return " -> ".join(" ".join(map(written, side)) for side in (before, after))


class LayerOp:
    """`y = A(W, x) + b`, linear in the weight W and in the input x; G is the gradient of W seen as (m, n).

    For T tokens (positions of a convolution's output) G is the sum of T outer products of an output gradient δ (m) and a patch
    of the input (n). Only `gradient` and `weight_gradient` make it.
    """

    @property
    def view(self) -> View:
        """The layer's weight as (m, n): equal to the view that the layer's type gives it."""
        return AS_IT_IS

    def accepts(self, x: Tensor) -> bool:
        """Whether the map is defined for this input."""
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y, as the layer itself computes it."""
        raise NotImplementedError

    def input_gradient(self, delta: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of x, which has the given shape, from δ, the gradient of y."""
        raise NotImplementedError

    def weight_gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        """G in the shape of W; differentiable."""
        raise NotImplementedError

    def gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        """G itself, (m, n); differentiable, for those who cannot do without it."""
        return self.view.of(self.weight_gradient(delta, x))

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Gradient of b, (m,)."""
        raise NotImplementedError

    def sizes(self, delta: Tensor, x: Tensor) -> tuple[int, int]:
        """(m, n)."""
        raise NotImplementedError

    def project(self, x: Tensor, right: Tensor) -> Tensor:
        """Every token's patch times `right` (n, r): the output of r filters, laid out as y is."""
        raise NotImplementedError

    def weight_grad_matmul(self, delta: Tensor, projected: Tensor) -> Tensor:
        """Sum over tokens of δ times what `project` gave: `G right`, (m, r)."""
        raise NotImplementedError

    def rmatmul(self, delta: Tensor, x: Tensor, left: Tensor) -> Tensor:
        """`Gᵀ left`, (n, l), for `left` (m, l)."""
        raise NotImplementedError

    def covariance_matmul(self, x: Tensor, right: Tensor) -> Tensor:
        """Sum over tokens of patch times patchᵀ (n × n, never made) times `right` (n, r): (n, r)."""
        # What `project` gives is laid out as an output gradient is: a gradient of r outputs.
        return self.gradient(self.project(x, right), x).mT


@dataclass(frozen=True)
class LayerType:
    """All that gradlr knows of one type of layer.

    Attributes:
        is_type: Whether a module is of this type or a subclass.
        view: (layer, name of one of its parameters, that parameter) → how it is seen; None where the type says nothing about it.
        op: The linear map that a layer computes; None where it has options that no map fits, and for subclasses, which may
            compute anything: the class must be the very one, or one that capture has put over it.
        is_lookup: Whether its weight is a table whose rows are looked up.
        is_norm: Whether all its parameters are scales and shifts, whatever their shape.
    """

    is_type: Callable[[nn.Module], bool]
    view: Callable[[Any, str, Tensor], View | None] = lambda layer, name, weight: None
    op: Callable[[Any], LayerOp | None] = lambda layer: None
    is_lookup: bool = False
    is_norm: bool = False


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before capture put another over it."""
    return getattr(type(module), "_gradlr_original", type(module))
