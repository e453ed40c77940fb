"""The optimizers that are compared: each makes a step function from a model and one learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import attach, rules
from ..errors import GradlrWarning
from ..parameters import plan_parameters
from ..ranks import ByLoss
from ..tracker import LossTracker

Loss = Callable[[], Tensor]


@dataclass
class Stepper:
    """One optimizer at work on one model.

    Attributes:
        step: Takes a function that computes the loss, runs backward and the update, and returns the loss.
        set_rate: Multiplies every learning rate by a factor (a schedule).
        optimizers: The torch optimizers behind it.
        tracker: gradlr's tracker, None for the others.
    """

    step: Callable[[Loss], Tensor]
    optimizers: list[torch.optim.Optimizer]
    tracker: LossTracker | None = None
    _rates: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def set_rate(self, factor: float) -> None:
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def state_numbers(self, parameters: list[nn.Parameter]) -> int:
        """Numbers of state kept for the given parameters, step counters left out."""
        states = [optimizer.state[p] for optimizer in self.optimizers for p in parameters if p in optimizer.state]
        return sum(value.numel() for state in states for value in state.values() if torch.is_tensor(value) and value.ndim > 0)

    def state_bytes(self) -> int:
        """Bytes of all state, step counters left out."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim > 0]
        return sum(value.numel() * value.element_size() for value in tensors)


@dataclass(frozen=True)
class Contender:
    """A named way to train: `make(model, lr)` gives a Stepper; `rates` is the grid that its learning rate is tuned on."""

    name: str
    label: str
    make: Callable[[nn.Module, float], Stepper]
    rates: tuple[float, ...]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, tables, vectors), as gradlr sees them; every contender that treats them apart uses this split."""
    plans = plan_parameters(model)
    return tuple([plan.parameter for plan in plans if plan.kind == kind] for kind in ("matrix", "table", "vector"))


def _ordinary_step(optimizers: list[torch.optim.Optimizer]) -> Callable[[Loss], Tensor]:
    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def forward_backward(model: nn.Module, lr: float) -> Stepper:
    """No optimizer at all: the gradients are made and dropped."""

    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss

    return Stepper(step, [])


def sgd(model: nn.Module, lr: float) -> Stepper:
    """torch's SGD without momentum: the least that an optimizer can do."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr)]
    return Stepper(_ordinary_step(optimizers), optimizers)


def adamw(model: nn.Module, lr: float, **options: Any) -> Stepper:
    """torch's AdamW, one learning rate for everything, no weight decay (as for all contenders)."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **options)]
    return Stepper(_ordinary_step(optimizers), optimizers)


def adamw_slow_tables(model: nn.Module, lr: float) -> Stepper:
    """AdamW with tables at a quarter of the rate: what splitting the rates alone is worth."""
    matrices, tables, vectors = split_parameters(model)
    groups = [{"params": matrices + vectors}, {"params": tables, "lr": lr / 4}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)]
    return Stepper(_ordinary_step(optimizers), optimizers)


def muon(model: nn.Module, lr: float) -> Stepper:
    """torch's Muon for matrices, AdamW at an eighth of its rate for the rest."""
    matrices, tables, vectors = split_parameters(model)
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(tables + vectors, lr=lr / 8, weight_decay=0.0),
    ]
    return Stepper(_ordinary_step(optimizers), optimizers)


def gradlr(**options: Any) -> Callable[[nn.Module, float], Stepper]:
    """gradlr with the given arguments of `attach`; its vectors and tables follow its one learning rate."""

    def make(model: nn.Module, lr: float) -> Stepper:
        tracker = LossTracker()
        with warnings.catch_warnings():
            # What an adaptor of so large a rank costs is measured here, too.
            warnings.filterwarnings("ignore", "capture=.* costs more than hooks would", GradlrWarning)
            optimizer = attach(model, tracker, lr=lr, **options)

        def step(compute: Loss) -> Tensor:
            loss = compute()
            tracker(loss).backward()
            optimizer.step()
            return loss

        return Stepper(step, [optimizer], tracker)

    return make


