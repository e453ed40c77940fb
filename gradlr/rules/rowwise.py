"""RowwiseRMSprop, for embeddings and output heads: tables with one row per token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

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
        correction = 1 - self.beta2**context.step

        def moments(energies: Tensor, before: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor]:
            square = torch.lerp(energies / columns, before, self.beta2, out=square)
            return square, (square / correction).sqrt_().add_(self.eps).reciprocal_()

        on_demand = None if torch.compiler.is_compiling() else gradient.rows_on_demand()  # a graph returns tensors
        if on_demand is None:
            square, scale = moments(gradient.row_energies(), state["square"])
            # Where the squares of a row are finite, so is the row.
            return Update(**gradient.scaled_rows(scale), check=square.sum()), {"square": square}
        # A row is made once: as it is written, it is measured, and its second moment and scale are kept.
        (made, bound), square, scale = on_demand, torch.empty_like(state["square"]), torch.empty_like(state["square"])

        def measured(rows: slice, block: Tensor) -> Tensor:
            energies = torch.linalg.vector_norm(block, dim=-1, keepdim=True) ** 2
            _, scale[rows] = moments(energies, state["square"][rows], square[rows])
            return block

        return Update(dense=made.mapped(measured), dense_rows=scale, check=bound), {"square": square}
