"""Which options each parameter trains with: those of its group, of its kind, and of the whole model, the nearest first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ArgumentError
from ..ranks import RankSchedule, as_schedule, require_rank
from ..rules import Rule, resolve
from ..rules.base import require_fraction, require_number, require_rate
from .kinds import KINDS, Kind, ParameterPlan, kind_named, with_kind

# What an update reads of a group, and the limit that it stays below. A schedule that ends at zero may end just below it.
RATES = {"lr": math.inf, "lr_scale": math.inf, "beta": 1.0, "weight_decay": math.inf}
LEAST_RATE = -1e-12
_OPTIONS = ("lr", "rank", "momentum_rank", "beta", "weight_decay", "rule", "kind", "kinds")


@dataclass
class ParameterGroup:
    """Parameters that share a kind and all options; becomes one entry of `opt.param_groups`."""

    label: str
    kind: str
    plans: list[ParameterPlan]
    rule: Rule
    schedule: RankSchedule
    momentum_rank: int | float
    lr: float | Tensor
    lr_scale: float
    beta: float
    weight_decay: float

    def for_torch(self) -> dict[str, Any]:
        """One entry of `param_groups`: plain values only, so that a state_dict loads with `weights_only=True`."""
        named = [(plan.name, plan.parameter) for plan in self.plans]
        # A tensor of its own: some schedulers multiply that of each group, one after the other. It is read at every update.
        lr = self.lr.detach().cpu().clone() if isinstance(self.lr, Tensor) else self.lr
        options = {"lr": lr, "lr_scale": self.lr_scale, "beta": self.beta, "weight_decay": self.weight_decay}
        return {"params": named, "label": self.label, "kind": self.kind, "rule": self.rule.name, **options}


class _Scope(NamedTuple):
    """Options that are given in one place: of a group, or of the whole model.

    Attributes:
        options: For all parameters there.
        kinds: For those of one kind, which are nearer to it.
    """

    options: Mapping[str, Any]
    kinds: Mapping[str, Mapping[str, Any]]


def parameter_groups(
    plans: list[ParameterPlan],
    groups: Sequence[dict[str, Any]],
    kinds: Mapping[str, Mapping[str, Any]] | None,
    **options: Any,
) -> list[ParameterGroup]:
    """The parameters, by group and kind, with the options of each.

    Args:
        plans: Of all trainable parameters.
        groups, kinds: As `gradlr.attach` takes them.
        options: lr, rank, momentum_rank, beta, weight_decay and rule of the whole model.

    Raises:
        ArgumentError: an option is out of range, unknown or without effect, or a group matches nothing.
    """
    if not isinstance(groups, list | tuple) or not all(isinstance(group, dict) for group in groups):
        raise ArgumentError(f'groups={groups!r}: give a list of dicts, such as [{{"match": "encoder.*", "lr": 1e-3}}]')
    model = _Scope(options, _checked_kinds("kinds", kinds))
    found, rest = [], list(plans)
    for index, group in enumerate(groups):
        patterns = _patterns(index, group)
        members = [plan for plan in rest if any(fnmatchcase(plan.name, pattern) for pattern in patterns)]
        if not members:
            raise ArgumentError(
                f"groups[{index}]: {' or '.join(map(repr, patterns))} matches no trainable parameter that an earlier group left; "
                f"names look like {plans[0].name!r}"
            )
        rest = [plan for plan in rest if plan not in members]
        if "kind" in group:
            members = [with_kind(plan, group["kind"]) for plan in members]
        own = {key: value for key, value in group.items() if key not in ("match", "kind", "kinds")}
        scope = _Scope(own, _checked_kinds(f"groups[{index}]['kinds']", group.get("kinds")))
        _require_used(patterns[0], scope, {plan.kind for plan in members})
        found += _by_kind(patterns[0], (scope, model), members)
    return found + _by_kind("", (model,), rest)


def require_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Raise an ArgumentError where somebody has written into a group what no step can be taken with."""
    for group in groups:
        for key, limit in RATES.items():
            if not LEAST_RATE < group[key] < limit:
                raise ArgumentError(
                    f"opt.param_groups: {key!r} of group {group['label']!r} is {float(group[key]):g}; it must lie in "
                    f"[0, {limit:g}). Was it a scheduler that went on beyond its last step? Nothing was changed"
                )


