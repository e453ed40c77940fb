"""What is known about each attached parameter besides its state: its plan, its rule, its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError
from ..gradient import GradientOperator
from ..linalg.int8 import Int8Weight
from ..params.groups import ParameterGroup
from ..params.kinds import ParameterPlan
from ..ranks import RankInputs, RankSchedule, resolve_rank
from ..rules import Rule, UpdateContext
from ..tensors import compute_dtype_and_device, is_sharded
from ..tracker import LossTracker


class UpdateObserver(Protocol):
    """Who wants the numbers of a parameter's updates; `gradlr.report` has one. It changes nothing that it is shown."""

    def keep(self, gradient: GradientOperator) -> GradientOperator: ...

    def measure_gradient(self, record: ParamRecord, kept: GradientOperator, update: Any, step: int) -> Any: ...

    def measure_update(self, metrics: Any, weight: Tensor, update: Any, *, lr: float, weight_decay: float | Tensor) -> Any: ...


@dataclass(eq=False)
class ParamRecord:
    """What the optimizer knows about one parameter besides its state.

    Attributes:
        index: Its number, in the order of the groups.
        plan: Its name, kind, view and layout.
        group_index: Number of its entry in `opt.param_groups`.
        rule: What makes an update of its gradient.
        schedule: What makes a rank of the loss.
        limit: min(m, n) of its view.
        rank: r of the next update.
        largest_rank: The largest r that the schedule will give.
        momentum_rank: k, 0 for no momentum.
        last_loss: Serial of the loss whose backward last brought a gradient; None before the first.
        capture: "hook", or how its layer hands the gradient over: "adaptor", "one_sided", "rows".
        observer: Wants the numbers of the next updates; None where nobody does.
        metrics: Those of the last update that was observed.
        is_dtensor: Whether the parameter is spread over the processes of a device mesh.
        is_int8: Whether its weights are int8 codes.
        is_narrow: Whether its weights are rounded stochastically.
        is_plain: Whether the parameter is a tensor of torch's own class, all of which lies in this process.
    """

    index: int
    plan: ParameterPlan
    group_index: int
    rule: Rule
    schedule: RankSchedule
    limit: int
    rank: int
    largest_rank: int
    momentum_rank: int
    last_loss: int | None = None
    capture: str = "hook"
    observer: UpdateObserver | None = None
    metrics: Any = None

    def __post_init__(self) -> None:
        self.is_dtensor = is_sharded(self.plan.parameter)
        is_half = self.plan.parameter.dtype in (torch.bfloat16, torch.float16)
        self.is_plain = type(self.plan.parameter) in (Tensor, nn.Parameter) and self.plan.layout.is_whole
        self.is_int8 = isinstance(self.plan.parameter, Int8Weight)
        self.is_narrow = is_half or self.is_int8

    def follow_loss(self, tracker: LossTracker) -> None:
        """Set the rank to what the schedule gives for the losses so far.

        Raises:
            ArgumentError: that is no int between 1 and the schedule's own ceiling.
        """
        rank = self.schedule(RankInputs(tracker.ratio, self.rank, self.limit, tracker.progress))
        if not (isinstance(rank, int) and 1 <= rank <= self.largest_rank):
            where = f"{self.schedule!r} gave rank {rank!r} for {self.plan.name!r}"
            raise ArgumentError(f"{where}: it must be an int in [1, {self.largest_rank}], the schedule's own ceiling there")
        self.rank = rank

    def initial_state(self, context: UpdateContext) -> dict[str, Tensor]:
        """What the rule starts with, in float32 or the parameter's own float64.

        Raises:
            ArgumentError: the rule does not suit the parameter's shape.
        """
        try:
            return self.rule.init(self.plan.shape_here, context, **compute_dtype_and_device(self.plan.parameter))
        except ShapeError as error:
            raise ArgumentError(f"parameter {self.plan.name!r}, a {self.plan.kind}: {error}") from error

    def restart(self, rank: int) -> None:
        """After a checkpoint was loaded: nothing has happened yet."""
        self.rank, self.last_loss, self.metrics = rank, None, None


def make_records(groups: list[ParameterGroup]) -> list[ParamRecord]:
    """One record per parameter, in the order of the groups."""
    records: list[ParamRecord] = []
    for group_index, group in enumerate(groups):
        for plan in group.plans:
            limit = min(plan.shape[-2:]) if len(plan.shape) >= 2 else 1
            largest = group.schedule.ceiling(limit)
            k = min(resolve_rank(group.momentum_rank, limit), largest) if group.momentum_rank else 0
            records.append(ParamRecord(len(records), plan, group_index, group.rule, group.schedule, limit, largest, largest, k))
    return records


def rule_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the rule keeps of a parameter's state: all but the step count."""
    return {key: value for key, value in state.items() if key != "step"}


def state_bytes(state: dict[str, Tensor]) -> int:
    """Bytes of what the rule keeps."""
    return sum(value.nbytes for value in rule_entries(state).values())
