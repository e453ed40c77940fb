"""What a report holds: one entry per parameter, the totals, and its forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.record import ParamRecord, rule_entries, state_bytes
from .figure import draw
from .metrics import UpdateMetrics, mean_stable_rank
from .summary import ADAMW_BYTES_PER_WEIGHT
from .tables import as_html, as_rich, as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..engine.state_store import KeptState

# What `scalars` hands out per parameter; the rest is text, or a constant.
_SCALARS = (
    "rank", "energy", "stable_rank", "momentum_stable_rank", "gradient_norm", "weight_norm", "update_norm", "relative_update",
    "state_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class ParameterReport:
    """One parameter at the moment of asking. None stands for what it does not have, or what was not observed.

    Attributes:
        name, shape, kind, rule, capture: As `print(opt)` shows them.
        weights: Number of its weights.
        steps: Number of its updates.
        rank, largest_rank, momentum_rank: r of the next update, the largest there will be, and k; None for rules that do not
            compress.
        state_bytes: Of what its rule keeps.
        weight_norm: ‖W‖, Frobenius.
        momentum_stable_rank: ‖M‖_F² / ‖M‖₂² of the momentum, in [1, k]; mean over a batch.
        observed_step: Which update the entries below are of.
        energy: Share of ‖G‖_F² inside the r directions of the update. None where a projection of G was all that was known.
        stable_rank: ‖G‖_F² / ‖G‖₂² of the gradient: about how many directions it has; mean over a batch.
        gradient_norm: ‖G‖ as the rule was given it; that of the projection where `is_projected`.
        is_projected: Whether only a projection of G was known: with "one_sided" capture.
        update_norm: ‖ΔW‖, weight decay included.
        relative_update: ‖ΔW‖ / ‖W‖, of W before the update.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    rule: str
    capture: str
    weights: int
    steps: int
    rank: int | None
    largest_rank: int | None
    momentum_rank: int | None
    state_bytes: int
    weight_norm: float | None
    momentum_stable_rank: float | None
    observed_step: int | None = None
    energy: float | None = None
    stable_rank: float | None = None
    gradient_norm: float | None = None
    is_projected: bool = False
    update_norm: float | None = None
    relative_update: float | None = None


@dataclass(frozen=True)
class Report:
    """All parameters of an optimizer, in the order of `param_groups`.

    `print(report)` shows a table, a notebook or `rich.print` a prettier one, `plot()` a figure; `scalars()` is for loggers.
    """

    rows: tuple[ParameterReport, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(row.weights for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """What AdamW would keep: two float32 numbers per weight."""
        return ADAMW_BYTES_PER_WEIGHT * self.weights

    @property
    def rank_mean(self) -> float | None:
        """Mean rank of the parameters that have one."""
        ranks = [row.rank for row in self.rows if row.rank is not None]
        return sum(ranks) / len(ranks) if ranks else None

    @property
    def energy(self) -> float | None:
        """Captured share of the squared norm of all gradients whose share is known."""
        known = [row for row in self.rows if row.energy is not None]
        total = math.fsum(row.gradient_norm**2 for row in known)
        return math.fsum(row.energy * row.gradient_norm**2 for row in known) / total if total else None

    @property
    def gradient_norm(self) -> float | None:
        """Norm over all observed parameters."""
        return _joint(row.gradient_norm for row in self.rows)

    @property
    def update_norm(self) -> float | None:
        """Norm over all observed parameters."""
        return _joint(row.update_norm for row in self.rows)

    @property
    def is_observed(self) -> bool:
        """Whether any update was observed."""
        return any(row.observed_step is not None for row in self.rows)

    def scalars(self, prefix: str = "gradlr/") -> dict[str, float]:
        """Finite floats by name, for `SummaryWriter.add_scalar` one by one, or `wandb.log` at once.

        Args:
            prefix: In front of every name.

        Returns:
            `"gradlr/rank/blocks.0.qkv.weight"` and the like, and the totals: `"gradlr/state_bytes"`, `"gradlr/state_share"` of
            AdamW's, `"gradlr/rank_mean"`, `"gradlr/energy"`, `"gradlr/gradient_norm"`, `"gradlr/update_norm"`.
        """
        share = self.state_bytes / self.adamw_bytes if self.adamw_bytes else None
        names = ("state_bytes", "rank_mean", "energy", "gradient_norm", "update_norm")
        found: dict[str, Any] = {"state_share": share} | {name: getattr(self, name) for name in names}
        found |= {f"{name}/{row.name}": getattr(row, name) for name in _SCALARS for row in self.rows}
        return {prefix + name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}

    def plot(self, axes: Sequence[Any] | None = None) -> Figure:
        """Draw ranks, and where updates were observed captured energy and relative size of the update, with matplotlib.

        Args:
            axes: As many matplotlib axes as panels: 3 where updates were observed, otherwise 1; a new figure where None.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
            ArgumentError: another number of axes is given, or no parameter has a rank.
        """
        return draw(self, axes)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        return as_rich(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def report(optimizer: KeptState) -> Report:
    """The report of what the optimizer holds now."""
    return Report(tuple(_row(record, optimizer.state[record.plan.parameter]) for record in optimizer.records))


def _row(record: ParamRecord, state: dict[str, Tensor]) -> ParameterReport:
    plan, is_compressed = record.plan, not record.rule.is_elementwise
    ranks = (record.rank, record.largest_rank, record.momentum_rank) if is_compressed else (None, None, None)
    return ParameterReport(
        plan.name, tuple(plan.parameter.shape), plan.kind, record.rule.name, record.capture, plan.parameter.numel(),
        int(state["step"]), *ranks, state_bytes(state), _read(_norm(plan.parameter.detach())),
        _momentum_stable_rank(record, state), **_observed(record.metrics),
    )  # fmt: skip


def _observed(seen: UpdateMetrics | None) -> dict[str, Any]:
    if seen is None:
        return {}
    read = {entry.name: _read(value) for entry in fields(seen) if isinstance(value := getattr(seen, entry.name), Tensor)}
    update, weight = read.get("update_norm"), read.pop("weight_norm")
    relative = update / weight if update is not None and weight else None
    return {"observed_step": seen.step, "is_projected": seen.is_projected, "relative_update": relative, **read}


def _read(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _momentum_stable_rank(record: ParamRecord, state: dict[str, Tensor]) -> float | None:
    factors = record.rule.momentum(rule_entries(state))
    if factors is None or not int(state["step"]):
        return None
    # The singular values of left rightᵀ are those of the k × k product of the two triangular factors.
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in factors)
    core = left @ right.mT
    if not core.isfinite().all():  # svdvals would raise
        return None
    energies = torch.linalg.svdvals(core).square()
    return _read(mean_stable_rank(energies.sum(dim=-1), energies[..., 0]))


def _joint(norms: Any) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None