def _patterns(index: int, group: dict[str, Any]) -> list[str]:
    unknown = sorted(set(group) - {"match", *_OPTIONS})
    if unknown or "match" not in group:
        what = f"unknown option {unknown[0]!r}" if unknown else 'no "match"'
        raise ArgumentError(f'groups[{index}] has {what}; give "match" and any of {", ".join(_OPTIONS)}')
    given = group["match"]
    patterns = list(given) if isinstance(given, list | tuple) else [given]
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(f'groups[{index}]: "match" is {given!r}; give a glob such as "encoder.*", or a list of them')
    return patterns


def _checked_kinds(where: str, kinds: Any) -> dict[str, Mapping[str, Any]]:
    """What was given for each kind, by the kind's own name."""
    if kinds is None:
        return {}
    if not isinstance(kinds, Mapping) or not all(isinstance(row, Mapping) for row in kinds.values()):
        raise ArgumentError(f'{where}={kinds!r}: give a dict of dicts, such as {{"embedding": {{"lr": 1e-4}}}}')
    known = {kind_named(name): row for name, row in kinds.items()}
    if len(known) < len(kinds):
        raise ArgumentError(f"{where} has both 'embedding' and 'table', which are two words for one kind: give one of them")
    for name, row in known.items():
        allowed = ("lr", "rule", "weight_decay") if "weight_decay" in KINDS[name].options else ("lr", "rule")
        if unknown := sorted(set(row) - set(allowed)):
            raise ArgumentError(f"{where}[{name!r}] has {unknown[0]!r}; options of a kind {name} are {', '.join(allowed)}")
    return known


def _require_used(label: str, scope: _Scope, kinds: set[str]) -> None:
    used = {option for kind in kinds for option in KINDS[kind].options}
    # An option without effect is a mistake about what a parameter is: it is told, not passed over.
    idle = [repr(key) for key in sorted(scope.options.keys() - used)]
    idle += [f"kinds[{kind!r}]" for kind in scope.kinds if kind not in kinds]
    if idle:
        raise ArgumentError(
            f"group {label!r}: {idle[0]} does nothing for its parameters, each a {' or '.join(sorted(kinds))}; "
            f"options that do are {', '.join(sorted(used | {'kind', 'kinds'}))}. A rule of a kind's own: "
            f'"kinds": {{{min(kinds)!r}: {{"rule": ...}}}}'
        )


def _by_kind(label: str, scopes: Sequence[_Scope], plans: list[ParameterPlan]) -> list[ParameterGroup]:
    # All kinds are made, so that options out of range are found also where no parameter takes them.
    made = [_group(label, kind, scopes, [plan for plan in plans if plan.kind == kind.name]) for kind in KINDS.values()]
    return [group for group in made if group.plans]


def _group(label: str, kind: Kind, scopes: Sequence[_Scope], members: list[ParameterPlan]) -> ParameterGroup:
    def nearest(option: str) -> tuple[str, Any, float]:
        """What to call the nearest value of an option, the value, and which share of it, as a rate, is the kind's own."""
        for scope in scopes:
            if option in scope.kinds.get(kind.name, {}):
                return f"kinds[{kind.name!r}][{option!r}]", scope.kinds[kind.name][option], 1.0
            # A rule that is given for a group or for the whole model is one for matrices.
            if option in scope.options and (option != "rule" or "rule" in kind.options):
                return option, scope.options[option], kind.lr_share
        return option, kind.rule, 1.0

    where_lr, rate, share = nearest("lr")
    where_rule, named, _ = nearest("rule")
    where_decay, decay, _ = nearest("weight_decay")
    _, momentum_rank, _ = nearest("momentum_rank")
    lr, decay, rule = require_rate(where_lr, rate), require_number(where_decay, decay), resolve(named)
    if not ("rank" in kind.options or rule.is_elementwise):
        raise ArgumentError(f"{where_rule}={rule.name!r} works on matrices; vectors need a rule such as 'adam'")
    require_rank("momentum_rank", momentum_rank, minimum=0)
    decay = decay if "weight_decay" in kind.options else 0.0
    return ParameterGroup(
        f"{label} {kind.name}".strip(), kind.name, members, rule, as_schedule(nearest("rank")[1]), momentum_rank,
        lr=lr, lr_scale=share, beta=require_fraction("beta", nearest("beta")[1]), weight_decay=decay,
    )  # fmt: skip
