"""Who is compared, by name: torch's optimizers, gradlr in every form that a name can spell, and the real peers."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from ... import rules
from ...errors import ArgumentError
from ...ranks import ByLoss
from .peers import PEERS, Peer
from .train_steps import Baseline, adamw, adamw_slow_tables, gradlr, muon, row_normalized

_RATES = (1e-3, 2e-3, 4e-3)  # AdamW's, and ours

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adamw", "AdamW", adamw, _RATES),
        Baseline("adamw_b5", "AdamW, β₁ = 0.5", partial(adamw, betas=(0.5, 0.999)), _RATES),
        Baseline("adamw_b0", "AdamW, β₁ = 0", partial(adamw, betas=(0.0, 0.999)), _RATES),
        Baseline("adamw_slow_tables", "AdamW, embeddings at lr / 4", adamw_slow_tables, _RATES),
        Baseline(
            "adamw_b0_slow_tables",
            "AdamW, β₁ = 0, embeddings at lr / 16",
            partial(adamw_slow_tables, share=1 / 16, betas=(0.0, 0.999)),
            _RATES,
        ),
        Baseline("muon", "Muon", muon, (4e-3, 8e-3, 1.6e-2)),
        Baseline("muon_b5", "Muon, momentum 0.5", partial(muon, momentum=0.5), (4e-3, 8e-3, 1.6e-2)),
        Baseline("muon_b0", "Muon without momentum", partial(muon, momentum=0.0), (4e-3, 8e-3, 1.6e-2)),
        Baseline("row_normalized", "Rows normalized (SCALE's rule)", row_normalized, _RATES),
        Baseline("default", "gradlr, default", gradlr(), _RATES),
        Baseline("int8", "gradlr, int8 weights", gradlr(int8_group=64), _RATES),
        Baseline("factor_moments", "FactorMoments r16 (the notebook's)", gradlr(rule="factor_moments", rank=ByLoss(16)), _RATES),
        Baseline(
            "factor_moments_adjusted",
            "FactorMoments r16, adjusted",
            gradlr(rule=rules.FactorMoments(is_adjusted=True), rank=ByLoss(16)),
            _RATES,
        ),
        *PEERS.values(),
    )
}
# Those that need no package beside torch.
OWN_BASELINES = [name for name in BASELINES if name not in PEERS]

# What may follow `k4_r64`: the words in a table, and arguments of `gradlr`.
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "_no_residual": ("no residual", {"rule": rules.LowRankPolar(residual=0)}),
    "_residual1": ("residual 1", {"rule": rules.LowRankPolar(residual=1)}),
    "_residual2": ("residual 2", {"rule": rules.LowRankPolar(residual=2)}),
    "_beta5": ("β = 0.5", {"beta": 0.5}),
    "_tables1": ("embeddings at lr", {"embedding_share": 1.0}),
    "_tables4": ("embeddings at lr / 4", {"embedding_share": 1 / 4}),
    "_tables8": ("embeddings at lr / 8", {"embedding_share": 1 / 8}),
    "_tables16": ("embeddings at lr / 16", {"embedding_share": 1 / 16}),
    "_one_sided": ('capture="one_sided"', {"capture": "one_sided"}),
    "_adaptor": ('capture="adaptor"', {"capture": "adaptor"}),
    "_int8": ("int8 weights", {"int8_group": 64}),
    "_int8g32": ("int8 weights in groups of 32", {"int8_group": 32}),
    "_int8g16": ("int8 weights in groups of 16", {"int8_group": 16}),
    "_group": ("process_group=", {"apply": "step", "in_group": True}),
    "_step": ('apply="step"', {"apply": "step"}),
}
_FORM = "|".join(sorted(_FORMS, key=len, reverse=True))
_FULL_WIDTH = {"multi_normalized": "MultiNormalized", "polar": "Polar"}
_SPELLED = re.compile(
    rf"((?P<rule>{'|'.join(_FULL_WIDTH)})|k(?P<k>\d+)_(?P<schedule>r|loss|d)(?P<rank>[1-9]\d*))(?P<forms>({_FORM})*)"
)
SPELLING = (
    f"k<K>_r<R>, k<K>_loss<R>, k<K>_d<SHARE OF THE WIDTH>, {' or '.join(_FULL_WIDTH)}, followed by any of {', '.join(_FORMS)}"
)


def baseline(name: str) -> Baseline:
    """The baseline of that name, from the list or spelled out: `k4_r64_no_residual`, `k0_d4`, `multi_normalized_adaptor`.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name in BASELINES:
        return BASELINES[name]
    match = _SPELLED.fullmatch(name)
    if match is None:
        raise ArgumentError(f"no baseline {name!r}: known are {', '.join(BASELINES)}, or gradlr spelled out as {SPELLING}")
    label, options = _full_width(match["rule"]) if match["rule"] else _low_rank(match)
    for form in re.findall(_FORM, match["forms"]):
        words, more = _FORMS[form]
        label, options = f"{label}, {words}", options | more
    return Baseline(name, label, gradlr(**options), _RATES)


def _full_width(rule: str) -> tuple[str, dict[str, Any]]:
    return _FULL_WIDTH[rule], {"rule": rule}


def _low_rank(match: re.Match[str]) -> tuple[str, dict[str, Any]]:
    k, number = int(match["k"]), int(match["rank"])
    words, rank = {
        "r": (f"r{number}", number),
        "loss": (f"r ≤ {number} by loss", ByLoss(number)),
        "d": (f"r = d/{number}", 1 / number),
    }[match["schedule"]]
    return f"LowRankPolar k{k} {words}", {"rank": rank, "momentum_rank": k}


def require_baselines(names: list[str]) -> None:
    """Raise an ArgumentError unless every named baseline is known and what it needs is installed."""
    missing = {one.package for name in names if isinstance(one := baseline(name), Peer) and not one.is_installed()}
    if missing:
        raise ArgumentError(f"{', '.join(sorted(missing))} not installed: pip install 'gradlr[bench]', or leave them out")
    if "muon" in names and not hasattr(torch.optim, "Muon"):
        raise ArgumentError(f"torch {torch.__version__} has no Muon: install 2.9 or later, or leave muon out")