_SLOW = (5e-4, 1e-3, 2e-3, 4e-3)
_FAST = (4e-3, 8e-3, 1.6e-2, 3.2e-2)

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("adamw", "AdamW", adamw, _SLOW),
        Contender("adamw_slow_tables", "AdamW, tables at lr / 4", adamw_slow_tables, _SLOW),
        Contender("muon", "Muon", muon, (2e-3, *_FAST[:3])),
        Contender("k4_by_loss", "TrackedMomentum k4, r ≤ 64 by loss (default)", gradlr(), _FAST),
        Contender("k4_r64_fixed", "TrackedMomentum k4 r64", gradlr(rank=64), _FAST),
        Contender("k4_r64_no_residual", "TrackedMomentum k4 r64, no residual",
                  gradlr(rank=64, rule=rules.TrackedMomentum(residual=0)), _FAST),
        Contender("k4_r64_weighed", "TrackedMomentum k4 r64, weighed",
                  gradlr(rank=64, rule=rules.TrackedMomentum(is_weighed=True)), _FAST),
        Contender("k4_r64_products", "TrackedMomentum k4 r64, products only",
                  gradlr(rank=64, rule=rules.TrackedMomentum(arithmetic="products")), _FAST),
        Contender("k1_r64", "TrackedMomentum k1 r64", gradlr(rank=64, momentum_rank=1), _FAST),
        Contender("k16_r64", "TrackedMomentum k16 r64", gradlr(rank=64, momentum_rank=16), _FAST),
        Contender("k4_r16", "TrackedMomentum k4 r16", gradlr(rank=16), _FAST),
        Contender("k4_r16_no_residual", "TrackedMomentum k4 r16, no residual",
                  gradlr(rank=16, rule=rules.TrackedMomentum(residual=0)), _FAST),
        Contender("k4_r16_step", "TrackedMomentum k4 r16, apply=\"step\"", gradlr(rank=16, apply="step"), _FAST),
        Contender("k16_r64_step", 'TrackedMomentum k16 r64, apply="step"',
                  gradlr(rank=64, momentum_rank=16, apply="step"), _FAST),
        Contender("k4_r64_adaptor", 'TrackedMomentum k4 r64, capture="adaptor"', gradlr(rank=64, capture="adaptor"), _FAST),
        Contender("k4_r64_adaptor_step", 'TrackedMomentum k4 r64, capture="adaptor", apply="step"',
                  gradlr(rank=64, capture="adaptor", apply="step"), _FAST),
        Contender("k4_r64_one_sided", 'TrackedMomentum k4 r64, capture="one_sided"',
                  gradlr(rank=64, capture="one_sided"), _FAST),
        Contender("k16_r64_one_sided", 'TrackedMomentum k16 r64, capture="one_sided"',
                  gradlr(rank=64, momentum_rank=16, capture="one_sided"), _FAST),
        Contender("k4_r32", "TrackedMomentum k4 r32", gradlr(rank=32), _FAST),
        Contender("k4_r128", "TrackedMomentum k4 r128 (full rank here)", gradlr(rank=128), _FAST),
        Contender("k32_r64", "TrackedMomentum k32 r64", gradlr(rank=64, momentum_rank=32), _FAST),
        Contender("factor_moments", "FactorMoments r16 (the notebook's)", gradlr(rule="factor_moments", rank=ByLoss(16)), _FAST),
        Contender("factor_moments_adjusted", "FactorMoments r16, adjusted",
                  gradlr(rule=rules.FactorMoments(is_adjusted=True), rank=ByLoss(16)), _FAST),
    )
}  # fmt: skip

# Ways to see the gradient, which docs/capture.md compares; the README compares the others.
CAPTURE_CONTENDERS = ("k16_r64_step", "k4_r64_adaptor", "k4_r64_adaptor_step", "k4_r64_one_sided", "k16_r64_one_sided")
