"""TrackedMomentum: a low-rank momentum whose basis is followed from step to step, under an update of larger rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..gradient import Dense, GradientOperator, Sketched
from ..linalg import (
    REPLICATED,
    Axis,
    Layout,
    leading_directions,
    multi_normalize,
    newton_schulz,
    newton_schulz_sharded,
    normalize_columns,
    orthonormalize,
    polar_factor,
)
from ..linalg.axes import gram, largest_in_columns
from ..linalg.normalize import largest_entry
from .base import (
    Rule,
    State,
    Update,
    UpdateContext,
    fit_columns,
    gaussian,
    require_fraction,
    require_number,
    require_positive,
    update_scale,
)

# Entries of the residual below this share of the gradient's largest are rounding errors, not a direction (float32: a few ulp).
_RESIDUAL_RTOL = 1e-6
# Directions of the momentum below this share of the largest are treated as the polar factor treats them: as null.
_MOMENTUM_RTOL = 1e-5


class TrackedMomentum(Rule):
    """The default: a warm-started power step on momentum plus gradient, an orthogonalized update of rank r, momentum of rank k.

    State: P (..., m, k) with orthonormal or zero columns, and R (..., n, k), with momentum M ≈ P Rᵀ: k(m + n) numbers.

    Args:
        residual: Weight α of the part of the gradient outside the update's basis, spread over all directions by normalizing
            rows and columns; used only where the gradient itself is in memory. 0 turns it off.
        is_weighed: Whether singular directions get Adam-like weights (mean over root mean square of the singular values)
            instead of ones; adds a state of one number per rank.
        beta2: Decay of the second moment of the singular values, with `is_weighed`.
        eps: Added to its root, with `is_weighed`.
        arithmetic: "decompose" (QR and eigenvectors: exact), "products" (matrix products, Cholesky and triangular solves
            only: fast on CUDA, never synchronizes), or "auto": products on CUDA unless `is_weighed`, decompose elsewhere.

    Raises:
        ArgumentError: an option is out of range, or `is_weighed` with `arithmetic="products"`.

    Source: power iteration with warm start as in PowerSGD (arXiv 1905.13727) and Dion (2504.05295); orthogonalized momentum as
    in Muon; residual by gradient multi-normalization (2502.06742).
    """

    name = "tracked_momentum"
    supports_sharding = True
    state_sharding: ClassVar = {"P": "rows", "R": "columns"}

    def __init__(
        self,
        *,
        residual: float = 0.5,
        is_weighed: bool = False,
        beta2: float = 0.999,
        eps: float = 1e-8,
        arithmetic: str = "auto",
    ) -> None:
        if arithmetic not in ("auto", "decompose", "products"):
            raise ArgumentError(f"arithmetic={arithmetic!r}: use 'auto', 'decompose' or 'products'")
        if is_weighed and arithmetic == "products":
            raise ArgumentError("is_weighed=True needs singular values: use arithmetic='decompose'")
        self.residual = require_number("residual", residual)
        self.is_weighed = bool(is_weighed)
        self.beta2 = require_fraction("beta2", beta2)
        self.eps = require_positive("eps", eps)
        self.arithmetic = arithmetic

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        *batch, m, n = shape
        k = context.momentum_rank
        state = {
            "P": torch.zeros((*batch, m, k), dtype=dtype, device=device),
            "R": torch.zeros((*batch, n, k), dtype=dtype, device=device),
        }
        if self.is_weighed:
            state["second_moment"] = torch.zeros((*batch, context.rank), dtype=torch.float64, device=device)
        return state

    def resize(self, state: State, shape: torch.Size, context: UpdateContext) -> State:
        # The state's shape follows k alone; r, which follows the loss, moves nothing.
        resized = {key: fit_columns(state[key], context.momentum_rank).contiguous() for key in ("P", "R")}
        return {**state, **resized}

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
        test = self._test_matrix(state, context, covariance_matmul)
        return orthonormalize(test, method=self._method(state["R"]), axis=context.layout.columns)

    def left_basis(
        self, shape: torch.Size, state: State, context: UpdateContext, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The momentum's own directions, and random ones beside them."""
        *batch, m, _ = shape
        fresh = gaussian((*batch, m, context.rank), context.generator, dtype=dtype, device=device)
        return orthonormalize(_fill(state["P"][..., : context.rank], fresh), method=self._method(fresh))

    def sketch(self, gradient: GradientOperator, state: State, context: UpdateContext) -> Sketched:
        """Two-sided, and exact for this gradient: L spans both what `update` will take as its basis and the momentum's own.

        Before there is any momentum, random directions stand for its own: further gradients of the step lie elsewhere.
        """
        method, layout = self._method(state["R"]), context.layout
        right = self.right_basis(gradient.shape, state, context, dtype=gradient.dtype, device=gradient.device)
        image = gradient @ right
        moved = image + context.beta * (state["P"] @ layout.columns.all_reduce_sum(state["R"].mT @ right))
        known = state["P"]
        like = {"dtype": known.dtype, "device": known.device, "axis": layout.rows, "batch": layout.batch}
        fresh = gaussian(tuple(known.shape), context.generator, **like)
        spanning = torch.cat([moved, _fill(known, fresh, layout.rows)], dim=-1)[..., : layout.rows.size(known.shape[-2])]
        left = orthonormalize(spanning, method=method, axis=layout.rows)
        return Sketched(right, image, left, gradient.mT @ left, layout=layout)

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        beta, method, layout = context.beta, self._method(state["R"]), context.layout
        rows, columns = layout.rows, layout.columns
        momentum_left, momentum_right = state["P"], state["R"]
        test = self._test_matrix(state, context)
        y = gradient @ test + beta * (momentum_left @ columns.all_reduce_sum(momentum_right.mT @ test))
        basis = orthonormalize(y, method=method, axis=rows)
        z = gradient.mT @ basis
        averaged = z + beta * (momentum_right @ rows.all_reduce_sum(momentum_left.mT @ basis))
        direction, second_moment = self._direction(z + beta * averaged, state, context)
        is_moving = largest_entry(z, columns) > 0
        rotation, spectrum = self._leading(averaged, basis, state, context)
        k = momentum_left.shape[-1]
        new_state = {
            "P": fit_columns(basis @ rotation[..., :k], k).contiguous(),
            "R": fit_columns(averaged @ rotation[..., :k], k).contiguous(),
            **second_moment,
        }
        scale = update_scale(layout.whole(gradient.shape))
        update = Update(left=basis * scale, right=direction * is_moving, spectrum=spectrum)
        if self.residual and isinstance(gradient, Dense):
            update.dense = self._residual(gradient, basis, z, scale, layout)
        return update, new_state

    def _method(self, like: Tensor) -> str:
        uses_products = self.arithmetic == "products" or (self.arithmetic == "auto" and like.is_cuda and not self.is_weighed)
        return "cholesky" if uses_products else "qr"

    def _test_matrix(
        self, state: State, context: UpdateContext, covariance_matmul: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        # Below k the leading columns alone are followed: the update has rank r, and so has the momentum afterwards.
        # Columns that are rounding errors of the others count as none.
        momentum_right, rank, columns = state["R"], context.rank, context.layout.columns
        lengths = largest_in_columns(momentum_right, columns)
        momentum_right = torch.where(lengths > _MOMENTUM_RTOL * lengths.amax(dim=-1, keepdim=True), momentum_right, 0.0)
        like = {"dtype": momentum_right.dtype, "device": momentum_right.device, "axis": columns, "batch": context.layout.batch}
        fresh = gaussian((*momentum_right.shape[:-1], rank), context.generator, **like)
        if covariance_matmul is not None:
            fresh = normalize_columns(covariance_matmul(fresh))
        return _fill(normalize_columns(momentum_right[..., :rank], columns), fresh, columns)

    def _direction(self, nesterov: Tensor, state: State, context: UpdateContext) -> tuple[Tensor, State]:
        axis = context.layout.columns
        if self._method(nesterov) == "cholesky":
            scaled = _unit_peak(nesterov, axis)
            return newton_schulz(scaled, dtype=scaled.dtype) if axis.is_whole else newton_schulz_sharded(scaled, axis), {}
        if not self.is_weighed:
            return polar_factor(nesterov, axis=axis), {}
        known, rank = state["second_moment"], nesterov.shape[-1]
        known = fit_columns(known, max(rank, known.shape[-1]))
        moments = known.clone()

        def weigh(values: Tensor) -> Tensor:
            # Adam's bias-corrected mean, kept as such: a direction that is new starts at its own square, so at weight 1.
            share = (1 - self.beta2) / (1 - self.beta2**context.step)
            old = known[..., :rank]
            moments[..., :rank] = torch.where(old > 0, torch.lerp(old, values**2, share), values**2)
            return values / (moments[..., :rank].sqrt() + self.eps)

        direction = polar_factor(nesterov, weights=weigh, axis=axis)
        return direction, {"second_moment": moments}

    def _leading(self, averaged: Tensor, basis: Tensor, state: State, context: UpdateContext) -> tuple[Tensor, Tensor | None]:
        rows, columns = context.layout.rows, context.layout.columns
        if self._method(averaged) == "qr":
            return leading_directions(averaged, columns)
        # Two power steps from where the last basis points; columns that had no momentum yet start at unit vectors.
        k = min(state["P"].shape[-1], basis.shape[-1])
        unit = torch.eye(basis.shape[-1], k, dtype=basis.dtype, device=basis.device).expand(*basis.shape[:-2], -1, -1)
        start = _fill(normalize_columns(rows.all_reduce_sum(basis.mT @ state["P"][..., :k])), unit)
        scaled = _unit_peak(averaged, columns)
        products = gram(scaled, columns)
        for _ in range(2):
            start = orthonormalize(products @ start, method="cholesky")
        return start, leading_directions(averaged, columns)[1] if context.needs_spectrum else None

    def _residual(self, gradient: Dense, basis: Tensor, z: Tensor, scale: float, layout: Layout) -> Tensor | None:
        open_directions = min(layout.whole(gradient.shape)[-2:]) - basis.shape[-1]
        if open_directions <= 0:
            return None
        peaks = largest_entry(gradient.matrix)
        rest = gradient.consume()
        if rest.ndim == 2:
            rest.addmm_(basis, z.mT, alpha=-1)
        else:
            rest -= basis @ z.mT
        peaks = layout.columns.all_reduce_max(layout.rows.all_reduce_max(torch.cat([peaks, largest_entry(rest)], dim=-1)))
        before, peak = peaks.split(1, dim=-1)
        is_direction = peak > _RESIDUAL_RTOL * before
        spread = multi_normalize(rest, inplace=True, layout=layout, peak=peak)
        length = self.residual * scale * _length_scale(spread, open_directions, layout)
        return spread.mul_(torch.where(is_direction, length, 0.0))


def _length_scale(spread: Tensor, open_directions: int, layout: Layout) -> Tensor:
    # Scales `spread` to the Frobenius norm of an orthonormal basis of the open directions.
    length = torch.linalg.vector_norm(spread, dim=(-2, -1), keepdim=True)
    if not layout.is_whole:
        length = layout.columns.all_reduce_sum(layout.rows.all_reduce_sum(length**2)).sqrt()
    return torch.where(length > 0, open_directions**0.5 / length, 0.0)


def _unit_peak(x: Tensor, axis: Axis) -> Tensor:
    # The constants of Newton–Schulz and of the shifts suppose entries of ordinary size.
    return x / largest_entry(x, axis).clamp(min=torch.finfo(x.dtype).tiny)


def _fill(columns: Tensor, fresh: Tensor, axis: Axis = REPLICATED) -> Tensor:
    # Fresh columns behind the given ones, and in place of those that are zero: momentum that does not exist yet.
    k = columns.shape[-1]
    is_known = largest_in_columns(columns, axis) > 0
    return torch.cat([torch.where(is_known, columns, fresh[..., :k]), fresh[..., k:]], dim=-1)
