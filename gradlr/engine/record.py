"""What the optimizer keeps about each parameter besides its state: plan, rule, ranks, and the gradient that waits."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..gradient import GradientOperator
from ..params.kinds import ParameterPlan
from ..ranks import RankInputs, RankSchedule, resolve_rank
from ..rules import Rule, UpdateContext
from ..tensors import AsyncScalar


@dataclass
class ParameterGroup:
    """Parameters that share a kind and all options; becomes one entry of `opt.param_groups`."""

    label: str
    kind: str
    plans: list[ParameterPlan]
    rule: Rule
    schedule: RankSchedule
    momentum_rank: int | float
    lr: float
    beta: float
    weight_decay: float


@dataclass
class ParamRecord:
    """What the optimizer keeps about one parameter besides its state.

    Attributes:
        rank: r of the next update.
        largest_rank: The largest r its schedule will give.
        momentum_rank: k.
        last_loss: Serial of the loss whose backward last brought a gradient; None before the first.
        pending: The gradient that waits for `step()`.
        is_pending_blank: Whether that sketch holds zeros only, so that its bases come from nothing; None where known.
        capture: "hook", or how the layer hands its gradient over: "adaptor", "one_sided", "rows".
        observer: Measures the next updates for `report()`; None where nobody asks.
        metrics: What it measured of the last one.
    """

    index: int
    plan: ParameterPlan
    group_index: int
    rule: Rule
    schedule: RankSchedule
    rank: int
    largest_rank: int
    momentum_rank: int
    last_loss: int | None = None
    pending: GradientOperator | None = None
    capture: str = "hook"
    observer: Any = None
    metrics: Any = None
    is_pending_blank: AsyncScalar | None = None
    _basis: weakref.ref[Tensor] | None = None
    _is_basis_sound: AsyncScalar | None = None
    _is_basis_for_training: bool = True

    @property
    def basis(self) -> Tensor | None:
        """X, on which a forward since the last update has projected the layer's input, while a graph or a sketch holds it."""
        return None if self._basis is None else self._basis()

    @basis.setter
    def basis(self, basis: Tensor | None) -> None:
        self._basis, self._is_basis_sound = None if basis is None else weakref.ref(basis), None

    def keep_basis(self, basis: Tensor, is_sound: Tensor, is_training: bool) -> None:
        """Set the basis; a 0-dim flag tells whether further forwards may use it. Its inputs may have been zeros, or NaN."""
        self.basis, self._is_basis_sound, self._is_basis_for_training = basis, AsyncScalar(is_sound), is_training

    def sound_basis(self, is_training: bool) -> Tensor | None:
        """The basis, unless it came from nothing, or from an evaluation.

        What its flag said is read here, a forward later, so that no device waits.
        """
        basis, flag = self.basis, self._is_basis_sound
        is_foreign = is_training and not self._is_basis_for_training
        if basis is None or is_foreign or (flag is not None and not flag.read()):
            return None
        self._is_basis_sound = None
        return basis

    def restart(self, rank: int) -> None:
        """After a checkpoint was loaded: nothing has happened yet."""
        self.rank, self.last_loss, self.pending, self.basis, self.metrics = rank, None, None, None, None


def torch_group(group: ParameterGroup) -> dict[str, Any]:
    """One entry of `param_groups`: plain values only, so that a state_dict loads with `weights_only=True`."""
    named = [(plan.name, plan.parameter) for plan in group.plans]
    options = {"lr": group.lr, "beta": group.beta, "weight_decay": group.weight_decay}
    return {"params": named, "label": group.label, "kind": group.kind, "rule": group.rule.name, **options}


def make_records(groups: list[ParameterGroup]) -> list[ParamRecord]:
    """One record per parameter, in the order of the groups."""
    records = []
    for group_index, group in enumerate(groups):
        for plan in group.plans:
            shape = plan.shape
            limit = min(shape[-2:]) if len(shape) >= 2 else 1
            largest = group.schedule.ceiling(limit)
            k = min(resolve_rank(group.momentum_rank, limit), largest)
            records.append(ParamRecord(len(records), plan, group_index, group.rule, group.schedule, largest, largest, k))
    return records


def follow_loss(record: ParamRecord, ratio: float, state: dict[str, Tensor]) -> None:
    """Set the record's rank to what its schedule gives now.

    Raises:
        ArgumentError: it is no int between 1 and the schedule's own ceiling.
    """
    rank = record.schedule(RankInputs(ratio, record.rank, record.largest_rank, state.get("spectrum")))
    if not (isinstance(rank, int) and 1 <= rank <= record.largest_rank):
        where = f"{record.schedule!r} gave rank {rank!r} for {record.plan.name!r}"
        raise ArgumentError(f"{where}: it must be an int in [1, {record.largest_rank}], the schedule's own ceiling there")
    record.rank = rank


def initial_state(record: ParamRecord, context: UpdateContext) -> dict[str, Tensor]:
    """What the record's rule starts with, and the step count, in float32 or the parameter's own float64.

    Raises:
        ArgumentError: the rule does not suit the parameter's shape.
    """
    parameter = record.plan.parameter
    try:
        state = record.rule.init(record.plan.shape_here, context, **compute_dtype_and_device(parameter))
    except ShapeError as error:
        raise ArgumentError(f"parameter {record.plan.name!r}, a {record.plan.kind}: {error}") from error
    # The count stays on the CPU, wherever the parameter lies: it is read at every step.
    return {"step": torch.zeros((), dtype=torch.int64, device="cpu"), **state}


def rule_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the rule keeps of a parameter's state: without the step count and what the rank schedule looks at."""
    return {key: value for key, value in state.items() if key not in ("step", "spectrum")}


def state_bytes(state: dict[str, Tensor]) -> int:
    """Bytes of what the rule keeps."""
    return sum(value.nbytes for value in rule_entries(state).values())


def compute_dtype_and_device(parameter: Tensor) -> dict[str, Any]:
    """Dtype and device of state and arithmetic: float32 or the parameter's own float64, where the parameter lies."""
    return {"dtype": torch.float64 if parameter.dtype == torch.float64 else torch.float32, "device": parameter.device}


class Noise:
    """One random generator per device, set anew for every seed, parameter and step: what is drawn depends on nothing else."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def at(self, device: torch.device, seed: int, index: int, step: int) -> torch.Generator:
        """The device's generator, at the beginning of the numbers of this parameter and step."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(mixed_seed(seed, index, step))


def mixed_seed(seed: int, index: int, step: int) -> int:
    """One 63-bit seed from three numbers (splitmix64), so that neighbouring steps and parameters draw unrelated numbers."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
