"""Polar: the polar factor of the whole gradient, Muon without momentum; no state."""

from __future__ import annotations

import torch

from ..gradient import GradientOperator
from ..linalg.polar import newton_schulz_by_gram
from ..linalg.token_space import polar_is_cheaper, token_polar
from .base import Rule, State, Update, UpdateContext, update_scale


class Polar(Rule):
    """All singular values of the gradient set to one, by five Newton–Schulz steps on its smaller Gram matrix.

    It keeps nothing, and rank and momentum do nothing for it. The work is about 30 d² max(m, n) with d = min(m, n), many times
    the product that makes the gradient; under adaptor capture, with fewer tokens than about 0.8 d, it is done on T × T
    coefficients instead, and the gradient never exists.

    Source: Muon (Jordan et al. 2024), without its momentum; on the Gram matrix as in Dao-AILab's gram-newton-schulz.
    """

    name = "polar"
    has_rank = False
    carries_nonfinite = True

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        *_, m, n = gradient.shape
        size = update_scale(gradient.shape, min(m, n))
        if tokens := gradient.tokens_where(polar_is_cheaper):
            delta, x = tokens
            return Update(left=delta.mT, right=token_polar(delta, x).mT * size), {}
        matrix = gradient.matrix
        tall = matrix if m >= n else matrix.mT
        factor, _, check = newton_schulz_by_gram(tall, size=size)
        return Update(dense=factor if m >= n else factor.mT, check=check), {}
