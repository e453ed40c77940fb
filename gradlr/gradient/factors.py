"""Gradients known by what they are made of: output gradient and input of a linear map, or a few rows of a table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layers import LayerOp, LinearOp
from ..linalg import UNSHARDED
from ..linalg.blocks import pieces
from ..linalg.normalize import squared_norm, widen
from ..linalg.products import as_operand, wide_matmul
from ..tensors import is_async, like_the_model, widest
from .operator import Dense, GradientOperator, all_entries_finite
from .rows_on_demand import RowsOnDemand

# Rows of G that exist at one time where their lengths are wanted: 16 MiB in float32.
_BLOCK_NUMBERS = 2**22


class OuterProduct(GradientOperator):
    """The gradient of a linear map's weight, known by output gradient and input; `G = δᵀ x` for a Linear.

    bfloat16 is multiplied as it is where that is faster. Other half precision is widened product by product, so that no wide copy
    of an activation stays.

    Args:
        delta: Output gradient δ, shape (..., m) for a Linear, (batch, m, ...) for a convolution, floating.
        x: Input, shape (..., n) for a Linear, (batch, channels, ...) for a convolution, floating.
        layer_op: How they make G.
    """

    def __init__(self, delta: Tensor, x: Tensor, layer_op: LayerOp | None = None) -> None:
        self._delta, self._x, self._op = delta, x, layer_op or LinearOp()
        self._takes = as_operand if isinstance(self._op, LinearOp) and delta.dtype == x.dtype else widen
        self.shape = torch.Size(self._op.sizes(delta, x))
        is_double = torch.float64 in (delta.dtype, x.dtype)
        self.dtype, self.device = torch.float64 if is_double else torch.float32, delta.device
        if delta.dtype == torch.bfloat16:
            self.operand_dtype = self._operands()[0].dtype

    def matmul(self, x: Tensor) -> Tensor:
        # The input's patches times r columns first: G itself, m × n, is never made.
        delta, known = self._operands()
        projected = self._op.project(known, x.to(known.dtype))
        return self._op.weight_grad_matmul(delta, projected)

    def rmatmul(self, y: Tensor) -> Tensor:
        delta, known = self._operands()
        return self._op.rmatmul(delta, known, y.to(delta.dtype))

    def formed(self) -> Dense:
        with like_the_model():
            return Dense(self._op.gradient(*self._operands()), is_owned=True, layout=UNSHARDED)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """δ and x of a Linear that stores (fan_out, fan_in), from which the same operator can be made; None of other layers."""
        return (self._delta, self._x) if self._op == LinearOp() else None

    def _operands(self) -> tuple[Tensor, Tensor]:
        """δ and x as the products take them, in one dtype."""
        return self._takes(self._delta), self._takes(self._x)

    def is_finite(self) -> Tensor:
        return all_entries_finite(self._delta) & all_entries_finite(self._x)

    @property
    def matrix(self) -> Tensor:
        """G itself, (m, n)."""
        return self._op.gradient(widen(self._delta), widen(self._x))

    def squared_norm(self) -> Tensor:
        # A Linear's rows can be made a block at a time; a convolution's gradient comes whole.
        if isinstance(self._op, LinearOp):
            return widest(self.row_energies()).sum()
        return squared_norm(self.matrix)

    def row_energies(self) -> Tensor:
        """Squared lengths of the rows, (m, 1), of a Linear's gradient: a block of rows at a time, each made and dropped."""
        (delta, x), takes = self._tokens(), self._takes
        x = takes(x)
        rows = (wide_matmul(takes(delta[:, piece]).mT, x) for piece in pieces(self.shape[0], self.shape[1], _BLOCK_NUMBERS))
        return torch.cat([torch.linalg.vector_norm(block, dim=-1, keepdim=True) for block in rows]) ** 2

    def rows_on_demand(self) -> tuple[RowsOnDemand, Tensor] | None:
        if not isinstance(self._op, LinearOp):
            return None
        (delta, x), takes = self._tokens(), self._takes
        bound = (squared_norm(delta) * squared_norm(x)).to(self.dtype)
        x = takes(x)

        def make(rows: slice) -> Tensor:
            with like_the_model():
                return wide_matmul(takes(delta[:, rows]).mT, x)

        return RowsOnDemand(make, self.shape), bound

    def tokens_where(self, is_cheaper: Callable[[int, int, int], bool]) -> tuple[Tensor, Tensor] | None:
        # Asked of the sizes first: in half precision the tokens are copied.
        count = self._delta.numel() // self._delta.shape[-1]
        if not isinstance(self._op, LinearOp) or not count or not is_cheaper(count, *self.shape):
            return None
        delta, x = self._tokens()
        return widen(delta), widen(x)

    def scaled_rows(self, scale: Tensor) -> dict[str, Tensor]:
        """The two factors of a Linear's gradient, bfloat16 where products take it, and the scale."""
        delta, x = self._tokens()
        return {"left": delta.mT, "right": self._takes(x).mT, "row_scale": scale}

    def _tokens(self) -> tuple[Tensor, Tensor]:
        return self._delta.reshape(-1, self._delta.shape[-1]), self._x.reshape(-1, self._x.shape[-1])


