"""Updates through `torch.compile`: one graph for each shape, and none more when the rank, the rate or the step moves."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..gradient import Dense, GradientOperator, OuterProduct, Sketched
from ..layers import LinearOp
from ..linalg import UNSHARDED
from ..rules import Rule, State, Update, UpdateContext
from ..tensors import device_traits

Parts = dict[str, Tensor]

_LINEAR = LinearOp()


class CompiledUpdates:
    """The same as a compiled function, for gradients that are whole in this process; others are eager.

    What moves between steps goes in as tensors: random columns, drawn before and zero beyond the rank, the rank and the number of
    the step. The first update of each shape takes as long as its compilation.

    Args:
        backend: Of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._compiled: dict[Hashable, Callable[..., tuple[Parts, State]]] = {}

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self._compiled)

    def __call__(self, rule: Rule, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        rank = context.ceiling if rule.pads_rank else context.rank
        known = _parts_of(gradient, rank)
        if known is None or not context.layout.is_whole:
            return rule.update(gradient, state, context)
        kind, operands = known
        columns = None
        if rule.has_rank:
            like = torch.empty(0, dtype=gradient.operand_dtype or gradient.dtype, device=gradient.device)
            columns = context.gaussian(rule.columns_shape(gradient.shape, context.rank), like)
            columns = pad(columns, (0, rank - context.rank))
        numbers = rank, context.momentum_rank, context.beta
        key = (id(rule), kind, *map(_form, (*operands, *state.values())), *state, *numbers)
        if key not in self._compiled:
            compute = _own_code(_compute)
            self._compiled[key] = torch.compile(compute, backend=self._backend, fullgraph=True, dynamic=False)
        wide = device_traits(gradient.device).widest_float
        moving = [torch.full((), float(number), dtype=wide, device=gradient.device) for number in (context.rank, context.step)]
        parts, new_state = self._compiled[key](rule, kind, operands, columns, *moving, state, numbers)
        return Update(**parts), new_state


def _compute(
    rule: Rule,
    kind: Callable[..., GradientOperator],
    operands: tuple[Tensor, ...],
    columns: Tensor | None,
    active: Tensor,
    step: Tensor,
    state: State,
    numbers: tuple[int, int, float],
) -> tuple[Parts, State]:
    rank, momentum_rank, beta = numbers
    context = UpdateContext(rank, momentum_rank, beta, cast(int, step), None, columns=columns, active=active, layout=UNSHARDED)
    update, new_state = rule.update(kind(*operands), state, context)
    return update.named_parts(), new_state


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    # The compiler counts recompilations by code object, and gives up after a few: each shape has one of its own.
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _dense(matrix: Tensor) -> Dense:
    return Dense(matrix, layout=UNSHARDED)


def _outer(delta: Tensor, x: Tensor) -> OuterProduct:
    return OuterProduct(delta, x, _LINEAR)


def _sketched(*parts: Tensor) -> Sketched:
    return Sketched(*parts, layout=UNSHARDED)


def _spanned(*parts: Tensor) -> Sketched:
    return Sketched(*parts, left_spans=True, layout=UNSHARDED)


def _parts_of(gradient: GradientOperator, rank: int) -> tuple[Callable[..., GradientOperator], tuple[Tensor, ...]] | None:
    """What makes the same gradient anew inside a graph, and of which tensors; None of those that are left eager.

    A sketch gets columns of zeros up to the rank, which change nothing that is known.
    """
    if isinstance(gradient, Dense):
        return _dense, (gradient.stored,)
    if isinstance(gradient, OuterProduct):
        factors = gradient.factors()
        return None if factors is None else (_outer, factors)
    if isinstance(gradient, Sketched) and gradient.left is not None and gradient.left_sketch is not None:
        parts = (gradient.right, gradient.right_sketch, gradient.left, gradient.left_sketch)
        padded = tuple(pad(part, (0, max(0, rank - part.shape[-1]))) for part in parts)
        return _spanned if gradient.left_spans else _sketched, padded
    return None


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
