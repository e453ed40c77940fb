"""How a parameter is seen as (a batch of) m × n matrices: an einops expression, checked against the parameter's shape."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ArgumentError

# Axis names that are their own size.
_NUMBERS = {"two": 2, "three": 3, "four": 4}
_TOKEN = re.compile(r"[A-Za-z0-9_.]+|\S")

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class View:
    """A parameter seen as (a batch of) matrices.

    Attributes:
        pattern: An einops expression "parameter axes -> [batch axis] m n", e.g. "o i h w -> o (i h w)"; None for as it is.
        sizes: Sizes of named axes that the parameter's shape leaves open; those named two, three and four are known.
    """

    pattern: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The view (..., m, n); shares memory with `tensor` wherever strides allow."""
        if self.pattern is None:
            return tensor
        return rearrange(tensor, self.pattern, **self._axis_sizes(tensor.shape))

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `of`, for a parameter of the given shape."""
        if self.pattern is None:
            return matrix
        before, after = self.pattern.split("->")
        return rearrange(matrix, f"{after} -> {before}", **self._axis_sizes(shape))

    def named_axes(self, shape: torch.Size) -> tuple[Axes, Axes, dict[str, int]]:
        """Names that make up each axis of a parameter of that shape, each axis of its view, and the size of each name."""
        if self.pattern is None:
            names = tuple((f"axis{index}",) for index in range(len(shape)))
            return names, names, {name: size for (name,), size in zip(names, shape, strict=True)}
        return *_sides(self.pattern), self._axis_sizes(shape)

    def _axis_sizes(self, shape: torch.Size) -> dict[str, int]:
        return _axis_sizes(_sides(self.pattern)[0], shape, dict(self.sizes))


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in one storage; also told of tensors without values, which have no address."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def given_view(glob: str, value: Any) -> tuple[str, dict[str, int]]:
    """One value of `views=`, an expression or a pair of expression and sizes, as that pair.

    Raises:
        ArgumentError: it is neither.
    """
    expression, sizes = (value, {}) if isinstance(value, str) else value if _is_pair(value) else (None, None)
    is_sized = isinstance(sizes, Mapping) and all(type(size) is int and size > 0 for size in sizes.values())
    if not isinstance(expression, str) or not is_sized:
        raise ArgumentError(
            f'views[{glob!r}] is {value!r}; give an expression such as "(three o) i -> three o i", or a pair with sizes, '
            'positive ints: ("(heads d) i -> heads d i", {"heads": 8})'
        )
    return expression, dict(sizes)


def checked_view(expression: str, sizes: Mapping[str, int], name: str, shape: Sequence[int]) -> View:
    """The view that an expression makes of one parameter; several batch axes are folded into one.

    Args:
        expression: An einops expression "parameter axes -> [batch axes] m n".
        sizes: Of named axes that the shape leaves open.
        name: The parameter's, for messages.
        shape: The parameter's.

    Raises:
        ArgumentError: the expression cannot be read, drops, repeats or invents axes, does not end in two axes, or does not fit
            the shape.
    """
    try:
        before, after = _sides(expression)
        _check_names(before, after, sizes)
        if len(before) != len(shape):
            raise ArgumentError(f"names {_count(len(before))}, the weight has {len(shape)}: name each one, or narrow the glob")
        if len(after) < 2:
            raise ArgumentError(f"ends in {_count(len(after))}: it must end in two, m n, the rows and columns of a matrix")
        if 0 in shape:
            raise ArgumentError("is of no use: the weight is empty. Narrow the glob")
        _axis_sizes(before, shape, sizes)
    except ArgumentError as error:
        raise ArgumentError(f"weight {name!r} {tuple(shape)}: view {expression!r} {error}") from None
    # One batch axis always: where strides forbid it the fold makes a copy, and whoever writes sees that it is one.
    batch = tuple(axis_name for axis in after[:-2] for axis_name in axis)
    folded = (batch, *after[-2:]) if len(after) > 3 else after
    return View(f"{_written(before)} -> {_written(folded)}", tuple(sorted(sizes.items())))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


@lru_cache(maxsize=1024)
def _sides(expression: str) -> tuple[Axes, Axes]:
    sides = expression.split("->")
    if len(sides) != 2:
        raise ArgumentError(f'has {len(sides) - 1} arrows: write "parameter axes -> [batch axes] m n"')
    return _axes(sides[0]), _axes(sides[1])


def _axes(side: str) -> Axes:
    # An axis is a tuple of the names that it is composed of; the empty one has size 1.
    axes: list[tuple[str, ...]] = []
    is_open = False
    for token in _TOKEN.findall(side):
        if token in "()":
            if is_open == (token == "("):
                raise ArgumentError(f"has a {token!r} too many: parentheses do not nest")
            is_open = not is_open
            axes += [()] if is_open else []
        else:
            names = () if token == "1" else (_name(token),)
            axes[len(axes) - is_open :] = [axes[-1] + names if is_open else names]
    if is_open:
        raise ArgumentError("lacks a ')'")
    return tuple(axes)


def _name(token: str) -> str:
    # The same names that einops takes without a warning.
    if not token.isidentifier() or token.strip("_") != token or keyword.iskeyword(token):
        raise ArgumentError(f"has {token!r}: axes are names such as o, i or heads (no keywords of Python), (groups of them) or 1")
    return token


def _check_names(before: Axes, after: Axes, sizes: Mapping[str, int]) -> None:
    left, right = _flat(before), _flat(after)
    for names in (left, right):
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ArgumentError(f"repeats {repeated[0]!r}: every axis stands once on each side")
    if unknown := [name for name in right if name not in left]:
        raise ArgumentError(f"has {unknown[0]!r} on the right only: axes are {', '.join(left)}")
    if dropped := [name for name in left if name not in right]:
        raise ArgumentError(f"drops {dropped[0]!r}: every axis must stand on the right as well")
    if unknown := [name for name in sizes if name not in left]:
        raise ArgumentError(f"has no {unknown[0]!r}, which sizes name: axes are {', '.join(left)}")


def _axis_sizes(before: Axes, shape: Sequence[int], given: Mapping[str, int]) -> dict[str, int]:
    """Size of every name, from the parameter's shape and the sizes that are given or known."""
    sizes: dict[str, int] = {}
    for axis, size in zip(before, shape, strict=True):
        known = {name: given.get(name, _NUMBERS.get(name)) for name in axis if name in given or name in _NUMBERS}
        unknown = [name for name in axis if name not in known]
        if len(unknown) > 1:
            names = " and ".join(unknown)
            raise ArgumentError(f"leaves {names} open in {size}: give all but one, as in (view, {{{unknown[0]!r}: ...}})")
        product = math.prod(known.values())
        if size % product or (not unknown and size != product):
            raise ArgumentError(_misfit(known, product, size, is_factor=bool(unknown)))
        sizes |= known | dict.fromkeys(unknown, size // product)
    return sizes


def _misfit(known: Mapping[str, int], product: int, size: int, *, is_factor: bool) -> str:
    if not known:
        return f"has 1 where the weight has {size}: name that axis"
    word, relation = " * ".join(known), "divide" if is_factor else "be"
    way_out = f"give other sizes, as in (view, {{{next(iter(known))!r}: ...}}), or narrow the glob"
    return f"needs {word} to {relation} {size}, and {word} is {product}: {way_out}"


def _flat(axes: Axes) -> list[str]:
    return [name for axis in axes for name in axis]


def _written(axes: Iterable[tuple[str, ...]]) -> str:
    return " ".join("1" if not axis else axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def _count(axes: int) -> str:
    return "1 axis" if axes == 1 else f"{axes} axes"
