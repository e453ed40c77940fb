"""From a gradient to a weight: what a rule makes of it, and the one place where a weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..gradient import Dense, GradientOperator
from ..layers import View
from ..rules import Rule, State, Update, UpdateContext
from ..tensors import is_async, local
from .apply_update import apply_update
from .bases import Bases
from .compiled_updates import CompiledUpdates
from .pending import as_dense
from .record import ParamRecord
from .state_store import StateStore

# In inference mode torch's operators cost the host a sixth less. What is made there may not be changed outside of it: state is
# made elsewhere, since its users may write into it.
_AS_IT_IS = nullcontext()


class Writer(Protocol):
    """Writes an update into a weight, as `apply_update` does."""

    def __call__(
        self,
        parameter: Tensor,
        view: View,
        update: Update,
        *,
        lr: float,
        weight_decay: float,
        generator: torch.Generator | None,
        check: Tensor | None,
        is_mirrored: bool,
    ) -> None: ...


@dataclass
class Prepared:
    """What a rule has made of one gradient; nothing has changed yet.

    Attributes:
        record: The parameter.
        context: What the rule was told.
        check: 0-dim number that is finite if and only if the gradient, the update and the new state are.
        update: The direction.
        new_state: The state after it.
        metrics: What an observer has measured of the gradient.
    """

    record: ParamRecord
    context: UpdateContext
    check: Tensor
    update: Update
    new_state: State
    metrics: Any = None


class Committer:
    """Turns gradients into updates, and writes them.

    Args:
        store: State, groups and random numbers.
        bases: Told of each parameter that has changed.

    Attributes:
        compiled: Compiles the rules' updates, where that was asked for.
        writer: What writes; an estimator of memory puts its own here.
        changed: Names of the parameters updated since the last loss, or in the step under way.
    """

    def __init__(self, store: StateStore, bases: Bases) -> None:
        self.store, self.bases = store, bases
        self.compiled: CompiledUpdates | None = None
        self.writer: Writer = apply_update
        self.changed: list[str] = []

    def compute(self, record: ParamRecord, gradient: GradientOperator) -> Prepared:
        """Let the rule make an update of a gradient, which may be consumed; nothing of one that the host knows to be bad.

        Args:
            record: The parameter.
            gradient: Its gradient.
        """
        context, old_state, rule = self.store.context(record), self.store.read(record), record.rule
        is_finite = None if rule.carries_nonfinite else gradient.is_finite()
        if is_finite is not None and record.plan.layout.is_whole and not is_async(is_finite) and not is_finite:
            return _not_finite(record, context, old_state, gradient)
        if rule.is_elementwise and not rule.accepts_row_factors and not isinstance(gradient, Dense):
            gradient = as_dense(gradient)
        kept = None if record.observer is None else record.observer.keep(gradient)
        try:
            # Of a rule without state all that is made is gone once it is written.
            with torch.inference_mode() if record.is_plain and not old_state and self.compiled is None else _AS_IT_IS:
                made = (
                    rule.update(gradient, old_state, context)
                    if self.compiled is None
                    else self.compiled(rule, gradient, old_state, context)
                )
            update, new_state = checked(rule, made, gradient.shape)
        except torch.linalg.LinAlgError:  # products of huge entries have overflowed
            return _not_finite(record, context, old_state, gradient)
        check = check_of(update, new_state)
        check = check if is_finite is None else torch.where(is_finite, check, torch.nan)
        prepared = Prepared(record, context, check, update, new_state)
        if record.observer is not None and kept is not None:
            prepared.metrics = record.observer.measure_gradient(record, kept, update, context.step)
        return prepared

    def compute_batch(self, records: Sequence[ParamRecord], gradient: GradientOperator) -> list[Prepared]:
        """The same of several parameters of one shape, rule and step, as one update of a batch: as many operations as of one.

        Args:
            records: The parameters, of a rule that `is_batched`.
            gradient: Theirs, stacked.
        """
        rule, states = records[0].rule, [self.store.read(record) for record in records]
        state = {key: torch.stack([one[key] for one in states]) for key in states[0]}
        members = tuple(partial(self.store.context, record) for record in records)
        context = replace(members[0](), generator=None, members=members)
        try:
            update, new_state = checked(rule, rule.update(gradient, state, context), gradient.shape)
        except torch.linalg.LinAlgError:  # as above; the step is left out whole
            return [_not_finite(record, context, old, gradient) for record, old in zip(records, states, strict=True)]
        parts = update.named_parts()
        check = parts.pop("check", None)
        is_own = check is not None and check.shape == (len(records),)
        checks = check.unbind() if is_own and check is not None else [check_of(update, new_state)] * len(records)
        return [
            # State is kept: not as a view, with which all of the batch's would be.
            Prepared(
                record, context, checks[place],
                Update(**{key: part[place] for key, part in parts.items()}),
                {key: value[place].clone() for key, value in new_state.items()},
            )
            for place, record in enumerate(records)
        ]  # fmt: skip

    def commit(self, prepared: Prepared) -> None:
        """Write an update and its state, on an asynchronous device only where its check is finite. The only place that does."""
        record, update = prepared.record, prepared.update
        parameter, group = record.plan.parameter, self.store.groups[record.group_index]
        # Of all kinds the same number stands in "lr", which schedulers may set; what a kind takes of it is a factor of its own.
        lr, decay = float(group["lr"]) * group["lr_scale"], float(group["weight_decay"])
        check = prepared.check if is_async(prepared.check) else None
        if record.observer is not None and prepared.metrics is not None:
            matrix = record.plan.view.of(parameter)
            record.metrics = record.observer.measure_update(prepared.metrics, matrix, update, lr=lr, weight_decay=decay)
        weight, step = local(parameter) if record.is_dtensor else parameter, prepared.context.step
        generator = self.store.rounding(record, step) if record.is_narrow else None
        options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "generator": generator, "check": check}
        with torch.inference_mode() if record.is_plain else _AS_IT_IS:
            self.writer(weight, record.plan.view, update, **options, is_mirrored=step % 2 == 0)
        # After the write, on whose way a state may have been completed.
        new_state = prepared.new_state
        if self.store.dtype != torch.float32:
            new_state = self.store.narrowed(record, new_state, step, generator)
        if check is not None and new_state:
            # Two operations; isfinite is four.
            new_state = keep_where(check.abs() < torch.inf, new_state, self.store.of(record))
        self.store.write(record, new_state)
        self.bases.forget(record)
        self.changed.append(record.plan.name)


def _not_finite(record: ParamRecord, context: UpdateContext, state: State, gradient: GradientOperator) -> Prepared:
    return Prepared(record, context, torch.full((), torch.nan, device=gradient.device), Update(), state)


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


def check_of(update: Update, state: State) -> Tensor:
    """0-dim number that is finite if and only if every entry of both is: a sum. Never waits for a device."""
    if update.check is not None:
        return update.check.sum() if update.check.ndim else update.check
    sums = [part.sum() for part in (*update.parts(), *state.values())]
    return torch.stack(sums).sum() if sums else torch.zeros((), device="cpu")


def keep_where(is_finite: Tensor, new_state: State, old_state: State) -> State:
    """The new state, or the old one, without asking the host which.

    Args:
        is_finite: 0-dim boolean on the device: whether the update is to be written.
        new_state: The rule's new state.
        old_state: The state before; an entry that has changed its shape stays the new one.
    """
    return {
        key: torch.where(is_finite, value, old_state[key]) if value.shape == old_state[key].shape else value
        for key, value in new_state.items()
    }
