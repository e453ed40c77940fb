"""What is made of a gradient: rules, pure functions of an operator and a state of plain tensors."""

from __future__ import annotations

from ..errors import ArgumentError
from .adam import Adam
from .base import Rule, State, Update, UpdateContext
from .factor_moments import FactorMoments
from .rowwise import RowwiseRMSprop
from .tracked_momentum import TrackedMomentum

__all__ = ["Adam", "FactorMoments", "RowwiseRMSprop", "Rule", "State", "TrackedMomentum", "Update", "UpdateContext", "resolve"]

BUILT_IN: dict[str, type[Rule]] = {rule.name: rule for rule in (TrackedMomentum, FactorMoments, Adam, RowwiseRMSprop)}


def resolve(rule: str | Rule) -> Rule:
    """The rule object for a name or an object.

    Raises:
        ArgumentError: the name is unknown, or the object is no `Rule`.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in BUILT_IN:
        return BUILT_IN[rule]()
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise ArgumentError(f"rule {rule.__name__} is a class: pass an object, {rule.__name__}()")
    names = ", ".join(BUILT_IN)
    raise ArgumentError(f"rule {rule!r} is unknown: use one of {names}, or an object of a subclass of gradlr.rules.Rule")
