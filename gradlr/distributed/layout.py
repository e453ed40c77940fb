"""Where the entries of a sharded parameter lie, and how its matrix is spread over the processes of its device mesh."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..errors import AttachError, warn
from ..layers import View
from ..linalg import REPLICATED, Axis, Layout
from ..params.kinds import KINDS, ParameterPlan
from ..tensors import is_sharded
from .communicator import living

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed.tensor import DTensor

AllReduce = Callable[[Tensor, Any, distributed.ProcessGroup], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedAxis(Axis):
    """An axis of which each process of some groups holds a part.

    Args:
        count: Size of the whole axis.
        places: Which of it lie here, (count here,), int64.
        groups: Summed over one after the other; weak references.
        parts: Number of processes that the axis is divided among.
        all_reduce: How: it gets the numbers, the operation and the group.
    """

    count: int
    places: Tensor
    groups: tuple[weakref.ref[distributed.ProcessGroup], ...]
    parts: int
    all_reduce: AllReduce

    is_whole = False

    @property
    def first(self) -> int:
        return int(self.places[0]) if len(self.places) else 0

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, distributed.ReduceOp.SUM)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduced(x, distributed.ReduceOp.MAX)

    def size(self, here: int) -> int:
        return self.count

    def local_shard(self, whole: Tensor, dim: int) -> Tensor:
        return whole.index_select(dim, self.places.to(whole.device))

    def all_gather(self, here: Tensor, dim: int) -> Tensor:
        shape = [self.count if index == dim % here.ndim else size for index, size in enumerate(here.shape)]
        return self.all_reduce_sum(here.new_zeros(shape).index_copy_(dim, self.places.to(here.device), here))

    def _reduced(self, x: Tensor, op: Any) -> Tensor:
        x = x.contiguous()
        for group in self.groups:
            self.all_reduce(x, op, living(group))
        return x


def with_layout(plan: ParameterPlan, all_reduce: AllReduce) -> ParameterPlan:
    """The plan of a sharded parameter with the layout of its matrix; that of an ordinary one as it is.

    Raises:
        AttachError: the shards cut through what the user's view takes apart, or lie in an order that is not known.

    Warns:
        GradlrWarning: they cut through what the layer's own view takes apart: it is taken as one matrix then.
    """
    parameter: Any = plan.parameter
    if not is_sharded(parameter):
        return plan
    places = _places(plan.name, parameter)
    before, _, _ = plan.view.named_axes(parameter.shape)
    if cut := [dim for dim in places if len(before[dim]) > 1]:
        plan = _without_view(plan, cut[0])
    axes = [_axis(plan, axis, places, all_reduce) for axis in range(len(plan.shape))]
    if KINDS[plan.kind].is_vector:  # entry by entry: the order of the axes says nothing
        axes = [REPLICATED, REPLICATED, *sorted(axes, key=lambda axis: axis.is_whole, reverse=True)]
    batch = axes[-3] if len(axes) > 2 else REPLICATED
    return replace(plan, layout=Layout(axes[-2], axes[-1], batch, _number(parameter)))


def _number(parameter: DTensor) -> int:
    mesh, number = parameter.device_mesh, 0
    coordinate: Any = mesh.get_coordinate()
    for index, placement in enumerate(parameter.placements):
        if _sharded_axis(placement, parameter.ndim) is not None:
            number = number * mesh.size(index) + coordinate[index]
    return number


def _without_view(plan: ParameterPlan, dim: int) -> ParameterPlan:
    where = f"parameter {plan.name!r} {tuple(plan.parameter.shape)}: its axis {dim} is sharded"
    if plan.view != plan.natural or plan.parameter.ndim != 2:
        raise AttachError(
            f"{where}, and the view {plan.view.pattern!r} takes that axis apart: the shards cut through its parts. Shard another "
            "axis (shard_placement_fn of fully_shard), or leave the view out"
        )
    message = f"{where} across what {plan.view.pattern!r} would take apart: it is taken as one matrix"
    warn(message)
    return replace(plan, view=View())


def _axis(plan: ParameterPlan, axis: int, places: dict[int, Tensor], all_reduce: AllReduce) -> Axis:
    """One axis of the plan's view, from where the parameter's own axes lie."""
    parameter: Any = plan.parameter
    before, after, sizes = plan.view.named_axes(parameter.shape)
    # A sharded axis of the parameter is one name.
    sharded = {before[dim][0]: dim for dim in places if before[dim][0] in after[axis]}
    if not sharded:
        return REPLICATED
    numbers = torch.arange(plan.shape[axis]).reshape([sizes[name] for name in after[axis]])
    for name, dim in sharded.items():
        numbers = numbers.index_select(after[axis].index(name), places[dim])
    mesh, ndim = parameter.device_mesh, parameter.ndim
    along = [index for index, placement in enumerate(parameter.placements) if _sharded_axis(placement, ndim) in sharded.values()]
    groups = tuple(weakref.ref(mesh.get_group(index)) for index in along)
    parts = math.prod(mesh.size(index) for index in along)
    return SharedAxis(count=plan.shape[axis], places=numbers.reshape(-1), groups=groups, parts=parts, all_reduce=all_reduce)


def _sharded_axis(placement: Any, ndim: int) -> int | None:
    dim = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim


def _places(name: str, parameter: DTensor) -> dict[int, Tensor]:
    """Sharded axis of the parameter → which of its entries lie here, in their order."""
    mesh, shape, local = parameter.device_mesh, parameter.shape, parameter.to_local().shape
    coordinate: Any = mesh.get_coordinate()
    places: dict[int, Tensor] = {}
    for index, placement in enumerate(parameter.placements):
        dim = _sharded_axis(placement, len(shape))
        if dim is not None:
            _require_in_order(mesh, index)
            known = places.get(dim, torch.arange(shape[dim]))
            # FSDP over tensor parallelism: each tensor-parallel shard, which comes later in the mesh, is divided again.
            strides = getattr(placement, "split_factor", 1)
            pieces = [_chunk(piece, mesh.size(index), coordinate[index]) for piece in known.chunk(strides)]
            places[dim] = torch.cat(pieces)
        elif placement.is_partial():
            raise AttachError(f"parameter {name!r} holds partial sums ({placement}): redistribute it before attaching")
    if any(len(places[dim]) != local[dim] for dim in places):
        raise AttachError(
            f"parameter {name!r} {tuple(shape)} with placements {parameter.placements} holds {tuple(local)} here, which gradlr "
            "does not know how to place. Choose sizes that the mesh divides"
        )
    return places


def _require_in_order(mesh: Any, index: int) -> None:
    # Torch deals out shards by the rank in the group, and describes them by the place in the mesh.
    if mesh.get_group(index).rank() != mesh.get_coordinate()[index]:
        order = mesh.mesh.tolist()
        raise AttachError(f"the ranks of the device mesh {order} do not ascend, so nobody knows who has which part: sort them")


def _chunk(whole: Tensor, count: int, index: int) -> Tensor:
    # As `whole.chunk(count)[index]`, which makes all of them.
    size = -(-len(whole) // count)
    return whole[index * size : (index + 1) * size]
