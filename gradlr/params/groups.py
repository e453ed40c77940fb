"""Parameters that share a kind and all options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ranks import RankSchedule
from ..rules import Rule
from .kinds import ParameterPlan


@dataclass
class ParameterGroup:
    """Parameters that share a kind and all options; becomes one entry of `opt.param_groups`."""

    label: str
    kind: str
    plans: list[ParameterPlan]
    rule: Rule
    schedule: RankSchedule
    momentum_rank: int | float
    lr: float
    beta: float
    weight_decay: float

    def for_torch(self) -> dict[str, Any]:
        """One entry of `param_groups`: plain values only, so that a state_dict loads with `weights_only=True`."""
        named = [(plan.name, plan.parameter) for plan in self.plans]
        options = {"lr": self.lr, "beta": self.beta, "weight_decay": self.weight_decay}
        return {"params": named, "label": self.label, "kind": self.kind, "rule": self.rule.name, **options}
