"""LowRankPolar: the polar factor of the gradient's leading directions, the rest of it normalized, momentum where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..gradient import Dense, GradientOperator, Sketched
from ..linalg import Axis, Layout, normalize_columns, orthonormalize
from ..linalg.normalize import frobenius_norm, spread_scales
from ..linalg.polar import newton_schulz_by_gram
from ..linalg.token_space import normalization_is_cheaper, token_energy, token_scales
from ..tensors import device_traits
from .base import Rule, State, Update, UpdateContext, fit_columns, require_number, update_scale

# A residual shorter than this share of what the basis sees is rounding errors, not a direction: where the gradient has fewer
# directions than r, as of a batch of 16 in the last layer, 2.2e-5 and 1.0e-13 were the largest of 60 random cases.
# Half precision has rounded the gradient before anything is found in it: to 2^-9 and 2^-12 of an entry.
_RESIDUAL_RTOL = {torch.float32: 5e-5, torch.float64: 5e-13, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# Directions of the momentum below this share of the largest are rounding errors of the others, and count as none.
_MOMENTUM_RTOL = 1e-5


class LowRankPolar(Rule):
    """The default: a randomized power step finds r directions of the gradient, whose polar factor is the update; no state.

    `B = orth(G Ω)` with random columns Ω, `Z = Gᵀ B`, and the direction is `B polar(Z)ᵀ` plus the rest of the gradient, spread
    over all other directions. With a momentum rank k > 0 a momentum M ≈ P Rᵀ of rank k is kept and followed from step to step:
    the power step is one on `G + β M` and starts where M points, and the direction looks ahead as Nesterov's does. State then:
    P (..., m, k) with orthonormal or zero columns, and R (..., n, k): k(m + n) numbers.

    All of it is matrix products, Cholesky factors of r × r numbers and triangular solves: no device waits for the host, and
    what CPUs compute is what GPUs compute.

    Args:
        residual: Weight α of the part of the gradient outside the update's basis, spread over all directions by normalizing
            rows and columns; used where the gradient itself is known, and not only a sketch of it. Under adaptor capture it is
            found in token space where a step has few tokens; else the gradient is formed, a layer at a time. 0 turns it off.

    Raises:
        ArgumentError: `residual` is no finite number of at least 0.

    Source: randomized range finder, Halko, Martinsson, Tropp 2011 (arXiv 0909.4061); orthogonalized updates as in Muon; residual
    by gradient multi-normalization (arXiv 2502.06742); momentum by power iteration with warm start as in PowerSGD (1905.13727)
    and Dion (2504.05295).
    """

    name = "low_rank_polar"
    carries_nonfinite = True
    is_batched = True
    pads_rank = True
    supports_sharding = True
    state_sharding: ClassVar = {"P": "rows", "R": "columns"}
    optional_state: ClassVar = frozenset({"P", "R"})

    def __init__(self, *, residual: float = 0.5) -> None:
        self.residual = require_number("residual", residual)

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        *batch, m, n = shape
        k, rows = context.momentum_rank, {"P": m, "R": n}
        return {key: torch.zeros((*batch, size, k), dtype=dtype, device=device) for key, size in rows.items()} if k else {}

    def resize(self, state: State, shape: torch.Size, context: UpdateContext) -> State:
        # The state's shape follows k alone; r, which follows the loss, moves nothing.
        return {key: fit_columns(value, context.momentum_rank) for key, value in state.items()}

    def momentum(self, state: State) -> tuple[Tensor, Tensor] | None:
        return (state["P"], state["R"]) if state else None

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
        like, columns = torch.empty((*shape[:-2], shape[-1], 0), dtype=dtype, device=device), context.layout.columns
        directions = _directions(state.get("R", like), context.rank, context, columns, covariance_matmul)
        return orthonormalize(directions, axis=columns, is_scaled=True)

    def sketch(self, gradient: GradientOperator, state: State, context: UpdateContext) -> Sketched:
        """Two-sided, and exact for this gradient: L spans both what `update` will take as its basis and the momentum's own.

        Before there is any momentum, random directions stand for its own: further gradients of the step lie elsewhere.
        """
        rows, columns = context.layout.rows, context.layout.columns
        right = self.right_basis(gradient.shape, state, context, dtype=gradient.dtype, device=gradient.device)
        spanning = image = gradient.matmul(right)
        if state:
            known = state["P"]
            moved = image + context.beta * (known @ columns.inner(state["R"], right))
            own = _directions(known, known.shape[-1], context, rows)
            spanning = torch.cat([moved, own], dim=-1)[..., : rows.size(known.shape[-2])]
        left = orthonormalize(spanning, axis=rows)
        left_sketch = gradient.rmatmul(left)
        return Sketched(right, image, left, left_sketch, left_spans=not state, layout=context.layout)

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        layout, rows, columns = context.layout, context.layout.rows, context.layout.columns
        whole = gradient.shape if layout.is_whole else layout.whole(gradient.shape)
        known: Dense | tuple[Tensor, Tensor] | None = None  # what a residual can be made of, where there is to be one
        if self.residual > 0 and context.rank < min(whole[-2:]) and not isinstance(gradient, Sketched):
            if isinstance(gradient, Dense):
                known = gradient
            # Where kernels read a matrix, launches cost more than it does: a gradient in token space is some 190 of them.
            elif not device_traits(gradient.device).has_kernels:
                known = gradient.tokens_where(normalization_is_cheaper)
            if known is None:
                # The rest would need it anyway, of this layer alone and for as long as its update takes.
                gradient = known = gradient.formed()
        basis, operand, seen = self._power_step(gradient, state, context)
        target = seen
        if state:
            # Seen from there, the momentum is Aᵀ B, and Nesterov's look ahead z + β Aᵀ B.
            overlap = rows.inner(state["P"], basis)
            averaged = seen + context.beta * (state["R"] @ overlap)
            target = seen + context.beta * averaged
        rank = context.rank if context.active is None else context.active
        length = update_scale(whole, rank, 0.0 if known is None else self.residual)
        direction, norm, check = newton_schulz_by_gram(target, axis=columns, size=length)
        update, new_state = Update(left=basis, right=direction, check=check), {}
        if state:
            # A ≈ B Bᵀ A, of which the k leading directions are kept.
            rotation = _leading(averaged / frobenius_norm(averaged, columns), overlap, columns)
            new_state = {"P": basis @ rotation, "R": averaged @ rotation}
            # Where none of the gradient is seen, as of an expert without tokens, nothing moves, though the momentum may still
            # point somewhere.
            norm = frobenius_norm(seen, columns)
            update.right = direction * (norm > torch.finfo(norm.dtype).tiny)
            update.check = torch.cat([check.flatten(), rotation.flatten()])
        if known is not None:
            # An orthogonal matrix of the rank that B leaves open has √open as its norm: the residual, one of all those, counts
            # as much as α times that.
            size = self.residual * length * (min(whole[-2:]) - rank) ** 0.5
            update = _with_residual(update, known, operand, seen, norm, size, layout)
        return update, new_state

    def _power_step(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Tensor, Tensor, Tensor]:
        """B, orthonormal columns of m rows; the same as an operand of the gradient's products; and Gᵀ B.

        From random directions, or from where the momentum points.
        """
        rows, columns = context.layout.rows, context.layout.columns
        if isinstance(gradient, Sketched) and gradient.left_spans and gradient.left is not None and not state:
            basis, seen = gradient.left, gradient.left_sketch
            if seen is not None and basis.shape[-1] == context.rank:
                return basis, basis, seen
        dtype, (*batch, m, n) = gradient.operand_dtype or gradient.dtype, gradient.shape
        if context.rank == m and context.active is None and context.layout.is_whole and not state:
            # Where there are no more directions than r, every orthonormal basis of them makes the same update.
            basis = torch.eye(m, dtype=gradient.dtype, device=gradient.device).expand(*batch, m, m)
            operand = basis.to(dtype)
            return basis, operand, gradient.rmatmul(operand)
        like = torch.empty((*batch, n, 0), dtype=dtype, device=gradient.device)
        test = _directions(state.get("R", like), context.rank, context, columns)
        image = gradient.matmul(test)
        if state:
            image += context.beta * (state["P"] @ columns.inner(state["R"], test))
        basis = orthonormalize(image, axis=rows)
        operand = basis.to(dtype)
        return basis, operand, gradient.rmatmul(operand)


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
    if not k:
        return fresh
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


def _with_residual(
    update: Update,
    known: Dense | tuple[Tensor, Tensor],
    basis: Tensor,
    seen: Tensor,
    norm: Tensor,
    size: float | Tensor,
    layout: Layout,
) -> Update:
    """The update, and G − B zᵀ spread over all directions by normalizing rows and columns, with Frobenius norm `size`.

    Known is G itself, or δ and x of G = δᵀ x; the norm is that of z.
    """
    if isinstance(known, Dense):
        # In the gradient's own buffer, which nobody needs any more: a second m × n matrix would be the largest of the update.
        rest: Tensor = known.consume()
        right = seen.to(rest.dtype).mT
        update.dense = rest.addmm_(basis, right, alpha=-1) if rest.ndim == 2 else rest.sub_(basis @ right)
        threshold = _RESIDUAL_RTOL[known.rounding] ** 2
        update.dense_rows, update.dense_columns = spread_scales(rest, norm, size, threshold, layout)
        return update
    delta, x = known
    basis = basis.to(delta.dtype)
    # Off the basis, token by token: the rest is an outer product as well, and neither it nor the gradient is ever formed.
    delta = delta - (delta @ basis) @ basis.mT
    rows, columns = token_scales(delta, x)
    # The rest is measured against what the basis sees, as above, both in units of ordinary size.
    x_peak = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    energy = token_energy(delta * (x_peak / norm), x / x_peak)
    is_there = energy > _RESIDUAL_RTOL[x.dtype] ** 2
    factor = torch.where(is_there, size * (columns > 0).sum().clamp(min=1).to(x.dtype).rsqrt(), 0.0)
    known_left, known_right = update.left, update.right
    if isinstance(known_left, Tensor) and known_right is not None:
        update.left = torch.cat([known_left, delta.mT * (rows * factor)], dim=-1)
        del delta
        update.right = torch.cat([known_right, (x * columns.mT).mT], dim=-1)
    return update
