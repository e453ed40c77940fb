"""The processes that each hold a part of a sharded model: FSDP2, tensor parallel, or both. What they tell each other."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from ..engine.record import ParamRecord
from ..errors import AttachError, ParallelError
from ..params.kinds import ParameterPlan, is_sharded
from .communicator import Communicator, ranks_named
from .layout import with_layout
from .replicated import FAILED, checksum


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
        parameters: Of the model, frozen ones included; some of them sharded, over one mesh or parts of it.

    Attributes:
        comm: All processes of the mesh.

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
        self.comm = Communicator(_group_of(mesh))
        self._blocks: dict[str, list[int]] = {}

    def spread(self, plan: ParameterPlan) -> ParameterPlan:
        """The plan with the layout of its matrix."""
        return with_layout(plan, self.comm.all_reduce)

    def join(self, records: Sequence[ParamRecord]) -> None:
        """Learn which blocks each process holds.

        Raises:
            ParallelError: a process is missing.
        """
        told = self.comm.all_gather_object({record.plan.name: record.plan.layout.number for record in records})
        self._blocks = {record.plan.name: [one[record.plan.name] for one in told] for record in records}

    def copies(self, record: ParamRecord) -> float:
        """Number of processes that hold the same block."""
        return self.comm.size / record.plan.layout.parts

    def sync_loss(self, records: Sequence[ParamRecord], loss: float | None, rates: Sequence[float]) -> Heard:
        """Tell the others the loss and, in turn, the checksum of one parameter's block and its learning rate.

        Args:
            records: All parameters, in the same order everywhere.
            loss: The last one that was read; None where there is none yet.
            rates: Learning rate of each group.

        Raises:
            ParallelError: a process is missing, those that hold the same block have different weights, or rates differ.
        """
        self.comm.begin_collective()
        watched = records[self.comm.meetings % len(records)]
        sum_of_bits, rate = float(checksum(watched.plan.here)), rates[watched.group_index]
        told = self._told([0.0 if loss is None else 1.0, loss or 0.0, sum_of_bits, rate], watched.plan.here.device)
        self._require_alike(watched, [int(one[2]) for one in told])
        if others := [rank for rank, one in enumerate(told) if one[3] != told[0][3]]:
            raise ParallelError(
                f"{watched.plan.name!r} has learning rate {told[others[0]][3]:g} on {ranks_named(others)} and {told[0][3]:g} on "
                "rank 0: step schedulers alike everywhere (ReduceLROnPlateau by the mean of all losses)"
            )
        finite = [one[1] for one in told if one[0] and math.isfinite(one[1])]
        not_finite = [rank for rank, one in enumerate(told) if one[0] and not math.isfinite(one[1])]
        return Heard(sum(finite) / len(finite) if finite else None, not_finite)

    def meet_at_step(
        self, energy: Tensor | None, status: int, waiting: Sequence[int], device: torch.device
    ) -> tuple[float, list[int]]:
        """Squared norm of all gradients, from this process' share of it, and each process' status.

        Args:
            energy: That share, 0-dim; None where nothing waits.
            status: `FINE`, `NOT_FINITE` or `FAILED`.
            waiting: Numbers of the parameters whose gradients wait here.
            device: Of the parameters.

        Raises:
            ParallelError: a process is missing, or has gradients of other parameters.
        """
        share = 0.0 if energy is None else float(energy)
        which = zlib.crc32(repr(list(waiting)).encode())
        told = self._told([share, float(status), float(which), float(len(waiting))], device)
        statuses = [int(one[1]) for one in told]
        if FAILED not in statuses and (others := [rank for rank, one in enumerate(told) if one[2] != told[0][2]]):
            raise ParallelError(
                f"gradients of {told[others[0]][3]:.0f} parameters wait on {ranks_named(others)}, of {told[0][3]:.0f} on rank 0, "
                "or other ones: run the same forward and backward everywhere, and call opt.zero_grad() on all ranks or on none. "
                "Nothing was changed"
            )
        return sum(one[0] for one in told), statuses

    def all_true(self, flag: Tensor) -> Tensor:
        """Whether a flag, a 0-dim boolean, is True in all processes; on its device."""
        count = flag.to(torch.float32)
        self.comm.all_reduce(count, distributed.ReduceOp.MIN)
        return count > 0

    def _told(self, own: list[float], device: torch.device) -> list[list[float]]:
        numbers = torch.zeros((self.comm.size, len(own)), dtype=torch.float64)
        # NaN in a sum would be everybody's: bits travel as they are, since all others give zeros.
        numbers[self.comm.rank] = torch.tensor(own, dtype=torch.float64)
        bits = numbers.view(torch.int64).to(device)
        self.comm.all_reduce(bits)
        return bits.cpu().view(torch.float64).tolist()

    def _require_alike(self, record: ParamRecord, sums: list[int]) -> None:
        numbers = self._blocks[record.plan.name]
        first = {number: numbers.index(number) for number in set(numbers)}
        drifted = [rank for rank, number in enumerate(numbers) if sums[rank] != sums[first[number]]]
        if drifted:
            source = first[numbers[drifted[0]]]
            raise ParallelError(
                f"{record.plan.name!r} has other weights on {ranks_named(drifted)} than on rank {source}, which has the same "
                "part: they have drifted apart. Load the same checkpoint everywhere, give ranks of one tensor-parallel group "
                "the same batches and random numbers, and run them on the same hardware"
            )


def _group_of(mesh: Any) -> distributed.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return distributed.group.WORLD
    try:
        return mesh._flatten().get_group()
    except RuntimeError as error:
        raise AttachError(
            f"the device mesh {mesh} holds some of the processes, in several axes: give it mesh_dim_names, so that one group of "
            f"them can be made ({error})"
        ) from error
