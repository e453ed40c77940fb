"""TrackedMomentum: a low-rank momentum whose basis is followed from step to step, under an update of larger rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..gradient import Dense, GradientOperator, Sketched
from ..linalg import REPLICATED, Axis, Layout, multi_normalize, normalize_columns, orthonormalize
from ..linalg.normalize import largest_entry
from ..linalg.polar import newton_schulz_by_gram
from .base import Rule, State, Update, UpdateContext, fit_columns, require_number, update_scale

# Entries of the residual below this share of the gradient's largest are rounding errors, not a direction (float32: a few ulp).
_RESIDUAL_RTOL = 1e-6
# Directions of the momentum below this share of the largest are rounding errors of the others, and count as none.
_MOMENTUM_RTOL = 1e-5


class TrackedMomentum(Rule):
    """The default: a warm-started power step on momentum plus gradient, an orthogonalized update of rank r, momentum of rank k.

    State: P (..., m, k) with orthonormal or zero columns, and R (..., n, k), with momentum M ≈ P Rᵀ: k(m + n) numbers.

    All of it is matrix products, Cholesky factors of r × r numbers and triangular solves: no device waits for the host, and
    what CPUs compute is what GPUs compute.

    Args:
        residual: Weight α of the part of the gradient outside the update's basis, spread over all directions by normalizing
            rows and columns; used only where the gradient itself is in memory. 0 turns it off.

    Raises:
        ArgumentError: `residual` is no finite number of at least 0.

    Source: power iteration with warm start as in PowerSGD (arXiv 1905.13727) and Dion (2504.05295); orthogonalized momentum as
    in Muon; residual by gradient multi-normalization (2502.06742).
    """

    name = "tracked_momentum"
    supports_sharding = True
    state_sharding: ClassVar = {"P": "rows", "R": "columns"}

    def __init__(self, *, residual: float = 0.5) -> None:
        self.residual = require_number("residual", residual)

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        *batch, m, n = shape
        rows = {"P": m, "R": n}
        return {key: torch.zeros((*batch, size, context.momentum_rank), dtype=dtype, device=device) for key, size in rows.items()}

    def resize(self, state: State, shape: torch.Size, context: UpdateContext) -> State:
        # The state's shape follows k alone; r, which follows the loss, moves nothing.
        return {key: fit_columns(value, context.momentum_rank) for key, value in state.items()}

    def momentum(self, state: State) -> tuple[Tensor, Tensor]:
        return state["P"], state["R"]

    def right_basis(
        self,
        shape: torch.Size,
        state: State,
        context: UpdateContext,
        *,
        dtype: torch.dtype,
        device: torch.device,
        covariance_matmul: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The span of the test matrix of `update`; where inputs are at hand, with one power step of theirs on its fresh columns.

        The power step is worth 0.026 nats over random columns (width 128, k 4, r 64, one seed), a random combination of the
        inputs 0.023; the whole gradient is 0.017 better (`gradlr/apps/bench/results/quality-capture.json`).
        """
        columns = context.layout.columns
        return orthonormalize(_directions(state["R"], context.rank, context, columns, covariance_matmul), axis=columns)

    def left_basis(
        self, shape: torch.Size, state: State, context: UpdateContext, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The momentum's own directions, and random ones beside them."""
        return orthonormalize(_directions(state["P"], context.rank, context, REPLICATED))

    def sketch(self, gradient: GradientOperator, state: State, context: UpdateContext) -> Sketched:
        """Two-sided, and exact for this gradient: L spans both what `update` will take as its basis and the momentum's own.

        Before there is any momentum, random directions stand for its own: further gradients of the step lie elsewhere.
        """
        known, rows, columns = state["P"], context.layout.rows, context.layout.columns
        right = self.right_basis(gradient.shape, state, context, dtype=gradient.dtype, device=gradient.device)
        image = gradient.matmul(right)
        moved = image + context.beta * (known @ columns.inner(state["R"], right))
        own = _directions(known, known.shape[-1], context, rows)
        spanning = torch.cat([moved, own], dim=-1)[..., : rows.size(known.shape[-2])]
        left = orthonormalize(spanning, axis=rows)
        return Sketched(right, image, left, gradient.rmatmul(left), layout=context.layout)

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        beta, layout = context.beta, context.layout
        rows, columns = layout.rows, layout.columns
        left, right = state["P"], state["R"]
        tiny = torch.finfo(right.dtype).tiny
        # One power step of A = G + βM from where the momentum points: B, an orthonormal basis of m rows.
        test = _directions(right, context.rank, context, columns)
        basis = orthonormalize(gradient.matmul(test) + beta * (left @ columns.inner(right, test)), axis=rows)
        # Seen from there, the gradient is z = Gᵀ B, the momentum Aᵀ B, and Nesterov's look ahead z + β Aᵀ B.
        seen, overlap = gradient.rmatmul(basis), rows.inner(left, basis)
        averaged = seen + beta * (right @ overlap)
        ahead = seen + beta * averaged
        # Gradients may be 1e30 or 1e-30: each is scaled here, once, and all that follows is of ordinary size. Where none is seen,
        # as of an expert without tokens, nothing moves, though the momentum still points somewhere.
        peaks = columns.column_peaks(torch.cat([seen, averaged, ahead], dim=-1)).unflatten(-1, (3, -1)).amax(dim=-1)
        is_moving, (_, scale, scale_ahead) = peaks[..., :1] > 0, peaks.clamp(min=tiny).split(1, dim=-1)
        direction = newton_schulz_by_gram(ahead / scale_ahead, axis=columns)
        rotation = _leading(averaged / scale, overlap, columns)
        whole = gradient.shape if layout.is_whole else layout.whole(gradient.shape)
        # An orthogonal matrix of the rank that B leaves open has √open as its norm: the residual, one of all those directions,
        # counts as much as α times that.
        length, open_directions = update_scale(whole), min(whole[-2:]) - context.rank
        update = Update(left=basis * length, right=direction * is_moving)
        if self.residual and open_directions > 0 and isinstance(gradient, Dense):
            size = self.residual * length * open_directions**0.5
            update.dense = _residual(gradient, basis, seen, size, layout)
        # A ≈ B Bᵀ A, of which the k leading directions are kept.
        return update, {"P": basis @ rotation, "R": averaged @ rotation}


def _directions(
    factor: Tensor, rank: int, context: UpdateContext, axis: Axis, covariance_matmul: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Leading columns of a factor of the momentum, Gaussian ones behind them and where it has none yet: (..., rows, rank).

    Of ordinary size; lengths do not matter, since what is made of these columns is orthonormalized.
    """
    # Below k the leading columns alone are followed: the update has that rank, and so has the momentum afterwards.
    tiny, k = torch.finfo(factor.dtype).tiny, min(rank, factor.shape[-1])
    fresh = context.gaussian((*factor.shape[:-1], rank), factor, axis=axis)
    if covariance_matmul is not None:
        fresh = normalize_columns(covariance_matmul(fresh))
    peaks = axis.column_peaks(factor)
    is_known = (peaks > _MOMENTUM_RTOL * peaks.amax(dim=-1, keepdim=True))[..., :k]
    known = torch.where(is_known, factor[..., :k] / peaks[..., :k].clamp(min=tiny), fresh[..., :k])
    return torch.cat([known, fresh[..., k:]], dim=-1)


def _leading(averaged: Tensor, overlap: Tensor, axis: Axis) -> Tensor:
    """Coordinates in the basis of the k leading directions of the momentum, (..., r, k), zeros behind the r-th.

    Two power steps on the Gram matrix of r × r numbers, from where the last step's directions lie in the basis.
    """
    k, r = overlap.shape[-2:]
    # Warm: the directions turn little from step to step, so that two power steps are enough.
    start = overlap.mT[..., :k]
    # A column that had no momentum yet starts at a unit vector.
    unit = torch.eye(r, k, dtype=start.dtype, device=start.device)
    start = torch.where(start.any(dim=-2, keepdim=True), start, unit)[..., : min(k, r)]
    products = averaged.mT @ averaged if axis.is_whole else axis.inner(averaged, averaged)
    for _ in range(2):
        start = orthonormalize(products @ start, is_scaled=True)
    return pad(start, (0, k - start.shape[-1]))


def _residual(gradient: Dense, basis: Tensor, seen: Tensor, size: float, layout: Layout) -> Tensor:
    """G − B zᵀ, spread over all directions by normalizing rows and columns, with Frobenius norm `size`."""
    # In the gradient's own buffer, which nobody needs any more: a second m × n matrix would be the largest of the update.
    rest = gradient.consume()
    before = largest_entry(rest)
    if rest.ndim == 2:
        rest.addmm_(basis, seen.mT, alpha=-1)
    else:
        rest -= basis @ seen.mT
    before, peak = layout.all_reduce_max(torch.cat([before, largest_entry(rest)], dim=-1)).split(1, dim=-1)
    spread = multi_normalize(rest, inplace=True, layout=layout, peak=peak)
    # Columns are of unit length or zero: the norm says how many are not.
    energy = layout.all_reduce_sum(torch.linalg.vector_norm(spread, dim=(-2, -1), keepdim=True) ** 2)
    return spread.mul_(torch.where((peak > _RESIDUAL_RTOL * before) & (energy > 0), size * energy.rsqrt(), 0.0))
