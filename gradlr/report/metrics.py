"""What only the moment of an update knows: how much of the gradient was captured, and what is written to the weight."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..engine.record import ParamRecord
from ..errors import ArgumentError
from ..gradient import Dense, GradientOperator, Sketched
from ..linalg import normalize_columns, spectral_norm
from ..linalg.blocks import pieces
from ..linalg.normalize import squared_norm, widen
from ..params.kinds import KINDS
from ..rules import Update
from ..tensors import widest

# Squared singular values of unit columns below this are rounding errors of float32, not directions.
_SPAN_RTOL = 1e-10
# Entries of a change that exist at one time where its norm is wanted: 4 MiB in float32.
_BLOCK_NUMBERS = 2**20


@dataclass(frozen=True)
class UpdateMetrics:
    """Numbers of one update of one parameter, 0-dim float64 tensors on its device: no host waits until they are read.

    Attributes:
        step: Which update it was, counted from 1.
        is_projected: Whether only a projection of G was known ("one_sided" capture), so that ‖G‖ is that of the projection.
        gradient_norm: ‖G‖, Frobenius, of what the rule was given: after GradScaler and limits; of the step's sum.
        stable_rank: ‖G‖_F² / ‖G‖₂², about how many directions G has, the mean over a batch of matrices; None for vectors.
        energy: Share of ‖G‖_F² inside the r directions of the update, ‖Qᵀ G‖_F² / ‖G‖_F² with an orthonormal basis Q of
            `Update.left`; None for rules that do not compress, and where only a projection of G was known.
        update_norm: ‖ΔW‖ with weight decay, before a narrow weight is rounded; None until the update is about to be written.
        relative_update: ‖ΔW‖ / ‖W‖, of W before the update; not finite where W is zero.
    """

    step: int
    is_projected: bool
    gradient_norm: Tensor
    stable_rank: Tensor | None = None
    energy: Tensor | None = None
    update_norm: Tensor | None = None
    relative_update: Tensor | None = None


class Observer:
    """Measures the updates of one parameter; the engine calls it at three moments of each.

    The rule consumes the gradient and the weight is overwritten, so each number is taken just before that.

    Attributes:
        observations: How many `Observation`s want it: they may overlap, and end in any order.
    """

    observations = 0

    def keep(self, gradient: GradientOperator) -> GradientOperator:
        """The gradient for after the rule has consumed it, whole where it is known; the rule's own one stays as it is."""
        if isinstance(gradient, Sketched):
            return gradient if gradient.whole is None else gradient.whole
        return Dense(gradient.matrix.clone()) if isinstance(gradient, Dense) else gradient

    def measure_gradient(self, record: ParamRecord, kept: GradientOperator, update: Update, step: int) -> UpdateMetrics:
        """The gradient's part of the numbers, of what `keep` gave and the update, number `step`, that the rule made of it."""
        is_projected, energy = isinstance(kept, Sketched), kept.squared_norm()
        rank = None if KINDS[record.plan.kind].is_vector else mean_stable_rank(kept)
        left = None if not record.rule.has_rank or is_projected else update.left
        share = captured_energy(kept, left) / energy if isinstance(left, Tensor) else None
        return UpdateMetrics(step, is_projected, energy.sqrt(), rank, share)

    def measure_update(
        self, metrics: UpdateMetrics, weight: Tensor, update: Update, *, lr: float, weight_decay: float | Tensor
    ) -> UpdateMetrics:
        """The same with the numbers of `W ← (1 − ηλ) W − η · direction`, which is yet to be written, W seen as (..., m, n)."""
        norm = lr * change_energy(weight.detach(), update, weight_decay).sqrt()
        return replace(metrics, update_norm=norm, relative_update=norm / squared_norm(weight.detach()).sqrt())


