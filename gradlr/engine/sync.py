"""Who else trains the model: one interface for a process alone, for replicas, and for processes that each hold a shard.

`Alone` is here; `gradlr.distributed` has `Replicated` and `Sharded`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import ParallelError
from ..gradient import GradientOperator
from ..tracker import LossTracker
from .pending import Pending
from .record import ParamRecord
from .skipped_steps import SkippedSteps
from .state_store import StateStore


class StepStatus(IntEnum):
    """How a process comes to a step: with sound gradients (or none), with NaN or infinity, or with an error."""

    OK = 0
    NOT_FINITE = 1
    FAILED = 2


@dataclass(frozen=True)
class SyncResult:
    """What all processes know of each other after an exchange.

    Attributes:
        loss: Mean over the processes that have shown a finite loss since the last step; None where none has, or none was told.
        not_finite: Ranks that had NaN or infinity.
        failed: Ranks that came with an error.
    """

    loss: float | None = None
    not_finite: Sequence[int] = field(default=())
    failed: Sequence[int] = field(default=())


class Comm(Protocol):
    """What several processes that train one model say to each other outside of a step."""

    size: int
    rank: int

    @property
    def group(self) -> Any: ...

    def assert_same_on_all_ranks(self, told: dict[str, str]) -> None: ...

    def tell_failure(self, error: BaseException) -> None: ...


class OneProcess:
    """The communicator of a process that trains alone: there is nobody to talk to."""

    size, rank, group = 1, 0, None

    def assert_same_on_all_ranks(self, told: dict[str, str]) -> None:
        """One process is always of one mind."""

    def tell_failure(self, error: BaseException) -> None:
        """There is nobody who waits."""


class Sync:
    """What the engine asks about the other processes. As it stands: there are none, and this one trains alone.

    Attributes:
        comm: Talks to them.
        tells_mean: Whether the tracker's ratio follows the mean loss of all processes, which this object tells it.
        ranks_follow: When ranks change: "loss", as one is shown, or "step", from what all processes know after it.
        shares_bases: Whether replicas sketch in the same bases, and know no norm before they have exchanged the sketches.
        has_begun: Whether the step under way needs no `begin`, or no longer.
        may_be_silent: Whether a backward may bring no gradient, as under FSDP2 with `set_requires_gradient_sync(False)`.
        norm_in_groups: Whether the parameter that shows the global norm is one of `param_groups` while gradients wait: what is
            done to it there counts for all of them, and not for one shard.
        hooks_only: Whether no layer can hand over its gradient unformed.
    """

    comm: Comm = OneProcess()
    tells_mean = False
    ranks_follow = "loss"
    shares_bases = False
    has_begun = True
    may_be_silent = False
    norm_in_groups = True
    hooks_only = False

    def join(self, model: nn.Module, store: StateStore, options: Mapping[str, Any]) -> None:
        """See that all processes train the same; the engine is complete."""

    def on_loss(self, tracker: LossTracker, store: StateStore) -> str | None:
        """A loss was shown: why everything that its backward brings is to be left out; None where nothing speaks against it."""
        value = tracker.value
        if value is None or math.isfinite(value) or not tracker.is_current:
            return None
        return f"loss number {tracker.count} is {value}"

    def begin(self, tracker: LossTracker, pending: Pending) -> None:
        """The first gradient of a step has come."""

    def hold(self, record: ParamRecord, gradient: GradientOperator, pending: Pending) -> GradientOperator:
        """The form in which a step's first gradient of a parameter waits; further ones are added with `add_`."""
        return pending.sketched(record, gradient)

    def energy(self, record: ParamRecord, energy: Tensor | None, held: GradientOperator) -> Tensor:
        """What the waiting gradient adds to the squared norm shown here, 0-dim float64; `energy` where it is known already."""
        return held.squared_norm() if energy is None else energy

    def check(self, pending: Pending) -> None:
        """Raise where something was done to what waits that each process would do to its own part of it."""

    def exchange(
        self, pending: Pending, losses: Sequence[float], skipped: SkippedSteps, *, has_failed: bool = False
    ) -> SyncResult:
        """A step begins: tell the others, and put the mean in the place of what waits here, where replicas train.

        Where another process had NaN or infinity, `skipped` has the reason afterwards.

        Raises:
            ParallelError: another process came with an error, or is missing.
        """
        return SyncResult()

    def all_finite(self, skipped: SkippedSteps) -> Tensor | None:
        """Whether every process may write its updates: a 0-dim flag on the device; None where the host knows."""
        return skipped.verdict()

    def full_state(self, record: ParamRecord, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of all shards of a parameter, for a checkpoint; collective where it is sharded."""
        return dict(state)

    def local_state(self, record: ParamRecord, saved: dict[str, Any]) -> Any:
        """Of a checkpoint's state of a parameter what belongs here."""
        return saved_entries(record, saved)

    def shard_of(self, record: ParamRecord, key: str, value: Tensor) -> tuple[int, ...]:
        """Which part of a state entry lies here: equal where several processes hold the same one."""
        return ()

    def assert_same_state(self, store: StateStore, options: Mapping[str, Any]) -> None:
        """See that all processes have loaded the same checkpoint."""


class Alone(Sync):
    """One process trains the model."""


def saved_entries(record: ParamRecord, saved: dict[str, Any]) -> Any:
    """A parameter's entries in a checkpoint, of whole tensors.

    `torch.distributed.checkpoint` goes by names, and what a sharded model has saved comes as DTensors.
    """
    entries = saved["state"].get(record.index, saved["state"].get(record.plan.name))
    if not isinstance(entries, dict):
        return entries
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in entries.items()}


def not_finite_message(ranks: Sequence[int], own_rank: int, own_reason: str) -> str:
    """Why a step is left out by all processes."""
    own = f". Here, on rank {own_rank}: {own_reason}" if own_rank in ranks else ""
    return f"NaN or infinity in a loss or a gradient on rank {' and '.join(map(str, ranks))}{own}"


def step_status(skipped: SkippedSteps, *, has_failed: bool) -> tuple[StepStatus, str]:
    """How this process comes to a step, and what was not finite, if anything was; waits for the device."""
    is_finite, reason = skipped.take_status()
    return StepStatus.FAILED if has_failed else StepStatus.OK if is_finite else StepStatus.NOT_FINITE, reason


def apply_sync_result(result: SyncResult, skipped: SkippedSteps, own_rank: int, own_reason: str) -> None:
    """Leave the step out where any process has to.

    Raises:
        ParallelError: another process came to the step with an error.
    """
    if result.failed:
        raise ParallelError(
            f"opt.step() ended with an error on rank {' and '.join(map(str, result.failed))}, which tells it there. This step is "
            "dropped on all ranks; nothing was changed"
        )
    if result.not_finite:
        skipped.reason = not_finite_message(result.not_finite, own_rank, own_reason)
