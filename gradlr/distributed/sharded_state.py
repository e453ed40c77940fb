"""State of sharded parameters in checkpoints: whole, so that any number of processes may go on with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..engine.record import ParamRecord
from ..linalg import Axis
from ..tensors import is_sharded, local


def full_state(record: ParamRecord, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of all shards of a parameter; collective where it is sharded.

    What has an entry per weight becomes a DTensor like the parameter. The rest, a few numbers per row and column, is gathered.
    """
    if record.plan.layout.is_whole:
        return dict(state)
    return {key: _full(record, key, value) for key, value in state.items()}


def _full(record: ParamRecord, key: str, value: Tensor) -> Tensor:
    if _is_like_parameter(record, key, value):
        from torch.distributed.tensor import DTensor

        like: Any = record.plan.parameter
        form = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, **form)
    for axis, dim in _sharded_axes(record, key, value):
        value = axis.all_gather(value, dim)
    return value


def local_state(record: ParamRecord, saved: dict[str, Any]) -> Any:
    """Of a checkpoint's state of a parameter what belongs to this process' shard."""
    states = saved["state"]
    # torch.distributed.checkpoint goes by names.
    entries = states.get(record.index, states.get(record.plan.name))
    if not isinstance(entries, dict):
        return entries
    return {key: _local(record, key, value) if isinstance(value, Tensor) else value for key, value in entries.items()}


def _local(record: ParamRecord, key: str, value: Any) -> Tensor:
    plan = record.plan
    parameter: Any = plan.parameter
    if is_sharded(value):
        is_alike = (
            is_sharded(parameter) and value.device_mesh == parameter.device_mesh and value.placements == parameter.placements
        )
        if is_alike and value.shape == parameter.shape:
            return local(value)
        value = value.full_tensor()
    if plan.layout.is_whole:
        return value
    if plan.view.pattern is None and value.shape == parameter.shape and key not in record.rule.state_sharding:
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(value, parameter.device_mesh, run_check=False)
        return local(whole.redistribute(placements=parameter.placements))
    for axis, dim in _sharded_axes(record, key, value):
        if value.shape[dim] == axis.size(-1):
            value = axis.local_shard(value, dim)
    return value


def shard_of(record: ParamRecord, key: str, value: Tensor) -> tuple[int, ...]:
    """Which part of a state entry lies here: equal where several processes hold the same one."""
    if _is_like_parameter(record, key, value):
        return (record.plan.layout.number,)
    return tuple(axis.first for axis, _ in _sharded_axes(record, key, value))


def _is_like_parameter(record: ParamRecord, key: str, value: Tensor) -> bool:
    """Whether a state entry has one number per weight of an elementwise rule."""
    is_elementwise = record.rule.is_elementwise and key not in record.rule.state_sharding
    is_shaped_so = record.plan.view.pattern is None and value.shape == record.plan.here.shape
    return is_elementwise and is_shaped_so and value.ndim > 0


def _sharded_axes(record: ParamRecord, key: str, value: Tensor) -> list[tuple[Axis, int]]:
    """Which axes of the parameter's layout a state entry lies along, where these are sharded, with the place of each."""
    layout, ndim, rule = record.plan.layout, len(record.plan.shape), record.rule
    axes = [(layout.batch, 0)] if ndim > 2 and value.ndim else []
    if key in rule.state_sharding:
        axes.append(({"rows": layout.rows, "columns": layout.columns}[rule.state_sharding[key]], -2))
    elif rule.is_elementwise and value.ndim == ndim > 1:
        axes += [(layout.rows, -2), (layout.columns, -1)]
    return [(axis, dim) for axis, dim in axes if not axis.is_whole]
