"""Who is compared, by name: torch's optimizers, gradlr in every form that a name can spell, and the real peers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ... import rules
from ...errors import ArgumentError
from ...ranks import ByLoss
from .peers import PEERS, Peer
from .train_steps import Baseline, adamw, adamw_slow_tables, gradlr, muon
from .workloads import Workload

_SLOW = (1e-3, 2e-3, 4e-3)
_FAST = (8e-3, 1.6e-2, 3.2e-2)

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adamw", "AdamW", adamw, _SLOW),
        Baseline("adamw_slow_tables", "AdamW, tables at lr / 4", adamw_slow_tables, _SLOW),
        Baseline("muon", "Muon", muon, (4e-3, 8e-3, 1.6e-2)),
        Baseline("default", "gradlr, default (k4, r ≤ 64 by loss)", gradlr(), _FAST),
        Baseline("factor_moments", "FactorMoments r16 (the notebook's)", gradlr(rule="factor_moments", rank=ByLoss(16)), _FAST),
        Baseline("factor_moments_adjusted", "FactorMoments r16, adjusted",
                  gradlr(rule=rules.FactorMoments(is_adjusted=True), rank=ByLoss(16)), _FAST),
        *PEERS.values(),
    )
}  # fmt: skip
# Those that need no package beside torch.
OWN_BASELINES = [name for name in BASELINES if name not in PEERS]

_SPELLED = re.compile(r"k(?P<k>[1-9]\d*)_(?P<schedule>r|loss)(?P<rank>[1-9]\d*)(?P<forms>(_[a-z_]+)?)")
_SCHEDULES: dict[str, tuple[Callable[[int], Any], str]] = {
    "r": (lambda rank: rank, "r{}"),
    "loss": (ByLoss, "r ≤ {} by loss"),
}
# What may follow `k4_r64`, longest first: the words in a table, and arguments of the rule or of attach.
_FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "_fast_tables": ("tables at lr / 8", {}, {"table_share": 1 / 8}),
    "_no_residual": ("no residual", {"residual": 0.0}, {}),
    "_one_sided": ('capture="one_sided"', {}, {"capture": "one_sided"}),
    "_adaptor": ('capture="adaptor"', {}, {"capture": "adaptor"}),
    "_group": ("process_group=", {}, {"apply": "step", "in_group": True}),
    "_step": ('apply="step"', {}, {"apply": "step"}),
}
SPELLING = f"k<K>_r<R> or k<K>_loss<R>, followed by any of {', '.join(_FORMS)}"


def baseline(name: str) -> Baseline:
    """The baseline of that name, from the list or spelled out: `k4_r64_no_residual`, `k4_loss128`.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name in BASELINES:
        return BASELINES[name]
    match = _SPELLED.fullmatch(name)
    forms = None if match is None else _split_forms(match["forms"])
    if forms is None:
        raise ArgumentError(f"no baseline {name!r}: known are {', '.join(BASELINES)}, or gradlr spelled out as {SPELLING}")
    k, rank = int(match["k"]), int(match["rank"])
    make, words = _SCHEDULES[match["schedule"]]
    rule, options = {}, {"rank": make(rank), "momentum_rank": k}
    for form in forms:
        rule |= _FORMS[form][1]
        options |= _FORMS[form][2]
    if rule:
        options["rule"] = rules.TrackedMomentum(**rule)
    label = ", ".join([f"TrackedMomentum k{k} {words.format(rank)}", *(_FORMS[form][0] for form in forms)])
    return Baseline(name, label, gradlr(**options), _FAST)


def _split_forms(text: str) -> list[str] | None:
    found = []
    while text:
        form = next((form for form in _FORMS if text.startswith(form)), None)
        if form is None:
            return None
        found.append(form)
        text = text[len(form) :]
    return found


def suits(baseline: Baseline, workload: Workload, has_folded: bool) -> bool:
    """Whether the baseline can train the workload: no adapters on weights that know nothing, 2-D packages on 2-D weights."""
    if not isinstance(baseline, Peer):
        return True
    return not (baseline.is_adapter and not workload.needs_pretrained) and (baseline.takes_folded or not has_folded)


def require_baselines(names: list[str]) -> None:
    """Raise an ArgumentError unless every named baseline is known and what it needs is installed."""
    missing = {one.package for name in names if isinstance(one := baseline(name), Peer) and not one.is_installed()}
    if missing:
        raise ArgumentError(f"{', '.join(sorted(missing))} not installed: pip install 'gradlr[bench]', or leave them out")
    if "muon" in names and not hasattr(torch.optim, "Muon"):
        raise ArgumentError(f"torch {torch.__version__} has no Muon: install 2.9 or later, or leave muon out")
