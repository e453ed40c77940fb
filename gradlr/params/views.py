"""Views that the user gives: einops expressions, read and checked by einops, and told with the parameter's name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from einops import EinopsError, rearrange

from ..errors import ArgumentError
from ..layers import View
from ..layers.base import axes_of, pattern_of
from .kinds import MATRIX, ParameterPlan

# Axis names that are their own size.
_NUMBERS = {"two": 2, "three": 3, "four": 4}


def with_views(plans: list[ParameterPlan], views: Mapping[str, Any]) -> list[ParameterPlan]:
    """The plans of all trainable parameters with the user's views; what a view matches becomes a matrix.

    Args:
        plans: Without the views.
        views: Glob on parameter names → expression, or pair of expression and sizes. The first match wins.

    Raises:
        ArgumentError: a view cannot be read, does not fit a parameter that it matches, or matches none.
    """
    if not isinstance(views, Mapping) or not all(isinstance(glob, str) for glob in views):
        raise ArgumentError(f'views={views!r}: give a dict such as {{"*.qkv.weight": "(three o) i -> three o i"}}')
    viewed: dict[str, ParameterPlan] = {}
    for glob, value in views.items():
        expression, sizes = _given(glob, value)
        members = [plan for plan in plans if plan.name not in viewed and fnmatchcase(plan.name, glob)]
        if not members:
            raise ArgumentError(
                f"views: {glob!r} matches no trainable parameter that an earlier view left; names look like {plans[0].name!r}"
            )
        for plan in members:
            view = checked_view(expression, sizes, plan.name, plan.parameter.shape)
            viewed[plan.name] = replace(plan, kind=MATRIX, view=view, is_guess=False)
    return [viewed.get(plan.name, plan) for plan in plans]


def _given(glob: str, value: Any) -> tuple[str, dict[str, int]]:
    """One value of `views=`, an expression or a pair of expression and sizes, as that pair."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    expression, sizes = value if is_pair else (value, {})
    is_sized = isinstance(sizes, Mapping) and all(type(size) is int and size > 0 for size in sizes.values())
    if not isinstance(expression, str) or not is_sized:
        raise ArgumentError(
            f'views[{glob!r}] is {value!r}; give an expression such as "(three o) i -> three o i", or a pair with sizes, '
            'positive ints: ("(heads d) i -> heads d i", {"heads": 8})'
        )
    return expression, dict(sizes)


def checked_view(expression: str, sizes: Mapping[str, int], name: str, shape: Sequence[int]) -> View:
    """The view that an expression, with sizes that the shape leaves open, makes of a parameter; batch axes are folded into one.

    Raises:
        ArgumentError: einops cannot read the expression or apply it to the shape, or it does not end in two axes.
    """
    try:
        before, after = axes_of(expression)
        named = {axis for names in before for axis in names if isinstance(axis, str)}
        known = {word: size for word, size in _NUMBERS.items() if word in named} | dict(sizes)
        seen = rearrange(torch.empty(tuple(shape), device="meta"), expression, **known)
        if seen.ndim < 2:
            raise EinopsError(f"Its right side has {seen.ndim} axis: it must end in two, m n, the rows and columns of a matrix")
        if 0 in shape:
            raise EinopsError("The weight is empty: no view is of use there")
    except EinopsError as error:
        # einops tells expression, shape and sizes in its first lines, and what is wrong with them in the others.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = ". ".join(line for line in lines if not line.startswith(("Error while processing", "Input tensor shape")))
        given = f" with {dict(sizes)}" if sizes else ""
        raise ArgumentError(
            f"weight {name!r} {tuple(shape)}: view {expression!r}{given} does not fit. {what}. Name each axis of the weight, "
            'give sizes that are open, as in ("(heads d) i -> heads d i", {"heads": 8}), or narrow the glob'
        ) from None
    # One batch axis always: where strides forbid it the fold makes a copy, and whoever writes sees that it is one.
    batch = tuple(axis for names in after[:-2] for axis in names)
    return View(pattern_of(before, (batch, *after[-2:]) if len(after) > 3 else after), tuple(sorted(known.items())))
