"""To a rule, a gradient is a linear operator: `G @ X` and `G.mT @ Y`. Dense and sketched gradients, one interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from ..linalg import UNSHARDED, Layout
from ..linalg.normalize import squared_norm
from ..linalg.products import as_operand, wide_matmul
from ..tensors import is_async, widest
from .rows_on_demand import RowsOnDemand


class GradientOperator:
    """A gradient G of shape (..., m, n), known through its products: `operator @ X` and `operator.mT @ Y`, as of tensors.

    Subclasses set `shape`, `dtype` (float32 or wider) and `device`, and implement `matmul`, `rmatmul` and `is_finite`.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    # In which dtype the products take their other factor as it is; `dtype` where None.
    operand_dtype: torch.dtype | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """`G x`: (..., n, r) → (..., m, r)."""
        raise NotImplementedError

    def rmatmul(self, y: Tensor) -> Tensor:
        """`Gᵀ y`: (..., m, r) → (..., n, r)."""
        raise NotImplementedError

    def is_finite(self) -> Tensor:
        """0-dim boolean on its device: whether nothing known of G is NaN or infinite, without synchronizing."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of the operator, summed over a batch, 0-dim float64; of a block its share in the whole's."""
        return squared_norm(self.matrix)

    def scaled(self, factor: Tensor) -> GradientOperator:
        """The operator times a 0-dim factor; this one is spent afterwards."""
        raise NotImplementedError

    def add_(self, gradient: GradientOperator) -> GradientOperator:
        """The sum with another gradient, in this one's form where it can be; both are spent afterwards."""
        raise NotImplementedError

    def tokens_where(self, is_cheaper: Callable[[int, int, int], bool]) -> tuple[Tensor, Tensor] | None:
        """δ (T, m) and x (T, n), float32 or wider, of a G = δᵀ x never formed, where `is_cheaper(T, m, n)`; else None."""
        return None

    def row_energies(self) -> Tensor:
        """Squared lengths of the rows, (..., m, 1)."""
        return torch.linalg.vector_norm(self.matrix, dim=-1, keepdim=True) ** 2

    def scaled_rows(self, scale: Tensor) -> dict[str, Tensor]:
        """`diag(scale) G` as the parts of an update; the operator is spent afterwards. `scale`: (..., m, 1)."""
        return {"dense": self.matrix * scale}

    def rows_on_demand(self) -> tuple[RowsOnDemand, Tensor] | None:
        """G, of which a few rows exist at one time, and a 0-dim number of its dtype that no row's squared length exceeds.

        None where the rows are there already, or cannot be made one by one.
        """
        return None

    def formed(self) -> Dense:
        """The gradient with its entries in memory, which may be overwritten; those in half precision may stay so."""
        return Dense(self.matrix, is_owned=True)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.matmul(x)

    @property
    def mT(self) -> GradientOperator:  # noqa: N802 (torch's name)
        """The transposed operator; shares everything with this one."""
        return _Transposed(self)

    @property
    def matrix(self) -> Tensor:
        """G itself, (..., m, n): for those who cannot do without it."""
        return self.matmul(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


def all_entries_finite(x: Tensor) -> Tensor:
    """0-dim boolean: whether no entry is NaN or infinite, in one pass without a temporary.

    A sum can overflow where the entries do not: on the CPU each of them is looked at then; where asking would wait for the
    device, entries that sum to more than 1e38 count as infinite.
    """
    finite = x.sum(dtype=None if x.dtype == torch.float64 else torch.float32).isfinite()
    return finite if is_async(x) or finite else x.isfinite().all()


class _Transposed(GradientOperator):
    def __init__(self, original: GradientOperator) -> None:
        *batch, m, n = original.shape
        self.shape, self.dtype, self.device = torch.Size((*batch, n, m)), original.dtype, original.device
        self._original = original

    def matmul(self, x: Tensor) -> Tensor:
        return self._original.rmatmul(x)

    def rmatmul(self, y: Tensor) -> Tensor:
        return self._original.matmul(y)

    def is_finite(self) -> Tensor:
        return self._original.is_finite()

    @property
    def mT(self) -> GradientOperator:  # noqa: N802
        return self._original


class Dense(GradientOperator):
    """A gradient that is in memory.

    Args:
        matrix: G, shape (..., m, n), floating. bfloat16 stays as it is where products are faster with it; other half precision is
            widened to float32 here, once.
        is_owned: Whether nobody else needs the buffer, so that a rule may overwrite it (`consume`).
        layout: Which block of G it is, where other processes hold the rest: products are summed over these.

    Attributes:
        rounding: The dtype that its entries were rounded to.
    """

    def __init__(self, matrix: Tensor, *, is_owned: bool = False, layout: Layout = UNSHARDED) -> None:
        self.dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        self._matrix = matrix if matrix.dtype == self.dtype else as_operand(matrix)
        self._layout, self._is_owned = layout, is_owned or self._matrix is not matrix
        self.shape, self.device = matrix.shape, matrix.device
        self.rounding, self.operand_dtype = matrix.dtype, self._matrix.dtype

    @property
    def matrix(self) -> Tensor:
        """G itself, (..., m, n), float32 or wider."""
        return self._matrix if self.operand_dtype == self.dtype else self._matrix.to(self.dtype)

    @property
    def stored(self) -> Tensor:
        """The same as it lies in memory, maybe in half precision."""
        return self._matrix

    def formed(self) -> Dense:
        return self

    def matmul(self, x: Tensor) -> Tensor:
        product = self._matrix @ x if self.operand_dtype == self.dtype else wide_matmul(self._matrix, x)
        return product if self._layout.is_whole else self._layout.columns.all_reduce_sum(product)

    def rmatmul(self, y: Tensor) -> Tensor:
        product = self._matrix.mT @ y if self.operand_dtype == self.dtype else wide_matmul(self._matrix.mT, y)
        return product if self._layout.is_whole else self._layout.rows.all_reduce_sum(product)

    def is_finite(self) -> Tensor:
        return all_entries_finite(self._matrix)

    def squared_norm(self) -> Tensor:
        return widest(torch.linalg.vector_norm(self._matrix, dtype=self.dtype)).square()

    def row_energies(self) -> Tensor:
        energies = torch.linalg.vector_norm(self._matrix, dim=-1, keepdim=True, dtype=self.dtype) ** 2
        return self._layout.columns.all_reduce_sum(energies)

    def scaled_rows(self, scale: Tensor) -> dict[str, Tensor]:
        return {"dense": self.consume(), "dense_rows": scale}

    def scaled(self, factor: Tensor) -> Dense:
        # Half precision stays so, as where torch clips such gradients.
        return Dense(self.consume().mul_(factor), is_owned=True, layout=self._layout)

    def consume(self) -> Tensor:
        """G in a buffer that the caller may overwrite, maybe in half precision; the operator is spent afterwards."""
        return self._matrix if self._is_owned else self._matrix.clone()

    def _wide(self) -> Tensor:
        """The same, float32 or wider: for sums, which half precision would round."""
        return self.consume() if self.operand_dtype == self.dtype else self.matrix

    def add_(self, gradient: GradientOperator) -> Dense:
        """Add another gradient, in place where the buffer is owned."""
        self._matrix, self._is_owned, self.operand_dtype = self._wide().add_(gradient.matrix), True, self.dtype
        return self


class Sketched(GradientOperator):
    """A gradient of which only `A₁ = G X`, or also `A₂ = Gᵀ L`, is known, for orthonormal X and L.

    One-sided, the operator is the projection `A₁ Xᵀ = G X Xᵀ`. Two-sided, it is the projection onto the tangent space of the
    low-rank matrices at (L, X): `A₁ Xᵀ + L A₂ᵀ − L H Xᵀ` with `H = Lᵀ A₁`. Both are linear in G: sketches of several
    gradients in the same bases add.

    Args:
        right: X, shape (..., n, r), orthonormal (or zero) columns.
        right_sketch: A₁ = G X, shape (..., m, r).
        left: L, shape (..., m, l), orthonormal (or zero) columns; None for a one-sided sketch.
        left_sketch: A₂ = Gᵀ L, shape (..., n, l); with `left`.
        left_spans: Whether L spans the columns of all that is known: of a single gradient with L = orth(G X), which the operator
            is `L A₂ᵀ` of then.
        layout: Which block of G it is about, where other processes hold the rest: X and A₂ have the block's columns, L and A₁ its
            rows.

    Attributes:
        whole: G itself, for those who compare the sketch with it; None where nobody asked, or nobody knows.

    Raises:
        ShapeError: the four shapes do not belong together.

    Source: the tangent-space projection of Koch and Lubich 2007; sketches in data-parallel training, PowerSGD, arXiv 1905.13727.
    """

    def __init__(
        self,
        right: Tensor,
        right_sketch: Tensor,
        left: Tensor | None = None,
        left_sketch: Tensor | None = None,
        *,
        left_spans: bool = False,
        layout: Layout = UNSHARDED,
    ) -> None:
        *batch, n, r = right.shape
        m = right_sketch.shape[-2]
        of_left = (None, None) if left is None else ((*batch, m, left.shape[-1]), (*batch, n, left.shape[-1]))
        shapes = [None if part is None else tuple(part.shape) for part in (right, right_sketch, left, left_sketch)]
        if shapes != [(*batch, n, r), (*batch, m, r), *of_left]:
            given = ", ".join(map(str, shapes))
            raise ShapeError(f"Sketched: X, A1, L, A2 have shapes {given}; needed are (n, r), (m, r), (m, l), (n, l)")
        self.right, self.right_sketch, self.left, self.left_sketch = right, right_sketch, left, left_sketch
        self.whole: Dense | None = None
        self.shape, self.dtype, self.device = torch.Size((*batch, m, n)), right_sketch.dtype, right_sketch.device
        self.left_spans, self._layout = left_spans, layout

    @classmethod
    def of(cls, gradient: GradientOperator, right: Tensor, left: Tensor | None = None) -> Sketched:
        """Sketch a gradient in the given bases: two products, r(m + n) numbers."""
        left_sketch = None if left is None else gradient.rmatmul(left)
        return cls(right, gradient.matmul(right), left, left_sketch)

    def matmul(self, x: Tensor) -> Tensor:
        rows, columns = self._layout.rows, self._layout.columns
        product = self.right_sketch @ columns.inner(self.right, x)
        if self.left is None or self.left_sketch is None:
            return product
        # L A₂ᵀ x in the place of what A₁ Xᵀ x has in the span of L.
        return product + self.left @ (columns.inner(self.left_sketch, x) - rows.inner(self.left, product))

    def rmatmul(self, y: Tensor) -> Tensor:
        rows = self._layout.rows
        if self.left is None or self.left_sketch is None:
            return self.right @ rows.inner(self.right_sketch, y)
        # Of the part of y in the span of L, Gᵀ is known exactly; of the rest what X has seen.
        inner = rows.inner(self.left, y)
        return self.right @ rows.inner(self.right_sketch, y - self.left @ inner) + self.left_sketch @ inner

    def is_finite(self) -> Tensor:
        finite = self.right_sketch.isfinite().all()
        return finite if self.left_sketch is None else finite & self.left_sketch.isfinite().all()

    def is_blank(self) -> Tensor:
        """0-dim boolean on the operator's device: whether both sketches are zero, so that nothing is known of G."""
        is_filled = self.right_sketch.any()
        is_filled = is_filled if self.left_sketch is None else is_filled | self.left_sketch.any()
        return ~self._layout.anywhere(is_filled)

    def squared_norm(self) -> Tensor:
        rows, columns = self._layout.rows, self._layout.columns
        energy = squared_norm(self.right_sketch) / columns.parts
        if self.left is None or self.left_sketch is None:
            return energy
        # L Lᵀ G and (1 − L Lᵀ) G X Xᵀ are orthogonal to each other. What several processes know counts once over all of them.
        common = squared_norm(rows.inner(self.left, self.right_sketch)) / columns.parts
        return energy + (squared_norm(self.left_sketch) - common) / rows.parts

    def scaled(self, factor: Tensor) -> Sketched:
        left_sketch = None if self.left_sketch is None else self.left_sketch * factor
        scaled = Sketched(
            self.right, self.right_sketch * factor, self.left, left_sketch, left_spans=self.left_spans, layout=self._layout
        )
        scaled.whole = None if self.whole is None else self.whole.scaled(factor)
        return scaled

    def add_(self, gradient: GradientOperator) -> Sketched:
        """Add another gradient's sketch in these bases, in place."""
        self.left_spans = False
        # One-sided in the very same basis, as layers that project early make it, it is the product already.
        if isinstance(gradient, Sketched) and gradient.right is self.right and gradient.left is None:
            self.right_sketch += gradient.right_sketch
        else:
            self.right_sketch += gradient.matmul(self.right)
        if self.left is not None and self.left_sketch is not None:
            self.left_sketch += gradient.rmatmul(self.left)
        if self.whole is not None:
            self.whole = None if isinstance(gradient, Sketched) else self.whole.add_(gradient)
        return self
