"""What all processes must have in common, as words that can be compared and told."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.record import ParamRecord, rule_entries


def fingerprint(records: Iterable[ParamRecord], groups: list[dict[str, Any]], options: Mapping[str, Any]) -> dict[str, str]:
    """Library versions, options and each parameter's form, rule and rates: name → value.

    The number of threads is among them, since products of matrices may round differently with another.
    """
    records = list(records)
    versions = {"the call": "attach", "gradlr's version": sys.modules["gradlr"].__version__, "torch's version": torch.__version__}
    if all(record.plan.parameter.device.type == "cpu" for record in records):
        options = {**options, "torch.get_num_threads()": torch.get_num_threads()}
    forms = [_form(record, groups[record.group_index]) for record in records]
    told = {**versions, **options, **{key: value for form in forms for key, value in form.items()}}
    # What prints where it lies in memory differs between processes.
    return {key: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for key, value in told.items()}


def _form(record: ParamRecord, group: dict[str, Any]) -> dict[str, Any]:
    parameter, plan = record.plan.parameter, record.plan
    told = {
        "place in the order": record.index, "shape": tuple(parameter.shape), "dtype": parameter.dtype,
        "device": parameter.device.type, "placements": getattr(parameter, "placements", "none"),
        "kind": plan.kind, "view": plan.view.pattern, "view's shape": tuple(plan.shape),
        "rule": record.rule, "rank schedule": record.schedule, "momentum_rank": record.momentum_rank, "capture": record.capture,
    }  # fmt: skip
    rates = {key: float(group[key]) for key in ("lr", "beta", "weight_decay")}
    return {f"{key} of {plan.name!r}": value for key, value in {**told, **rates}.items()}


def state_fingerprint(
    records: Iterable[ParamRecord],
    states: Mapping[Tensor, dict[str, Tensor]],
    groups: list[dict[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """The same of what a checkpoint brings: ranks, rates, step counts and a checksum of each parameter's state."""
    told = {"the call": "load_state_dict", **options}
    for record in records:
        state = states[record.plan.parameter]
        bits = 0
        entries = rule_entries(state) if record.plan.layout.is_whole else {}
        for key, value in sorted(entries.items()):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            bits = zlib.crc32(flat.numpy().tobytes(), zlib.crc32(key.encode(), bits))
        loaded = {"rank": record.rank, "step count": int(state["step"]), "state": f"{bits:08x}"}
        rates = {key: float(groups[record.group_index][key]) for key in ("lr", "beta", "weight_decay")}
        told |= {f"{key} of {record.plan.name!r}": value for key, value in {**loaded, **rates}.items()}
    return {key: str(value) for key, value in told.items()}
