"""Whether a state_dict fits an optimizer, and its tensors brought into the optimizer's shapes."""

from __future__ import annotations

import json
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..params.groups import LEAST_RATE, RATES
from ..rules import UpdateContext
from ..tracker import LossTracker
from .record import ParamRecord

# Rates of format 1 are in another unit: a matrix changed by 0.2 √(max(m, n) (r + α² (d − r)) / (mn)) times its `lr`. In format 2
# there was no "lr_scale": what a kind takes of the rate was part of `lr`.
FORMAT = 3
# What every group of a checkpoint has; schedulers and users may keep more there, before or after it was saved.
_KEYS = ("label", "kind", "rule", "lr", "beta", "weight_decay", "param_names")
_RENAMED = (("kind", "table", "embedding"), ("rule", "tracked_momentum", "low_rank_polar"))


def rates_message(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> str:
    """What is said where a checkpoint of format 1 is loaded: which rates it holds, and which stay."""
    rates = ", ".join(f"{float(one['lr']):g} (kept: {float(own['lr']):g})" for one, own in zip(saved, groups, strict=True))
    return (
        f"the checkpoint was saved by an older gradlr, whose learning rates are in another unit; they are AdamW's now. Its rates "
        f"{rates} were not taken over: those of this attach() stay. A scheduler that is loaded from the same run brings the old "
        "ones back: make a new one"
    )


def check_layout(state_dict: Any, groups: list[dict[str, Any]]) -> None:
    """Raise a CheckpointError unless this is a whole state_dict of gradlr, with the parameters, kinds and rules of `groups`."""
    _check_entries(state_dict)
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        counts = f"{len(saved_groups)} groups, this optimizer {len(groups)}"
        raise CheckpointError(f"the checkpoint has {counts}: attach with the same groups=")
    for saved, group in zip(saved_groups, groups, strict=True):
        _check_group(saved, group)
    extra = extra_of(state_dict)
    if len(extra["ranks"]) != sum(len(group["param_names"]) for group in groups):
        raise CheckpointError(f"the checkpoint holds {len(extra['ranks'])} ranks, not one per parameter")
    LossTracker().load_state_dict(extra["tracker"])


def extra_of(state_dict: dict[str, Any]) -> Any:
    """What a checkpoint holds besides states and groups: its "gradlr", which torch.distributed.checkpoint finds in a group."""
    if "gradlr" in state_dict:
        return state_dict["gradlr"]
    return _in_first_group(state_dict)


def _in_first_group(state_dict: dict[str, Any]) -> Any:
    groups = state_dict.get("param_groups")
    first = groups[0] if isinstance(groups, list) and groups else None
    extra = first.get("gradlr") if isinstance(first, dict) else None
    if not isinstance(extra, str):
        return extra
    try:
        return json.loads(extra)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"the checkpoint's record of ranks, seed and losses is damaged: {error}") from error


def _check_entries(state_dict: Any) -> None:
    extra = extra_of(state_dict) if isinstance(state_dict, dict) else None
    is_ours = isinstance(extra, dict) and {"seed", "ranks", "tracker"} <= extra.keys()
    if not isinstance(extra, dict) or not is_ours or not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError("this is no state_dict of gradlr: it lacks one of 'state', 'param_groups', 'gradlr'")
    copy = _in_first_group(state_dict)
    if extra is not copy and copy is not None and repr(copy) != repr(extra):  # NaN in a history equals nothing
        raise CheckpointError("the checkpoint's two records of ranks, seed and losses differ: it is damaged")
    if type(extra.get("version")) is not int or not 1 <= extra["version"] <= FORMAT:
        raise CheckpointError(f"the checkpoint has format {extra.get('version')!r}, this gradlr reads formats 1 to {FORMAT}")
    is_sound = {
        "state": isinstance(state_dict["state"], dict),
        "param_groups": _is_list_of(dict, state_dict["param_groups"]),
        "ranks": _is_list_of(int, extra["ranks"]) and min(extra["ranks"], default=0) >= 0,
        "seed": _is_count(extra["seed"]),
        "skipped": _is_count(extra.get("skipped", 0)),
    }
    for key, is_right in is_sound.items():
        if not is_right:
            raise CheckpointError(f"the checkpoint's {key!r} is not what a state_dict of gradlr holds there")


