"""What all processes must have in common, as words that can be compared and told."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..slots import Slot, rule_entries


def fingerprint(slots: Iterable[Slot], groups: list[dict[str, Any]], options: Mapping[str, Any]) -> dict[str, str]:
    """Library versions, options and each parameter's form, rule and rates: name → value.

    The number of threads is among them, since products of matrices may round differently with another.
    """
    slots = list(slots)
    versions = {"the call": "attach", "gradlr's version": sys.modules["gradlr"].__version__, "torch's version": torch.__version__}
    if all(slot.plan.parameter.device.type == "cpu" for slot in slots):
        options = {**options, "torch.get_num_threads()": torch.get_num_threads()}
    forms = [_form(slot, groups[slot.group_index]) for slot in slots]
    told = {**versions, **options, **{key: value for form in forms for key, value in form.items()}}
    # What prints where it lies in memory differs between processes.
    return {key: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for key, value in told.items()}


def _form(slot: Slot, group: dict[str, Any]) -> dict[str, Any]:
    parameter, plan = slot.plan.parameter, slot.plan
    told = {
        "place in the order": slot.index, "shape": tuple(parameter.shape), "dtype": parameter.dtype,
        "device": parameter.device.type, "placements": getattr(parameter, "placements", "none"),
        "kind": plan.kind, "view": plan.view.pattern, "view's shape": tuple(plan.shape),
        "rule": slot.rule, "rank schedule": slot.schedule, "momentum_rank": slot.momentum_rank, "capture": slot.capture,
    }  # fmt: skip
    rates = {key: float(group[key]) for key in ("lr", "beta", "weight_decay")}
    return {f"{key} of {plan.name!r}": value for key, value in {**told, **rates}.items()}


def state_fingerprint(
    slots: Iterable[Slot], states: Mapping[Tensor, dict[str, Tensor]], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> dict[str, str]:
    """The same of what a checkpoint brings: ranks, rates, step counts and a checksum of each parameter's state."""
    told = {"the call": "load_state_dict", **options}
    for slot in slots:
        state = states[slot.plan.parameter]
        bits = 0
        entries = rule_entries(state) if slot.plan.layout.is_whole else {}
        for key, value in sorted(entries.items()):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            bits = zlib.crc32(flat.numpy().tobytes(), zlib.crc32(key.encode(), bits))
        loaded = {"rank": slot.rank, "step count": int(state["step"]), "state": f"{bits:08x}"}
        rates = {key: float(groups[slot.group_index][key]) for key in ("lr", "beta", "weight_decay")}
        told |= {f"{key} of {slot.plan.name!r}": value for key, value in {**loaded, **rates}.items()}
    return {key: str(value) for key, value in told.items()}
