"""The gradient of an output head under cross-entropy, of which no part has the size tokens x vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linalg.blocks import pieces
from ..linalg.normalize import squared_norm, widen
from ..linalg.products import as_operand, wide_matmul
from ..tensors import like_the_model, widest
from .operator import GradientOperator, all_entries_finite
from .rows_on_demand import RowsOnDemand

# Logits that exist at one time: 8 MiB in float32.
_BLOCK_NUMBERS = 2**21


class Logits:
    """`x Wᵀ + b` of T tokens, of which a block of the vocabulary exists at one time; float32 or wider.

    Args:
        x: Hidden states, (T, d), floating. Half precision is multiplied as it is where that is faster, and summed in float32.
        weight: W, (V, d), floating.
        bias: b, (V,), or None.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self._dtype, self._weight, self._bias = as_operand(x), x.dtype, weight, bias
        self.shape = torch.Size((len(x), len(weight)))

    def blocks(self) -> Iterator[slice]:
        """The vocabulary, in pieces."""
        tokens, count = self.shape
        return pieces(count, tokens, _BLOCK_NUMBERS)

    def weight(self, rows: slice) -> Tensor:
        """Rows of W as an operand."""
        return as_operand(self._weight[rows].to(self._dtype))

    def block(self, rows: slice) -> Tensor:
        """The logits of these rows, (T, rows), a new tensor."""
        product = wide_matmul(self.x, self.weight(rows).mT)
        return product if self._bias is None else product.add_(self._bias[rows])

    def log_sums(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log Σ exp of each token's logits, (T,), and the logit of its label; NaN where the label is no row of W."""
        total = widen(self.x.new_full((self.shape[0],), -torch.inf))
        own = torch.full_like(total, torch.nan)
        for rows in self.blocks():
            block = self.block(rows)
            places, is_here = _places(labels, rows)
            own = torch.where(is_here, block.gather(1, places).squeeze(1), own)
            total = torch.logaddexp(total, block.logsumexp(1))
        return total, own


def _places(labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Where in a block of rows the labels lie, (T, 1), and whether they do, (T,)."""
    places = labels - rows.start
    return places.clamp(0, rows.stop - rows.start - 1).unsqueeze(1), (labels >= rows.start) & (labels < rows.stop)


class HeadGradient(GradientOperator):
    """`G = δᵀ x` with `δ = (softmax(logits) − onehot) · scale`, made anew for a block of the vocabulary wherever it is asked for.

    Args:
        logits: Of the head.
        labels: (T,), int64; others than 0 ... V − 1 are no row.
        log_sums: (T,), as `Logits.log_sums` gives them.
        scale: (T,): derivative of the loss by each token's own; 0 where a token does not count.
    """

    def __init__(self, logits: Logits, labels: Tensor, log_sums: Tensor, scale: Tensor) -> None:
        self._logits, self._labels, self._log_sums, self._scale = logits, labels, log_sums, scale
        self.shape = torch.Size((logits.shape[1], logits.x.shape[1]))
        self.dtype, self.device = log_sums.dtype, log_sums.device
        self.operand_dtype = logits.x.dtype

    def delta(self, rows: slice) -> Tensor:
        """δ of a block of the vocabulary, (T, rows), a new tensor."""
        delta = self._logits.block(rows).sub_(self._log_sums.unsqueeze(1)).exp_()
        places, is_here = _places(self._labels, rows)
        delta.scatter_add_(1, places, -is_here.to(delta.dtype).unsqueeze(1))
        return delta.mul_(self._scale.unsqueeze(1))

    def others(self, *, needs_x: bool, needs_bias: bool, form: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """δ W, (T, d), and the sum of δ over tokens, (V,), float32 or wider, where they are needed, in one pass over δ.

        Args:
            needs_x, needs_bias: Which of the two.
            form: Where G is to be written on the way, (V, d), any floating dtype.
        """
        x_gradient = torch.zeros(self._logits.x.shape, dtype=self.dtype, device=self.device) if needs_x else None
        sums = []
        for rows in self._logits.blocks():
            delta = self.delta(rows)
            if x_gradient is not None:
                self._add_input_gradient(x_gradient, delta, rows)
            if needs_bias:
                sums.append(delta.sum(0))
            if form is not None:
                form[rows] = wide_matmul(delta.mT, self._logits.x)
        return x_gradient, torch.cat(sums) if needs_bias else None

    def _add_input_gradient(self, total: Tensor, delta: Tensor, rows: slice) -> None:
        weight = self._logits.weight(rows)
        if weight.dtype == total.dtype:
            total.addmm_(delta, weight)
        else:
            total += wide_matmul(delta, weight)

    @property
    def matrix(self) -> Tensor:
        """G itself, (V, d)."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.others(needs_x=False, needs_bias=False, form=matrix)
        return matrix

    def matmul(self, x: Tensor) -> Tensor:
        projected = wide_matmul(self._logits.x, x.to(self._logits.x.dtype))
        return torch.cat([wide_matmul(self.delta(rows).mT, projected) for rows in self._logits.blocks()])

    def rmatmul(self, y: Tensor) -> Tensor:
        known = torch.zeros((self._logits.shape[0], y.shape[-1]), dtype=self.dtype, device=self.device)
        for rows in self._logits.blocks():
            known += wide_matmul(self.delta(rows), y[rows])
        return wide_matmul(self._logits.x.mT, known)

    def _rows(self, rows: slice) -> Tensor:
        with like_the_model():
            return wide_matmul(self.delta(rows).mT, self._logits.x)

    def rows_on_demand(self) -> tuple[RowsOnDemand, Tensor]:
        # A row of softmax less one of the unit matrix is no longer than √2.
        bound = (2 * squared_norm(self._scale) * squared_norm(self._logits.x)).to(self.dtype)
        rows = RowsOnDemand(self._rows, self.shape, max(self._logits.x.shape))
        return rows, torch.where(self.is_finite(), bound, torch.nan)

    def is_finite(self) -> Tensor:
        # What is not finite in W or b shows in the sums.
        return all_entries_finite(self._logits.x) & all_entries_finite(self._log_sums) & all_entries_finite(self._scale)

    def row_energies(self) -> Tensor:
        lengths = [torch.linalg.vector_norm(self._rows(rows), dim=-1, keepdim=True) for rows in self._logits.blocks()]
        return torch.cat(lengths) ** 2

    def squared_norm(self) -> Tensor:
        return widest(self.row_energies()).sum()

    def scaled(self, factor: Tensor) -> HeadGradient:
        return HeadGradient(self._logits, self._labels, self._log_sums, self._scale * factor)

    def scaled_rows(self, scale: Tensor) -> dict[str, Any]:
        """The left factor on demand, the right one, and the scale."""
        left = RowsOnDemand(lambda rows: self.delta(rows).mT, (self.shape[0], len(self._labels)))
        return {"left": left, "right": widen(self._logits.x).mT, "row_scale": scale}
