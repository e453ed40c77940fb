"""Whether a state_dict fits an optimizer, and its tensors brought into the optimizer's shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .rules import Settings
from .slots import Slot


def check_groups(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise a CheckpointError unless the saved groups hold the same parameters, kinds and rules as `groups`."""
    has_extra = {"seed", "ranks", "tracker"} <= state_dict.get("gradlr", {}).keys()
    if not ({"state", "param_groups"} <= state_dict.keys() and has_extra):
        raise CheckpointError("this is no state_dict of gradlr: it lacks one of 'state', 'param_groups', 'gradlr'")
    if state_dict["gradlr"].get("version") != 1:
        raise CheckpointError(f"the checkpoint has format {state_dict['gradlr'].get('version')!r}, this gradlr reads format 1")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        counts = f"{len(saved_groups)} groups, this optimizer {len(groups)}"
        raise CheckpointError(f"the checkpoint has {counts}: attach with the same groups=")
    for saved, group in zip(saved_groups, groups, strict=True):
        missing = sorted(group.keys() - saved.keys())
        if missing:
            raise CheckpointError(f"group {group['label']!r}: the checkpoint lacks its {missing[0]!r}")
        differing = set(saved["param_names"]) ^ set(group["param_names"])
        if differing or saved["param_names"] != group["param_names"]:
            example = sorted(differing)[0] if differing else saved["param_names"][0]
            tale = f"the checkpoint has other parameters or another order, {example!r} for one"
            raise CheckpointError(f"group {group['label']!r}: {tale}")
        for key in ("kind", "rule"):
            if saved[key] != group[key]:
                raise CheckpointError(f"group {group['label']!r}: saved with {key} {saved[key]!r}, attached with {group[key]!r}")
    if len(state_dict["gradlr"]["ranks"]) != sum(len(group["param_names"]) for group in groups):
        raise CheckpointError(f"the checkpoint holds {len(state_dict['gradlr']['ranks'])} ranks, not one per parameter")


def fitted_state(
    slot: Slot, saved: dict[str, Tensor] | None, current: dict[str, Tensor], settings: Settings
) -> dict[str, Tensor]:
    """Saved state on the parameter's device, in the current state's dtype, resized to the settings' ranks.

    Raises:
        CheckpointError: an entry is missing or belongs to another shape.
    """
    plan, rule = slot.plan, slot.rule
    wanted = current.keys() - {"spectrum"}
    if saved is None or not wanted <= saved.keys():
        missing = sorted(wanted - (saved or {}).keys())
        raise CheckpointError(f"parameter {plan.name!r}: the checkpoint lacks its state ({', '.join(missing)})")
    device = plan.parameter.device
    state = {key: saved[key].detach().clone().to(device, current[key].dtype) for key in wanted - {"step"}}
    state = rule.resize(state, plan.shape, settings)
    for key, value in state.items():
        # Ranks lie in the last axis, and may differ until the next update; everything before it may not.
        fixed = slice(None) if rule.needs_dense else slice(-1)
        if value.ndim != current[key].ndim or value.shape[fixed] != current[key].shape[fixed]:
            shapes = f"{tuple(value.shape)}, needed is {tuple(current[key].shape)}"
            raise CheckpointError(f"parameter {plan.name!r} {tuple(plan.parameter.shape)}: its saved {key!r} has shape {shapes}")
    spectrum = {"spectrum": saved["spectrum"].clone().to(device)} if "spectrum" in saved else {}
    return {"step": saved["step"].detach().clone().cpu(), **state, **spectrum}
