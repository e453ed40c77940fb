"""State of sharded parameters in checkpoints: whole, so that any number of processes may go on with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..parameters import is_sharded, local
from ..slots import Slot


def whole_state(slot: Slot, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of all blocks of a parameter; collective where it is sharded.

    What has an entry per weight becomes a DTensor like the parameter. The rest, a few numbers per row and column, is gathered.
    """
    if slot.plan.layout.is_whole:
        return dict(state)
    return {key: _whole(slot, key, value) for key, value in state.items()}


def _whole(slot: Slot, key: str, value: Tensor) -> Tensor:
    plan, layout = slot.plan, slot.plan.layout
    if is_like_parameter(slot, key, value):
        from torch.distributed.tensor import DTensor

        like = plan.parameter
        form = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, **form)
    for axis, dim in _axes(slot, key, value):
        value = getattr(layout, axis).gathered(value, dim)
    return value


def saved_state(state_dict: dict[str, Any], slot: Slot) -> Any:
    """Of a checkpoint's state of a parameter what belongs to this process' block."""
    states = state_dict["state"]
    # torch.distributed.checkpoint goes by names.
    saved = states.get(slot.index, states.get(slot.plan.name))
    if not isinstance(saved, dict):
        return saved
    return {key: _here(slot, key, value) if isinstance(value, Tensor) else value for key, value in saved.items()}


def _here(slot: Slot, key: str, value: Tensor) -> Tensor:
    plan, layout = slot.plan, slot.plan.layout
    if is_sharded(value):
        is_alike = is_sharded(plan.parameter) and (value.device_mesh, value.placements) == (
            plan.parameter.device_mesh, plan.parameter.placements,
        )  # fmt: skip
        if is_alike and value.shape == plan.parameter.shape:
            return local(value)
        value = value.full_tensor()
    if layout.is_whole:
        return value
    if plan.view.pattern is None and value.shape == plan.parameter.shape and key not in slot.rule.spread:
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(value, plan.parameter.device_mesh, run_check=False)
        return local(whole.redistribute(placements=plan.parameter.placements))
    for axis, dim in _axes(slot, key, value):
        if value.shape[dim] == getattr(layout, axis).size(-1):
            value = getattr(layout, axis).part(value, dim)
    return value


def is_like_parameter(slot: Slot, key: str, value: Tensor) -> bool:
    """Whether a state entry has one number per weight of an elementwise rule."""
    plan = slot.plan
    is_elementwise = slot.rule.needs_dense and key not in slot.rule.spread
    return is_elementwise and plan.view.pattern is None and value.shape == plan.here.shape and value.ndim > 0


def part_of(slot: Slot, key: str, value: Tensor) -> tuple[int, ...]:
    """Which part of a state entry lies here: equal where several processes hold the same one."""
    layout = slot.plan.layout
    if is_like_parameter(slot, key, value):
        return (layout.number,)
    return tuple(getattr(layout, axis).first for axis, _ in _axes(slot, key, value))


def _axes(slot: Slot, key: str, value: Tensor) -> list[tuple[str, int]]:
    """Which axes of a state entry are spread, with the place of each."""
    if key == "spectrum":  # a batch shares one rank, so all of it is known everywhere
        return []
    axes = [("batch", 0)] if len(slot.plan.shape) > 2 and value.ndim else []
    if key in slot.rule.spread:
        axes.append((slot.rule.spread[key], -2))
    elif slot.rule.needs_dense and value.ndim == len(slot.plan.shape) > 1:
        axes += [("rows", -2), ("columns", -1)]
    return [(axis, dim) for axis, dim in axes if not getattr(slot.plan.layout, axis).is_whole]
