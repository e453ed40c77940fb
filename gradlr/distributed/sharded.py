"""Shards: the processes that each hold a part of the model, under FSDP2, tensor parallelism, or both."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..engine.pending import Pending
from ..engine.record import ParamRecord
from ..engine.skipped_steps import SkippedSteps
from ..engine.state_store import StateStore
from ..engine.sync import Sync, SyncResult, apply_sync_result, not_finite_message, step_status
from ..errors import AttachError, ParallelError
from ..gradient import GradientOperator
from ..params.kinds import ParameterPlan
from ..tensors import is_sharded
from ..tracker import LossTracker
from .communicator import Communicator, ranks_named
from .fingerprint import checksum, fingerprint, state_fingerprint
from .layout import with_layout
from .replicated import ranks_with_trouble
from .sharded_state import full_state, local_state, shard_of


class Sharded(Sync):
    """The other processes of a device mesh.

    Args:
        parameters: Of the model, frozen ones included; some of them sharded, over one mesh or parts of it.

    Raises:
        AttachError: a parameter lies on a mesh that is no part of the others'.
    """

    tells_mean = True
    may_be_silent = True
    norm_in_groups = False
    hooks_only = True

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # Mostly one, of all parameters.
        meshes = {id(mesh): mesh for one in parameters if is_sharded(one) for mesh in [one.device_mesh]}.values()  # type: ignore[attr-defined]
        mesh = max(meshes, key=lambda mesh: mesh.size())
        members = set(mesh.mesh.flatten().tolist())
        if any(not members.issuperset(other.mesh.flatten().tolist()) for other in meshes):
            raise AttachError("the parameters lie on device meshes of different processes; gradlr needs one and parts of it")
        self.comm: Communicator = Communicator(_group_of(mesh))
        self._device = torch.device(mesh.device_type)
        self._shards: dict[str, list[int]] = {}

    def spread(self, plan: ParameterPlan) -> ParameterPlan:
        """The plan with the layout of its matrix."""
        return with_layout(plan, self.comm.all_reduce)

    def join(self, model: nn.Module, store: StateStore, options: Mapping[str, Any]) -> None:
        self.comm.assert_same_on_all_ranks(fingerprint(store, options))
        told = self.comm.all_gather_object({record.plan.name: record.plan.layout.number for record in store.records})
        self._shards = {record.plan.name: [one[record.plan.name] for one in told] for record in store.records}

    def on_loss(self, tracker: LossTracker, store: StateStore) -> str | None:
        """Let the ranks follow the mean loss of all processes, and see that they still train the same.

        Each tells the loss (at hand, or the one before, where that is still on its way) and, in turn, the checksum of one
        parameter's shard and its learning rate.

        Raises:
            ParallelError: a process is missing, those that hold the same shard have different weights, or rates differ.
        """
        self.comm.begin_collective()
        watched, loss = store.records[self.comm.meetings % len(store.records)], tracker.value
        own = [0.0 if loss is None else 1.0, loss or 0.0, float(checksum(watched.plan.here)), float(store.group(watched)["lr"])]
        told = self._gather(own, watched.plan.here.device)
        self._require_alike(watched, [int(one[2]) for one in told])
        if others := [rank for rank, one in enumerate(told) if one[3] != told[0][3]]:
            raise ParallelError(
                f"{watched.plan.name!r} has learning rate {told[others[0]][3]:g} on {ranks_named(others)} and {told[0][3]:g} on "
                "rank 0: step schedulers alike everywhere (ReduceLROnPlateau by the mean of all losses)"
            )
        if finite := [one[1] for one in told if one[0] and math.isfinite(one[1])]:
            tracker.record_mean(sum(finite) / len(finite))
        not_finite = [rank for rank, one in enumerate(told) if one[0] and not math.isfinite(one[1])]
        if not (not_finite and tracker.is_current):
            return None
        return not_finite_message(not_finite, self.comm.rank, f"the loss is {tracker.value}")

    def energy(self, record: ParamRecord, energy: Tensor | None, held: GradientOperator) -> Tensor:
        # Several processes may hold the same shard: each counts its share.
        copies = self.comm.size / record.plan.layout.parts
        return super().energy(record, energy, held) / copies

    def exchange(
        self, pending: Pending, losses: Sequence[float], skipped: SkippedSteps, *, has_failed: bool = False
    ) -> SyncResult:
        """Learn the norm of all gradients, and whether a part of one is not finite.

        Raises:
            ParallelError: a process is missing or has failed, or has gradients of other parameters.
        """
        status, own_reason = step_status(skipped, has_failed=has_failed)
        waiting, proxy = [record.index for record in pending.records()], pending.norm_proxy
        share = 0.0 if proxy.energy is None else float(proxy.energy)
        which = float(zlib.crc32(repr(waiting).encode()))
        told = self._gather([share, float(status), which, float(len(waiting))], proxy.parameter.device)
        result = SyncResult(None, *ranks_with_trouble([one[1] for one in told]))
        others = [rank for rank, one in enumerate(told) if one[2] != told[0][2]]
        if others and not result.failed:
            raise ParallelError(
                f"gradients of {told[others[0]][3]:.0f} parameters wait on {ranks_named(others)}, of {told[0][3]:.0f} on rank 0, "
                "or other ones: run the same forward and backward everywhere, and call opt.zero_grad() on all ranks or on none. "
                "Nothing was changed"
            )
        apply_sync_result(result, skipped, self.comm.rank, own_reason)
        proxy.become(sum(one[0] for one in told))
        return result

    def all_finite(self, skipped: SkippedSteps) -> Tensor | None:
        """All shards of an update are written, or none: what overflowed in one process is nowhere written."""
        verdict = skipped.verdict()
        flag = torch.tensor(float(skipped.reason is None), device=self._device) if verdict is None else verdict.float()
        self.comm.all_reduce(flag, distributed.ReduceOp.MIN)
        if verdict is not None:
            return flag > 0
        if not flag and skipped.reason is None:
            skipped.reason = "an update was not finite in the part of another rank"
        return None

    def full_state(self, record: ParamRecord, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return full_state(record, state)

    def local_state(self, record: ParamRecord, saved: dict[str, Any]) -> Any:
        return local_state(record, saved)

    def shard_of(self, record: ParamRecord, key: str, value: Tensor) -> tuple[int, ...]:
        return shard_of(record, key, value)

    def assert_same_state(self, store: StateStore, options: Mapping[str, Any]) -> None:
        self.comm.assert_same_on_all_ranks(state_fingerprint(store, options))

    def _gather(self, own: list[float], device: torch.device) -> list[list[float]]:
        """The numbers of every process, in the order of their ranks."""
        numbers = torch.zeros((self.comm.size, len(own)), dtype=torch.float64)
        # NaN in a sum would be everybody's: bits travel as they are, since all others give zeros.
        numbers[self.comm.rank] = torch.tensor(own, dtype=torch.float64)
        bits = numbers.view(torch.int64).to(device)
        self.comm.all_reduce(bits)
        return bits.cpu().view(torch.float64).tolist()

    def _require_alike(self, record: ParamRecord, sums: list[int]) -> None:
        numbers = self._shards[record.plan.name]
        first = {number: numbers.index(number) for number in set(numbers)}
        drifted = [rank for rank, number in enumerate(numbers) if sums[rank] != sums[first[number]]]
        if drifted:
            source = first[numbers[drifted[0]]]
            raise ParallelError(
                f"{record.plan.name!r} has other weights on {ranks_named(drifted)} than on rank {source}, which has the same "
                "part: they have drifted apart. Load the same checkpoint everywhere, give ranks of one tensor-parallel group the "
                "same batches and random numbers, and run them on the same hardware"
            )


def _group_of(mesh: Any) -> distributed.ProcessGroup | None:
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