class RowSparse(GradientOperator):
    """A gradient of which only some rows are not zero: that of an embedding.

    Args:
        rows: Row numbers, shape (t,), int64. Each once, but for the first, which may come again with zeros: so that its length
            is known without asking the device.
        values: Those rows, shape (t, n), floating.
        count: Number m of all rows.
    """

    def __init__(self, rows: Tensor, values: Tensor, count: int) -> None:
        self.rows, self.values = rows, widen(values)
        self.shape = torch.Size((count, values.shape[-1]))
        self.dtype, self.device = self.values.dtype, values.device

    @classmethod
    def summed(cls, rows: Tensor, values: Tensor, count: int) -> RowSparse:
        """The same, where rows may come several times: theirs are added up.

        Only as many rows are kept as differ; on an asynchronous device as many as came, since asking for their number would wait.
        """
        if not rows.numel():
            return cls(rows, values, count)
        # Sorted, so that equal rows lie side by side; stable, so that their sums do not depend on the sort.
        order = rows.argsort(stable=True)
        ordered = rows[order]
        is_first = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
        places = is_first.cumsum(0) - 1
        kept = min(int(places[-1]) + 1, count) if not is_async(rows) else len(rows)
        wide = widen(values)
        total = wide.new_zeros((kept, values.shape[-1])).index_add_(0, places, wide[order])
        # Unused places keep the first row's number, with zeros.
        return cls(ordered[:1].repeat(kept).index_copy_(0, places, ordered), total, count)

    def matmul(self, x: Tensor) -> Tensor:
        # Added, not set, here and below: the first row may come again with zeros.
        return x.new_zeros((self.shape[0], x.shape[-1])).index_add_(0, self.rows, self.values @ x)

    def rmatmul(self, y: Tensor) -> Tensor:
        return self.values.mT @ y[self.rows]

    def is_finite(self) -> Tensor:
        return all_entries_finite(self.values)

    @property
    def matrix(self) -> Tensor:
        """G itself, (m, n)."""
        return self.values.new_zeros(self.shape).index_add_(0, self.rows, self.values)

    def squared_norm(self) -> Tensor:
        return squared_norm(self.values)

    def scaled(self, factor: Tensor) -> RowSparse:
        return RowSparse(self.rows, self.values * factor, self.shape[0])

    def row_energies(self) -> Tensor:
        lengths = torch.linalg.vector_norm(self.values, dim=-1, keepdim=True)
        return self.values.new_zeros((self.shape[0], 1)).index_add_(0, self.rows, lengths**2)

    def scaled_rows(self, scale: Tensor) -> dict[str, Tensor]:
        """Row numbers and values."""
        return {"rows": self.rows, "dense": self.values * scale[self.rows]}

    def add_(self, gradient: GradientOperator) -> GradientOperator:
        """Add another gradient: rows where both are rows, the whole matrix otherwise."""
        if not isinstance(gradient, RowSparse) or len(self.rows) + len(gradient.rows) > self.shape[0]:
            return Dense(self.matrix, is_owned=True).add_(gradient)
        rows, values = torch.cat([self.rows, gradient.rows]), torch.cat([self.values, gradient.values])
        return RowSparse.summed(rows, values, self.shape[0])