def _check_group(saved: dict[str, Any], group: dict[str, Any]) -> None:
    where = f"group {group['label']!r}"
    if missing := [key for key in _KEYS if key not in saved]:
        raise CheckpointError(f"{where}: the checkpoint lacks its {missing[0]!r}")
    names, own_names = saved["param_names"], group["param_names"]
    if not _is_list_of(str, names):
        raise CheckpointError(f"{where}: the checkpoint's 'param_names' are {names!r}, not names")
    if names != own_names:
        differing = sorted(set(names) ^ set(own_names))
        example = differing[0] if differing else names[0]
        raise CheckpointError(f"{where}: the checkpoint has other parameters or another order, {example!r} for one")
    for key in ("kind", "rule"):
        if saved[key] != group[key] and (key, saved[key], group[key]) not in _RENAMED:
            raise CheckpointError(f"{where}: saved with {key} {saved[key]!r}, attached with {group[key]!r}")
    for key in [key for key in group if key in saved]:
        value, limit = group[key], RATES.get(key)
        if limit is not None and not (_is_number(saved[key]) and LEAST_RATE < float(saved[key]) < limit):
            raise CheckpointError(f"{where}: the checkpoint's {key!r} is {saved[key]!r}; it must lie in [0, {limit:g})")
        kind = next((kind for kind in (_is_number, _is_text) if kind(value)), None)
        if kind is not None and not kind(saved[key]):
            raise CheckpointError(f"{where}: the checkpoint's {key!r} is {saved[key]!r}, not like this optimizer's {value!r}")


def _is_number(value: Any) -> bool:
    # A rate may be a tensor, or NumPy's.
    is_scalar = value.numel() == 1 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
    return is_scalar and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def fitted_state(
    record: ParamRecord, saved: dict[str, Tensor] | None, current: dict[str, Tensor], context: UpdateContext
) -> dict[str, Tensor]:
    """Saved state on the parameter's device, in the current state's dtype, resized to the context' ranks.

    Raises:
        CheckpointError: an entry is missing or belongs to another shape.
    """
    plan, rule = record.plan, record.rule
    wanted = current.keys()
    saved = saved if isinstance(saved, dict) else {}
    # All of what is optional or none of it: a part alone is damage.
    optional = rule.optional_state if rule.optional_state.isdisjoint(saved) else frozenset()
    if missing := sorted(wanted - saved.keys() - optional):
        raise CheckpointError(f"parameter {plan.name!r}: the checkpoint lacks its state ({', '.join(missing)})")
    _check_tensors(plan.name, saved, {key: current[key].ndim for key in wanted})
    device = plan.parameter.device
    entries = {key: saved.get(key, torch.zeros_like(current[key])) for key in current if key != "step"}
    state = {key: value.detach().clone().to(device, current[key].dtype) for key, value in entries.items()}
    state = rule.resize(state, plan.shape, context)
    for key, value in state.items():
        # Ranks lie in the last axis, and may differ until the next update; everything before it may not.
        fixed = slice(None) if rule.is_elementwise else slice(-1)
        if value.ndim != current[key].ndim or value.shape[fixed] != current[key].shape[fixed]:
            shapes = f"{tuple(value.shape)}, needed is {tuple(current[key].shape)}"
            raise CheckpointError(f"parameter {plan.name!r} {tuple(plan.parameter.shape)}: its saved {key!r} has shape {shapes}")
    return {"step": saved["step"].detach().clone().cpu().long(), **state}


def _check_tensors(name: str, saved: dict[str, Any], axes: dict[str, int]) -> None:
    for key in axes.keys() & saved.keys():
        value = saved[key]
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            raise CheckpointError(f"parameter {name!r}: its saved {key!r} is {value!r}, no dense real tensor")
        if value.ndim != axes[key]:
            shape = tuple(value.shape)
            raise CheckpointError(f"parameter {name!r}: its saved {key!r} has shape {shape}, needed are {axes[key]} axes")
