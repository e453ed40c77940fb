"""From a gradient to a weight: what a rule makes of it, and the one place where a weight changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..gradient import Dense, GradientOperator
from ..layers import View
from ..rules import Rule, State, Update, UpdateContext
from ..tensors import compute_dtype_and_device, is_async, local
from .apply_update import apply_update
from .bases import Bases
from .pending import as_dense
from .record import ParamRecord
from .state_store import StateStore


class Writer(Protocol):
    """Writes an update into a weight, as `apply_update` does."""

    def __call__(
        self,
        parameter: Tensor,
        view: View,
        update: Update,
        *,
        lr: float,
        weight_decay: float | Tensor,
        generator: torch.Generator | None,
    ) -> None: ...


@dataclass
class Prepared:
    """What a rule has made of one gradient; nothing has changed yet.

    Attributes:
        record: The parameter.
        context: What the rule was told.
        is_finite: 0-dim flag: whether the gradient, the update and the new state are finite.
        update: The direction.
        new_state: The state after it.
        metrics: What an observer has measured of the gradient.
    """

    record: ParamRecord
    context: UpdateContext
    is_finite: Tensor
    update: Update
    new_state: State
    metrics: Any = None


class Committer:
    """Turns gradients into updates, and writes them.

    Args:
        store: State, groups and random numbers.
        bases: Told of each parameter that has changed.

    Attributes:
        writer: What writes; an estimator of memory puts its own here.
        changed: Names of the parameters updated since the last loss, or in the step under way.
    """

    def __init__(self, store: StateStore, bases: Bases) -> None:
        self.store, self.bases = store, bases
        self.writer: Writer = apply_update
        self.changed: list[str] = []

    def compute(self, record: ParamRecord, gradient: GradientOperator, is_finite: Tensor | None) -> Prepared:
        """Let the rule make an update of a gradient, which may be consumed.

        Args:
            record: The parameter.
            gradient: Its gradient.
            is_finite: `gradient.is_finite()`, or None where the update shows it.
        """
        context, old_state, rule = self.store.context(record), self.store.read(record), record.rule
        if rule.is_elementwise and not rule.accepts_row_factors and not isinstance(gradient, Dense):
            gradient = as_dense(gradient)
        kept = None if record.observer is None else record.observer.keep(gradient)
        try:
            update, new_state = checked(rule, rule.update(gradient, old_state, context), gradient.shape)
        except torch.linalg.LinAlgError:  # products of huge entries have overflowed
            return Prepared(record, context, torch.zeros((), dtype=torch.bool, device=gradient.device), Update(), old_state)
        is_all_finite = all_finite(update, new_state)
        is_finite = is_all_finite if is_finite is None else is_finite & is_all_finite
        prepared = Prepared(record, context, is_finite, update, new_state)
        if record.observer is not None and kept is not None:
            prepared.metrics = record.observer.measure_gradient(record, kept, update, context.step)
        return prepared

    def commit(self, prepared: Prepared) -> None:
        """Write an update and its state, on an asynchronous device only where its flag says so. The only place that does."""
        record, update, is_finite = prepared.record, prepared.update, prepared.is_finite
        parameter, group = record.plan.parameter, self.store.groups[record.group_index]
        new_state, generator = self.store.narrowed(record, prepared.new_state, prepared.context.step)
        lr, decay = float(group["lr"]), group["weight_decay"]
        if is_async(is_finite):
            update, new_state = keep_where(is_finite, update, new_state, self.store.of(record))
            decay = decay * is_finite.to(compute_dtype_and_device(parameter)["dtype"]) if decay else decay
        if record.observer is not None and prepared.metrics is not None:
            matrix = record.plan.view.of(parameter)
            record.metrics = record.observer.measure_update(prepared.metrics, matrix, update, lr=lr, weight_decay=decay)
        weight = local(parameter) if record.is_dtensor else parameter
        self.writer(weight, record.plan.view, update, lr=lr, weight_decay=decay, generator=generator)
        self.store.write(record, new_state)
        self.bases.forget(record)
        self.changed.append(record.plan.name)


def checked(rule: Rule, result: tuple[Update, State], shape: torch.Size) -> tuple[Update, State]:
    """What a rule's `update` returned, where it belongs to a parameter whose view has the given shape.

    Raises:
        ArgumentError: it is no pair of an Update and a state.
        ShapeError: the update's parts have other shapes.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not (is_pair and isinstance(result[0], Update) and isinstance(result[1], dict)):
        found = type(result).__name__
        raise ArgumentError(f"rule {rule.name!r}: update() must return (gradlr.rules.Update(...), state), not {found}")
    update = result[0]
    left, right, dense, rows = update.left, update.right, update.dense, update.rows
    *batch, m, n = (1, 1, *shape) if len(shape) < 2 else shape
    is_right = dense is None or dense.shape == (shape if rows is None else (*rows.shape, n))
    if left is not None and right is not None:
        r = left.shape[-1]
        is_right = is_right and left.shape == (*batch, m, r) and right.shape == (*batch, n, r)
    if not is_right or (left is None) != (right is None):
        shapes = {key: tuple(part.shape) for key, part in vars(update).items() if isinstance(part, Tensor)}
        raise ShapeError(
            f"rule {rule.name!r} made an update with parts of shapes {shapes} for a parameter seen as {tuple(shape)}; "
            "gradlr.rules.Update says what they must be"
        )
    return result


def all_finite(update: Update, state: State) -> Tensor:
    """0-dim boolean: whether the sums of all their tensors are finite, and with them every entry. Never waits for a device."""
    if update.check is not None:
        finite = update.check.isfinite()
        return finite.all() if finite.ndim else finite
    sums = [part.sum() for part in (*update.parts(), *state.values())]
    return torch.stack(sums).isfinite().all() if sums else torch.tensor(True, device="cpu")


def keep_where(is_finite: Tensor, update: Update, new_state: State, old_state: State) -> tuple[Update, State]:
    """The update and the new state, or zeros and the old state, without asking the host which.

    Args:
        is_finite: 0-dim boolean on the device: whether the update is to be written.
        update: What the rule made of the gradient; its `dense` part is overwritten.
        new_state: The rule's new state.
        old_state: The state before; an entry that has changed its shape stays the new one.
    """
    parts = {key: getattr(update, key) for key in ("left", "right", "row_scale", "dense_rows", "dense_columns")}
    kept = {key: None if value is None else torch.where(is_finite, value, 0.0) for key, value in parts.items()}
    if update.dense is not None:
        update.dense.masked_fill_(~is_finite, 0.0)
    state = {
        key: torch.where(is_finite, value, old_state[key]) if value.shape == old_state[key].shape else value
        for key, value in new_state.items()
    }
    return replace(update, **kept), state
