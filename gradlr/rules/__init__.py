"""What is made of a gradient: rules, pure functions of an operator and a state of plain tensors."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, warn
from .adam import Adam
from .base import Rule, State, Update, UpdateContext
from .factor_moments import FactorMoments
from .low_rank_polar import LowRankPolar
from .multi_normalized import MultiNormalized
from .polar import Polar
from .rowwise import RowwiseRMSprop

__all__ = [
    "Adam",
    "FactorMoments",
    "LowRankPolar",
    "MultiNormalized",
    "Polar",
    "RowwiseRMSprop",
    "Rule",
    "State",
    "Update",
    "UpdateContext",
    "resolve",
]

BUILT_IN: dict[str, type[Rule]] = {
    rule.name: rule for rule in (LowRankPolar, MultiNormalized, Polar, FactorMoments, Adam, RowwiseRMSprop)
}

_RENAMED = (
    "the rule 'tracked_momentum' (TrackedMomentum) is called 'low_rank_polar' (LowRankPolar) now. Its learning rate is AdamW's: "
    "what was lr=1.6e-2 is about 1.3e-3 (width 128); and it keeps a momentum only where momentum_rank= asks for one, 4 before"
)


def __getattr__(name: str) -> Any:
    if name == "TrackedMomentum":
        warn(_RENAMED)
        return LowRankPolar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resolve(rule: str | Rule) -> Rule:
    """The rule object for a name or an object.

    Raises:
        ArgumentError: the name is unknown, or the object is no `Rule`.
    """
    if isinstance(rule, Rule):
        return rule
    if rule == "tracked_momentum":
        warn(_RENAMED)
        rule = "low_rank_polar"
    if isinstance(rule, str) and rule in BUILT_IN:
        return BUILT_IN[rule]()
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise ArgumentError(f"rule {rule.__name__} is a class: pass an object, {rule.__name__}()")
    names = ", ".join(BUILT_IN)
    raise ArgumentError(f"rule {rule!r} is unknown: use one of {names}, or an object of a subclass of gradlr.rules.Rule")
