"""What a baseline is, and those that torch and gradlr make: a step function from a model and one learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import attach
from ...errors import GradlrWarning
from ...params.kinds import MATRIX, plan_parameters
from ...tracker import LossTracker
from .processes import group_of_one

Loss = Callable[[], Tensor]


@dataclass
class TrainStep:
    """One optimizer at work on one model.

    Attributes:
        step: Takes a function that computes the loss, runs backward and the update, and returns the loss.
        set_rate: Multiplies every learning rate by a factor (a schedule).
        optimizers: The torch optimizers behind it.
        tracker: gradlr's tracker, None for the others.
        more_state: State of a parameter that lies outside of `optimizer.state`, or no tensor there.
    """

    step: Callable[[Loss], Tensor]
    optimizers: list[torch.optim.Optimizer]
    tracker: LossTracker | None = None
    more_state: Callable[[nn.Parameter], list[Tensor]] = lambda parameter: []
    _rates: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def set_rate(self, factor: float) -> None:
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def mean_rank(self) -> float | None:
        """Mean rank over the matrices at this moment, None but for gradlr."""
        if self.tracker is None:
            return None
        ranks = [record.rank for record in self.optimizers[0].records if record.plan.kind == MATRIX]
        return sum(ranks) / len(ranks) if ranks else None

    def state_numbers(self, parameters: Iterable[nn.Parameter]) -> int:
        """Numbers of state kept for the given parameters, step counters left out."""
        return sum(value.numel() for value in self._state(parameters))

    def state_bytes(self, parameters: Iterable[nn.Parameter] | None = None) -> int:
        """Bytes of state of the given parameters, or of all, step counters left out."""
        if parameters is None:
            parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        return sum(value.nbytes for value in self._state(parameters))

    def _state(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        seen: set[int] = set()  # a table that several parameters share counts once
        for parameter in parameters:
            kept = [state for optimizer in self.optimizers if (state := optimizer.state.get(parameter))]
            values = [value for state in kept for value in state.values() if torch.is_tensor(value) and value.ndim > 0]
            for value in (*values, *self.more_state(parameter)):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield value


@dataclass(frozen=True)
class Baseline:
    """A named way to train: `make(model, lr)` gives a TrainStep; `rates` is the grid that its learning rate is tuned on."""

    name: str
    label: str
    make: Callable[[nn.Module, float], TrainStep]
    rates: tuple[float, ...]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, tables, vectors), as gradlr sees them; every baseline that treats them apart uses this split."""
    plans = plan_parameters(model)
    return tuple([plan.parameter for plan in plans if plan.kind == kind] for kind in ("matrix", "embedding", "vector"))


def split_by_axes(matrices: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(2-D parameters, the others such as convolutions), for packages that take 2-D matrices only."""
    return [p for p in matrices if p.ndim == 2], [p for p in matrices if p.ndim != 2]


def ordinary_step(optimizers: list[torch.optim.Optimizer]) -> Callable[[Loss], Tensor]:
    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def forward_backward(model: nn.Module, lr: float) -> TrainStep:
    """No optimizer at all: the gradients are made and dropped."""

    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss

    return TrainStep(step, [])


def sgd(model: nn.Module, lr: float) -> TrainStep:
    """torch's SGD without momentum: the least that an optimizer can do."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr)]
    return TrainStep(ordinary_step(optimizers), optimizers)


def adamw(model: nn.Module, lr: float, **options: Any) -> TrainStep:
    """torch's AdamW, one learning rate for everything, no weight decay (as for all baselines)."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **options)]
    return TrainStep(ordinary_step(optimizers), optimizers)


def fused_adamw(model: nn.Module, lr: float) -> TrainStep:
    """torch's AdamW in one kernel a tensor, without a copy of the gradients."""
    return adamw(model, lr, fused=True)


def adamw_slow_tables(model: nn.Module, lr: float) -> TrainStep:
    """AdamW with tables at a quarter of the rate: what splitting the rates alone is worth."""
    matrices, tables, vectors = split_parameters(model)
    groups = [{"params": matrices + vectors}, {"params": tables, "lr": lr / 4}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)]
    return TrainStep(ordinary_step(optimizers), optimizers)


def muon(model: nn.Module, lr: float) -> TrainStep:
    """torch's Muon for matrices, AdamW at an eighth of its rate for the rest."""
    matrices, tables, vectors = split_parameters(model)
    flat, folded = split_by_axes(matrices)
    optimizers = [
        torch.optim.Muon(flat, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(folded + tables + vectors, lr=lr / 8, weight_decay=0.0),
    ]
    return TrainStep(ordinary_step(optimizers), optimizers)


def gradlr(
    *, table_share: float | None = None, in_group: bool = False, **options: Any
) -> Callable[[nn.Module, float], TrainStep]:
    """gradlr with the given arguments of `attach`; its vectors and tables follow its one learning rate.

    Args:
        table_share: Rate of tables as a share of it; that of `attach` where None.
        in_group: With `process_group=` of this process alone, made where the model is trained.
        **options: Of `attach`.
    """

    def make(model: nn.Module, lr: float) -> TrainStep:
        tracker = LossTracker()
        group = {"process_group": group_of_one()} if in_group else {}
        with warnings.catch_warnings():
            # What an adaptor of so large a rank costs is measured here, too.
            warnings.filterwarnings("ignore", "capture=.* costs more than hooks would", GradlrWarning)
            kinds = None if table_share is None else {"embedding": {"lr": lr * table_share}}
            optimizer = attach(model, tracker, lr=lr, kinds=kinds, **group, **options)

        def step(compute: Loss) -> Tensor:
            loss = compute()
            tracker(loss).backward()
            optimizer.step()
            return loss

        return TrainStep(step, [optimizer], tracker)

    return make
