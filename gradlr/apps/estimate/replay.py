"""What the estimate does to an attached optimizer: updates of one form are computed once, and counted as often as they come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...gradient import GradientOperator
from ...linalg.int8 import Int8Weight
from ...optimizer import GradLR
from ...rules import Rule, State, Update, UpdateContext
from .memory_tracker import MemoryTracker

Receive = Callable[[Any, GradientOperator], None]


def replay_updates(optimizer: GradLR, tracker: MemoryTracker, around_receive: Callable[[Receive], Receive]) -> None:
    """Put replaying rules and a replaying writer into an attached optimizer, and a function around its `receive`.

    A rule is a pure function and the writer makes nothing, so that either can be replayed; `receive` is what captures call.
    """
    rules: dict[int, Any] = {id(record.rule): ReplayedRule(record.rule, tracker) for record in optimizer.records}
    for record in optimizer.records:
        record.rule = rules[id(record.rule)]
    optimizer.committer.writer = replayed_writer(optimizer.committer.writer, tracker)
    optimizer.receive = around_receive(optimizer.receive)  # type: ignore[assignment, method-assign]


def waiting_gradient(optimizer: GradLR, parameter: Tensor) -> GradientOperator | None:
    """The gradient of a parameter that waits for `step()`."""
    return optimizer.pending.gradients.get(optimizer.store.by_id[id(parameter)].index)


class ReplayedRule:
    """A rule of which each update of one form is computed once; after that, tensors of the same forms stand for its results.

    Args:
        rule: Whose updates; in all else this is that rule.
        tracker: Counts what they take.
    """

    def __init__(self, rule: Rule, tracker: MemoryTracker) -> None:
        self._rule, self._tracker = rule, tracker
        self._blanks: dict[Hashable, list[tuple[int, str, _Blank]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        """The rule's own update, or one that takes as much memory."""
        known = [*tensors_of(vars(gradient).values()), *state.values()]
        ranks, is_owned = (context.rank, context.momentum_rank), vars(gradient).get("_is_owned")
        # What a shard's update sends depends on the size of the whole.
        whole = context.layout.whole((1, 1, *gradient.shape))
        signature = (self._rule, type(gradient), is_owned, ranks, tuple(whole), *state, *map(_form, known))
        if result := self._tracker.replay(signature, lambda: self._rule.update(gradient, state, context)):
            self._blanks[signature] = _blanks_of(result, known)
            return result
        made: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for place, key, blank in self._blanks[signature]:
            made[place][key] = blank.make(known)
            known.append(made[place][key])
        return Update(**made[0]), made[1]


class _Blank:
    """The form of a result: a new storage with room for it, or a view of what an input or an earlier result lies in."""

    def __init__(self, result: Tensor, others: list[Tensor]) -> None:
        self.view = (tuple(result.shape), result.stride(), result.storage_offset())
        self.dtype, self.count = result.dtype, result.untyped_storage().nbytes() // result.element_size()
        keys = [other.untyped_storage()._cdata for other in others]
        key = result.untyped_storage()._cdata
        self.source = keys.index(key) if key in keys else None

    def make(self, others: list[Tensor]) -> Tensor:
        """Another one, given the inputs and the results before it."""
        base = torch.empty(self.count, dtype=self.dtype) if self.source is None else others[self.source]
        return base.as_strided(*self.view)


def _blanks_of(result: tuple[Update, State], inputs: list[Tensor]) -> list[tuple[int, str, _Blank]]:
    known, blanks = list(inputs), []
    for place, values in enumerate((vars(result[0]), result[1])):
        for key, value in values.items():
            if isinstance(value, Tensor):
                blanks.append((place, key, _Blank(value, known)))
                known.append(value)
    return blanks


def replayed_writer(write: Callable[..., None], tracker: MemoryTracker) -> Callable[..., None]:
    """A committer's `writer` that writes each form of an update once and counts it as often as it comes."""

    def replayed(parameter: Tensor, view: Any, update: Update, **options: Any) -> None:
        parts = [(name, _form(part)) for name, part in vars(update).items() if isinstance(part, Tensor)]
        signature = ("write", view.pattern, bool(options["weight_decay"]), _form(parameter), *parts)
        tracker.replay(signature, lambda: write(parameter, view, update, **options))

    return replayed


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values."""
    return [value for value in values if isinstance(value, Tensor)]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, isinstance(tensor, Int8Weight))
