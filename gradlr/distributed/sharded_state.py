"""State of sharded parameters in checkpoints: whole, so that any number of processes may go on with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..engine.record import ParamRecord
from ..params.kinds import is_sharded, local


def whole_state(record: ParamRecord, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of all blocks of a parameter; collective where it is sharded.

    What has an entry per weight becomes a DTensor like the parameter. The rest, a few numbers per row and column, is gathered.
    """
    if record.plan.layout.is_whole:
        return dict(state)
    return {key: _whole(record, key, value) for key, value in state.items()}


def _whole(record: ParamRecord, key: str, value: Tensor) -> Tensor:
    plan, layout = record.plan, record.plan.layout
    if is_like_parameter(record, key, value):
        from torch.distributed.tensor import DTensor

        like = plan.parameter
        form = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, **form)
    for axis, dim in _axes(record, key, value):
        value = getattr(layout, axis).all_gather(value, dim)
    return value


def saved_state(state_dict: dict[str, Any], record: ParamRecord) -> Any:
    """Of a checkpoint's state of a parameter what belongs to this process' block."""
    states = state_dict["state"]
    # torch.distributed.checkpoint goes by names.
    saved = states.get(record.index, states.get(record.plan.name))
    if not isinstance(saved, dict):
        return saved
    return {key: _here(record, key, value) if isinstance(value, Tensor) else value for key, value in saved.items()}


def _here(record: ParamRecord, key: str, value: Tensor) -> Tensor:
    plan, layout = record.plan, record.plan.layout
    if is_sharded(value):
        is_alike = is_sharded(plan.parameter) and (value.device_mesh, value.placements) == (
            plan.parameter.device_mesh, plan.parameter.placements,
        )  # fmt: skip
        if is_alike and value.shape == plan.parameter.shape:
            return local(value)
        value = value.full_tensor()
    if layout.is_whole:
        return value
    if plan.view.pattern is None and value.shape == plan.parameter.shape and key not in record.rule.state_sharding:
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(value, plan.parameter.device_mesh, run_check=False)
        return local(whole.redistribute(placements=plan.parameter.placements))
    for axis, dim in _axes(record, key, value):
        if value.shape[dim] == getattr(layout, axis).size(-1):
            value = getattr(layout, axis).local_shard(value, dim)
    return value


def is_like_parameter(record: ParamRecord, key: str, value: Tensor) -> bool:
    """Whether a state entry has one number per weight of an elementwise rule."""
    plan = record.plan
    is_elementwise = record.rule.is_elementwise and key not in record.rule.state_sharding
    return is_elementwise and plan.view.pattern is None and value.shape == plan.here.shape and value.ndim > 0


def part_of(record: ParamRecord, key: str, value: Tensor) -> tuple[int, ...]:
    """Which part of a state entry lies here: equal where several processes hold the same one."""
    layout = record.plan.layout
    if is_like_parameter(record, key, value):
        return (layout.number,)
    return tuple(getattr(layout, axis).first for axis, _ in _axes(record, key, value))


def _axes(record: ParamRecord, key: str, value: Tensor) -> list[tuple[str, int]]:
    """Which axes of a state entry are spread, with the place of each."""
    axes = [("batch", 0)] if len(record.plan.shape) > 2 and value.ndim else []
    if key in record.rule.state_sharding:
        axes.append((record.rule.state_sharding[key], -2))
    elif record.rule.is_elementwise and value.ndim == len(record.plan.shape) > 1:
        axes += [("rows", -2), ("columns", -1)]
    return [(axis, dim) for axis, dim in axes if not getattr(record.plan.layout, axis).is_whole]
