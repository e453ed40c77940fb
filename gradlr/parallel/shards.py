"""The processes that each hold a part of a sharded model: FSDP2, tensor parallel, or both. What they tell each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import AttachError, ParallelError
from ..parameters import ParameterPlan, is_sharded
from ..slots import Slot
from .exchange import checksum
from .layout import with_layout
from .replicas import Replicas, ranks_named


@dataclass(frozen=True)
class Heard:
    """What all processes know after each has shown a loss.

    Attributes:
        loss: Mean of the finite ones; None where there is none.
        not_finite: Ranks whose loss was NaN or infinite.
    """

    loss: float | None
    not_finite: list[int]


class Shards:
    """The processes of a device mesh.

    Args:
        parameters: Trainable parameters of the model, some of them sharded, over one mesh or parts of it.

    Attributes:
        everyone: All processes of the mesh.

    Raises:
        AttachError: a parameter lies on a mesh that is no part of the others'.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # Mostly one, of all parameters.
        meshes = {id(one.device_mesh): one.device_mesh for one in parameters if is_sharded(one)}.values()
        mesh = max(meshes, key=lambda mesh: mesh.size())
        members = set(mesh.mesh.flatten().tolist())
        if any(not members.issuperset(other.mesh.flatten().tolist()) for other in meshes):
            raise AttachError("the parameters lie on device meshes of different processes; gradlr needs one and parts of it")
        self.everyone = Replicas(_group_of(mesh))
        self._blocks: dict[str, list[int]] = {}

    def spread(self, plan: ParameterPlan) -> ParameterPlan:
        """The plan with the layout of its matrix."""
        return with_layout(plan, self.everyone.all_reduce)

    def join(self, slots: Sequence[Slot]) -> None:
        """Learn which blocks each process holds.

        Raises:
            ParallelError: a process is missing.
        """
        told = self.everyone.gathered({slot.plan.name: slot.plan.layout.number for slot in slots})
        self._blocks = {slot.plan.name: [one[slot.plan.name] for one in told] for slot in slots}

    def copies(self, slot: Slot) -> float:
        """Number of processes that hold the same block."""
        return self.everyone.size / slot.plan.layout.parts

    def hear(self, slots: Sequence[Slot], loss: float | None) -> Heard:
        """Tell the others the loss and, in turn, the checksum of one parameter's block.

        Args:
            slots: All parameters, in the same order everywhere.
            loss: The last one that was read; None where there is none yet.

        Raises:
            ParallelError: a process is missing, or those that hold the same block have different weights.
        """
        self.everyone.meet()
        watched = slots[self.everyone.meetings % len(slots)]
        own = [0.0 if loss is None else 1.0, loss or 0.0, float(checksum(watched.plan.here))]
        told = self._told(own, watched.plan.here.device)
        self._require_alike(watched, [int(one[2]) for one in told])
        finite = [value for is_there, value, _ in told if is_there and math.isfinite(value)]
        not_finite = [rank for rank, (is_there, value, _) in enumerate(told) if is_there and not math.isfinite(value)]
        return Heard(sum(finite) / len(finite) if finite else None, not_finite)

    def meet_at_step(self, energy: Tensor | None, status: int, device: torch.device) -> tuple[float, list[int]]:
        """Squared norm of all gradients, from this process' share of it, and each process' status.

        Raises:
            ParallelError: a process is missing.
        """
        share = 0.0 if energy is None else float(energy)
        told = self._told([share if math.isfinite(share) else 0.0, float(status)], device)
        return sum(share for share, _ in told), [int(status) for _, status in told]

    def agreed(self, flag: Tensor) -> Tensor:
        """Whether a flag, a 0-dim boolean, is True in all processes; on its device."""
        count = flag.to(torch.float32)
        self.everyone.all_reduce(count, distributed.ReduceOp.MIN)
        return count > 0

    def _told(self, own: list[float], device: torch.device) -> list[list[float]]:
        numbers = torch.zeros((self.everyone.size, len(own)), dtype=torch.float64)
        # NaN in a sum would be everybody's: bits travel as they are, since all others give zeros.
        numbers[self.everyone.rank] = torch.tensor(own, dtype=torch.float64)
        bits = numbers.view(torch.int64).to(device)
        self.everyone.all_reduce(bits)
        return bits.cpu().view(torch.float64).tolist()

    def _require_alike(self, slot: Slot, sums: list[int]) -> None:
        numbers = self._blocks[slot.plan.name]
        first = {number: numbers.index(number) for number in set(numbers)}
        drifted = [rank for rank, number in enumerate(numbers) if sums[rank] != sums[first[number]]]
        if drifted:
            source = first[numbers[drifted[0]]]
            raise ParallelError(
                f"{slot.plan.name!r} has other weights on {ranks_named(drifted)} than on rank {source}, which has the same part: "
                "they have drifted apart. Load the same checkpoint everywhere, give ranks of one tensor-parallel group the same "
                "batches and random numbers, and run them on the same hardware"
            )


def _group_of(mesh: Any) -> distributed.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return distributed.group.WORLD
    return mesh._flatten().get_group()
