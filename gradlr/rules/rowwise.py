"""RowwiseRMSprop, for embeddings and output heads: tables with one row per token."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..errors import ShapeError
from ..gradient import GradientOperator
from .base import Rule, State, Update, UpdateContext, require_fraction, require_positive


class RowwiseRMSprop(Rule):
    """One second moment per row, no momentum. State: m numbers instead of Adam's 2mn.

    `v_i ← β₂ v_i + (1 − β₂) mean_j G_ij²`, bias-corrected; update `G_ij / (√v_i + ε)`.

    Args:
        beta2: Decay of the second moment.
        eps: Added to its root.

    Raises:
        ArgumentError: an option is out of range.
        ShapeError: (in `init`) the parameter is no matrix.

    Source: RMSprop with the row-wise second moment of row-wise AdaGrad, arXiv 1906.00091, section 3.2.
    """

    name = "rowwise_rmsprop"
    is_elementwise = True
    has_rank = False
    accepts_row_factors = True
    carries_nonfinite = True
    supports_sharding = True
    state_sharding: ClassVar = {"square": "rows"}

    def __init__(self, *, beta2: float = 0.99, eps: float = 1e-8) -> None:
        self.beta2 = require_fraction("beta2", beta2)
        self.eps = require_positive("eps", eps)

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        if len(shape) < 2:
            raise ShapeError(f"rowwise_rmsprop needs a table (rows, columns); the parameter has shape {tuple(shape)}")
        return {"square": torch.zeros((*shape[:-1], 1), dtype=dtype, device=device)}

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        columns = context.layout.columns.size(gradient.shape[-1])
        # A row that was not looked up has a gradient of zero, which counts: one correction by the step holds for all rows.
        square = torch.lerp(gradient.row_energies() / columns, state["square"], self.beta2)
        root = (square / (1 - self.beta2**context.step)).sqrt_().add_(self.eps)
        # Where the squares of a row are finite, so is the row.
        return Update(**gradient.scaled_rows(root.reciprocal_()), check=square.sum()), {"square": square}
