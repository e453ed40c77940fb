"""FactorMoments: the source notebook's rule, to the letter: Adam on singular values, orthogonalized means of singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient import GradientOperator
from ..linalg import newton_schulz, svd_lowrank
from .base import (
    Rule,
    State,
    Update,
    UpdateContext,
    fit_columns,
    require_fraction,
    require_number,
    require_positive,
    update_scale,
)


class FactorMoments(Rule):
    """Moments of the three factors of a randomized SVD of the gradient (the notebook's ARG: adaptive-rank gradient).

    `U, S, V = svd_lowrank(G, r)`; Adam's moments of S, running means of U and V, five Newton–Schulz steps on each mean;
    `W ← W − η · scale · O(m_U) diag(ŝ) O(m_V)ᵀ`. State: r(m + n) + 2r numbers.

    Singular vectors come with arbitrary signs and, where singular values are close, arbitrary rotations, so that their running
    means cancel: measured, this rule is behind `LowRankPolar`. `is_adjusted` is the correction that the notebook sets aside.

    Args:
        beta2: Decay of the second moment of S.
        eps: Added to its root.
        scale: Factor on the update; None for 2 √(mn / r), which makes `lr` AdamW's; 1.0 is the notebook's.
        is_adjusted: Whether moments are carried into the new singular basis before they are averaged: for the change of
            direction by the one rotation Q = polar(m_Uᵀ U + m_Vᵀ V), m_U ← m_U Q, m_V ← m_V Q; for the change of
            magnitude by m_S ← (Q∘Q)ᵀ m_S, v_S ← (Q∘Q)ᵀ v_S.
        newton_schulz_dtype: Arithmetic of the Newton–Schulz steps; bfloat16 is the notebook's.

    Raises:
        ArgumentError: an option is out of range.
    """

    name = "factor_moments"

    def __init__(
        self,
        *,
        beta2: float = 0.999,
        eps: float = 1e-8,
        scale: float | None = None,
        is_adjusted: bool = False,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.beta2 = require_fraction("beta2", beta2)
        self.eps = require_positive("eps", eps)
        self.scale = None if scale is None else require_number("scale", scale)
        self.is_adjusted = bool(is_adjusted)
        self.newton_schulz_dtype = newton_schulz_dtype

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        *batch, m, n = shape
        sizes = {"U": (m, context.rank), "V": (n, context.rank), "S": (context.rank,), "S2": (context.rank,)}
        return {key: torch.zeros((*batch, *size), dtype=dtype, device=device) for key, size in sizes.items()}

    def columns_shape(self, shape: torch.Size, rank: int) -> tuple[int, ...]:
        return min(shape[-2:]), rank

    def resize(self, state: State, shape: torch.Size, context: UpdateContext) -> State:
        return {key: fit_columns(value, context.rank) for key, value in state.items()}

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        beta, step = context.beta, context.step
        u, s, v = svd_lowrank(gradient, context.rank, generator=context.generator, columns=context.columns)
        if state["S"].shape[-1] != context.rank:
            state = self.resize(state, gradient.shape, context)
        if self.is_adjusted:
            state = _carry_over(state, u, v)
        new_state = {key: torch.lerp(now, state[key], beta) for key, now in (("U", u), ("V", v), ("S", s))}
        new_state["S2"] = torch.lerp(s**2, state["S2"], self.beta2)
        mean = new_state["S"] / (1 - beta**step)
        root_mean_square = (new_state["S2"] / (1 - self.beta2**step)).sqrt()
        weights = mean / (root_mean_square + self.eps)
        # Means of orthonormal columns are shorter than one, and not orthogonal any more.
        left, right = (newton_schulz(new_state[key], dtype=self.newton_schulz_dtype).to(s.dtype) for key in ("U", "V"))
        scale = update_scale(gradient.shape, context.rank) if self.scale is None else self.scale
        return Update(left=left * weights.unsqueeze(-2) * scale, right=right), new_state


def _carry_over(state: State, u: Tensor, v: Tensor) -> State:
    # The nearest orthogonal matrix, by a full SVD of r × r numbers: directions without momentum are rotated somehow, not lost.
    left, _, right = torch.linalg.svd(state["U"].mT @ u + state["V"].mT @ v)
    rotation = left @ right
    # Squared entries of a column are the shares that the old directions have in a new one: they sum to one.
    shares = (rotation**2).mT
    magnitudes = {key: (shares @ state[key].unsqueeze(-1)).squeeze(-1) for key in ("S", "S2")}
    return {"U": state["U"] @ rotation, "V": state["V"] @ rotation, **magnitudes}