class Observation(AbstractContextManager["Observation"]):
    """Observes parameters from now on, until `stop()` or the end of a `with` block. The numbers seen last stay.

    Args:
        records: All of the optimizer's.
        globs: On parameter names.

    Raises:
        ArgumentError: a glob is no string, or matches no attached parameter.
    """

    def __init__(self, records: Iterable[ParamRecord], globs: Iterable[str]) -> None:
        records = list(records)
        self._records: dict[int, ParamRecord] = {}
        for glob in globs:
            if not isinstance(glob, str):
                raise ArgumentError(f"observe({glob!r}): give globs on parameter names, each as a string")
            found = {record.index: record for record in records if fnmatchcase(record.plan.name, glob)}
            if not found:
                raise ArgumentError(f"observe({glob!r}) matches no attached parameter; names look like {records[0].plan.name!r}")
            self._records |= found
        for record in self._records.values():
            observer = record.observer if isinstance(record.observer, Observer) else Observer()
            observer.observations += 1
            record.observer = observer

    def stop(self) -> None:
        """Observe no more. Calling it again does nothing."""
        for record in self._records.values():
            if isinstance(record.observer, Observer):
                record.observer.observations -= 1
                record.observer = record.observer if record.observer.observations else None
        self._records = {}

    def __exit__(self, *exception: object) -> None:
        self.stop()


def captured_energy(gradient: GradientOperator, left: Tensor) -> Tensor:
    """‖Qᵀ G‖², Frobenius, summed over a batch, 0-dim float64, with an orthonormal basis Q of the span of `left`, (..., m, r)."""
    # Without Q: of L = `left`, ‖Qᵀ G‖² is the trace of (Lᵀ L)⁺ Lᵀ G Gᵀ L. The columns may depend on each other.
    left = normalize_columns(left)
    image, left = widest(gradient.mT @ left), widest(left)
    gram = left.mT @ left
    # A shift in the place of a pseudoinverse, whose decomposition would make the host wait. Where columns depend on each other,
    # so do those of the image, which is zero then.
    shift = max(_SPAN_RTOL, left.shape[-1] * torch.finfo(gram.dtype).eps)
    shifted = torch.where(gram.isfinite(), gram, 0.0) + shift * torch.eye(left.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(shifted).L
    return torch.linalg.solve_triangular(factor, image.mT, upper=False).square().sum()


def change_energy(weight: Tensor, update: Update, decay: float | Tensor) -> Tensor:
    """‖direction + λ W‖², Frobenius, summed over a batch, 0-dim float64, for a weight W (..., m, n) or a vector."""
    if update.rows is not None and isinstance(update.dense, Tensor):
        # The other rows change by decay alone. A row may come twice, the second time with zeros, which add nothing here.
        overlap = widest(torch.linalg.vecdot(weight[update.rows].to(update.dense.dtype), update.dense)).sum()
        return (squared_norm(update.dense) + 2 * decay * overlap + decay**2 * squared_norm(weight)).clamp(min=0)
    # A block of rows at a time, so that the change of a large weight never exists as a whole.
    weight, energies = torch.atleast_2d(weight), [widest(weight.new_zeros(()))]
    update = replace(update, dense=torch.atleast_2d(update.dense) if isinstance(update.dense, Tensor) else update.dense)
    for piece in pieces(weight.shape[-2], weight.numel() / max(1, weight.shape[-2]), _BLOCK_NUMBERS):
        rows = (..., piece, slice(None))
        energies.append(squared_norm(widen(weight[rows]) * decay + update.block(rows).direction()))
    return torch.stack(energies).sum()


def mean_stable_rank(gradient: GradientOperator) -> Tensor:
    """‖G‖_F² / ‖G‖₂², 0-dim float64: the mean over a batch, in which a zero matrix counts as 0; NaN where G is not finite."""
    # Of a single matrix the operator knows the norm without forming it; of a batch each one's is needed.
    is_batch, largest = len(gradient.shape) > 2, spectral_norm(gradient).square()
    norms = widest(torch.linalg.vector_norm(gradient.matrix, dim=(-2, -1))).square() if is_batch else gradient.squared_norm()
    return torch.where(largest > 0, norms / largest, torch.where(largest == 0, 0.0, torch.nan)).mean()
