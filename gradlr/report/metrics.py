"""What only the moment of an update knows: how much of the gradient was captured, and what is written to the weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..gradient import Dense, GradientOperator, Sketched
from ..linalg import normalize_columns, spectral_norm
from ..rules import Rule, Update

if TYPE_CHECKING:
    from ..engine.record import ParamRecord

# Squared singular values of unit columns below this share of the largest are rounding errors of float32, not directions.
_SPAN_RTOL = 1e-10
# Entries of a product that exist at one time where its norm is wanted: 16 MiB in float32.
_BLOCK_NUMBERS = 2**22


@dataclass(frozen=True)
class UpdateMetrics:
    """Numbers of one update of one parameter, 0-dim float64 tensors on the parameter's device, so that nobody waits for it.

    Attributes:
        step: Which update it was, counted from 1.
        gradient_norm: ‖G‖, Frobenius, of what the rule was given: after GradScaler and limits; of the step's sum.
        is_projected: Whether only a projection of G was known ("one_sided" capture), so that ‖G‖ is that of the projection.
        stable_rank: ‖G‖_F² / ‖G‖₂², the mean over a batch of matrices; None for vectors.
        energy: Share of ‖G‖_F² inside the r directions of the update, ‖Qᵀ G‖_F² / ‖G‖_F² with an orthonormal basis Q of
            `Update.left`; None for rules that do not compress, and where only a projection of G was known.
        weight_norm: ‖W‖ before the update.
        update_norm: ‖ΔW‖ with weight decay, before a narrow weight is rounded.
    """

    step: int
    gradient_norm: Tensor
    is_projected: bool
    stable_rank: Tensor | None = None
    energy: Tensor | None = None
    weight_norm: Tensor | None = None
    update_norm: Tensor | None = None


class Observer:
    count = 0

    def keep(self, gradient):
        return kept(gradient)

    def measure_gradient(self, record, kept, update, step):
        return seen_gradient(kept, update, step, record.plan.kind, record.rule)

    def measure_update(self, metrics, weight, update, *, lr, weight_decay):
        return seen_update(metrics, weight, update, lr=lr, weight_decay=weight_decay)


class Observation:
    """Observes parameters from now on, until `stop()` or the end of a `with` block. What was seen last stays.

    Args:
        records: All of the optimizer's.
        match: Globs on parameter names.

    Raises:
        ArgumentError: a glob is no string, or matches no attached parameter.
    """

    def __init__(self, records: Iterable[ParamRecord], match: Iterable[str]) -> None:
        records = list(records)
        for glob in match:
            if not isinstance(glob, str):
                raise ArgumentError(f"observe({glob!r}): give globs on parameter names, each as a string")
            if not any(fnmatchcase(record.plan.name, glob) for record in records):
                raise ArgumentError(f"observe({glob!r}) matches no attached parameter; names look like {records[0].plan.name!r}")
        self._records = [record for record in records if any(fnmatchcase(record.plan.name, glob) for glob in match)]
        # A count: observations may overlap, and end in any order.
        for record in self._records:
            record.observer = record.observer or Observer()
            record.observer.count += 1

    def stop(self) -> None:
        """Observe no more. Calling it again does nothing."""
        for record in self._records:
            record.observer.count -= 1
            if not record.observer.count:
                record.observer = None
        self._records = []

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def kept(gradient: GradientOperator) -> GradientOperator:
    """The gradient, whole where it is known, for after the rule has consumed it: the rule gets the very same as unobserved."""
    if isinstance(gradient, Sketched):
        return gradient if gradient.whole is None else gradient.whole
    return Dense(gradient.matrix.clone()) if isinstance(gradient, Dense) else gradient


def seen_gradient(gradient: GradientOperator, update: Update, step: int, kind: str, rule: Rule) -> UpdateMetrics:
    """The gradient's part of the numbers.

    Args:
        gradient: From `kept`.
        update: What the rule made of it.
        step: Number of the update.
        kind: The parameter's: a "vector" has no stable rank.
        rule: Whether it compresses.
    """
    energy, is_projected = gradient.squared_norm(), isinstance(gradient, Sketched)
    is_compressed = update.left is not None and not rule.is_elementwise
    return UpdateMetrics(
        step,
        energy.sqrt(),
        is_projected,
        None if kind == "vector" else _mean_stable_rank(gradient),
        captured_energy(gradient, update.left) / energy if is_compressed and not is_projected else None,
    )


def seen_update(seen: UpdateMetrics, weight: Tensor, update: Update, *, lr: float, weight_decay: float | Tensor) -> UpdateMetrics:
    """The numbers of the gradient with those of `W ← (1 − ηλ) W − η · direction`, which is yet to be written.

    Args:
        seen: From `seen_gradient`.
        weight: The parameter's view.
        update: The direction.
        lr: η.
        weight_decay: λ.
    """
    weight = weight.detach()
    weight_energy = _dense_energy(weight)
    energy = direction_energy(update)
    if isinstance(weight_decay, Tensor) or weight_decay:
        energy = energy + 2 * weight_decay * _overlap(weight, update) + weight_decay**2 * weight_energy
    # Opposite parts may cancel to a rounding error below zero.
    return replace(seen, weight_norm=weight_energy.sqrt(), update_norm=lr * energy.clamp(min=0).sqrt())


def captured_energy(gradient: GradientOperator, left: Tensor) -> Tensor:
    """‖Qᵀ G‖², Frobenius, summed over a batch, 0-dim float64, with an orthonormal basis Q of the span of `left`, (..., m, r)."""
    left = normalize_columns(left)
    image, left = (gradient.mT @ left).double(), left.double()
    gram = left.mT @ left
    inverse = torch.linalg.pinv(torch.where(gram.isfinite(), gram, 0.0), rtol=_SPAN_RTOL, hermitian=True)
    return (inverse * (image.mT @ image)).sum()


def direction_energy(update: Update) -> Tensor:
    """‖diag(row_scale) left rightᵀ + dense‖², Frobenius, summed over a batch, 0-dim float64; of (m, n) entries only the given."""
    left, parts = _scaled_left(update), []
    if left is not None:
        parts.append(_product_energy(left, update.right))
    if update.dense is not None:
        parts.append(_dense_energy(update.dense))
    if left is not None and update.dense is not None:
        parts.append(2 * _product_overlap(update.dense, left, update.right))
    return sum(parts) if parts else torch.zeros((), dtype=torch.float64, device="cpu")


def _overlap(weight: Tensor, update: Update) -> Tensor:
    # ⟨W, direction⟩.
    left, parts = _scaled_left(update), []
    if left is not None:
        parts.append(_product_overlap(weight, left, update.right))
    if update.dense is not None:
        of_dense = weight if update.rows is None else weight[update.rows]
        parts.append(torch.linalg.vecdot(*torch.atleast_1d(of_dense.to(update.dense.dtype), update.dense)).double().sum())
    return sum(parts) if parts else torch.zeros((), dtype=torch.float64, device="cpu")


def _scaled_left(update: Update) -> Tensor | None:
    return update.left if update.row_scale is None else update.left * update.row_scale


def _dense_energy(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x, dtype=dtype).double().square()


def _product_energy(left: Tensor, right: Tensor) -> Tensor:
    # ‖left rightᵀ‖² from Gram matrices; where there are more columns than rows, block by block of the product itself.
    if left.shape[-1] <= min(left.shape[-2], right.shape[-2]):
        left, right = left.double(), right.double()
        return ((left.mT @ left) * (right.mT @ right)).sum()
    blocks = left.split(max(1, _BLOCK_NUMBERS // right.shape[-2]), dim=-2)
    return sum(_dense_energy(block @ right.mT) for block in blocks)


def _product_overlap(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # ⟨A, left rightᵀ⟩ = ⟨A right, left⟩, a block of columns at a time.
    width = min(matrix.shape[-2:])
    pairs = zip(left.double().split(width, dim=-1), right.split(width, dim=-1), strict=True)
    return sum(((matrix.to(right.dtype) @ of_right) * of_left).sum() for of_left, of_right in pairs)


def _mean_stable_rank(gradient: GradientOperator) -> Tensor:
    energies = _matrix_energies(gradient)
    return mean_stable_rank(energies, spectral_norm(gradient).square())


def _matrix_energies(gradient: GradientOperator) -> Tensor:
    # Per matrix of a batch.
    if len(gradient.shape) > 2:
        return torch.linalg.vector_norm(gradient.matrix, dim=(-2, -1)).double().square()
    return gradient.squared_norm()


def mean_stable_rank(energies: Tensor, largest: Tensor) -> Tensor:
    """Mean over a batch of squared Frobenius norm over squared spectral norm, 0-dim; a zero matrix counts as 0."""
    return torch.where(largest > 0, energies / largest, torch.where(largest == 0, 0.0, torch.nan)).mean()
