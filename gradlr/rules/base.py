"""What a rule is: a pure pair `init`, `update` between a gradient operator and an Update. Writing your own takes thirty lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..gradient import GradientOperator, RowsOnDemand, Sketched
from ..linalg import REPLICATED, UNSHARDED, Axis, Layout, orthonormalize

State = dict[str, Tensor]


@dataclass(frozen=True)
class UpdateContext:
    """What the optimizer tells a rule about one update of one parameter.

    Attributes:
        rank: r, the rank of the compressed gradient and of the update, 1 ≤ r ≤ min(m, n).
        momentum_rank: k, the rank of the momentum that is kept, 0 ≤ k ≤ min(m, n); 0 for none.
        beta: Momentum β in [0, 1).
        step: Number of this update of this parameter, counted from 1; in a compiled graph a 0-dim tensor, for arithmetic only.
        generator: Random numbers for this parameter and step, on the parameter's device: the same whenever the same step of
            the same seed is taken again, so `sketch` and the `update` after it draw alike. One generator serves all parameters
            of a device and is set anew for each, so nothing may be drawn from it later.
        ceiling: The largest rank that there will ever be.
        columns: Random numbers drawn before, that `gaussian` hands out, where the update is compiled: then nothing is drawn.
        active: r as a 0-dim tensor, where `rank` is the largest there will be and columns beyond r are zero; None where it is r.
        layout: Which block of the matrices this process works on, where others hold the rest. Only rules with `supports_sharding`
            see another than the whole.
        members: Of a batch of several parameters, what makes the context of each: it draws as each would alone.
    """

    rank: int
    momentum_rank: int
    beta: float
    step: int
    generator: torch.Generator | None
    ceiling: int = 0
    columns: Tensor | None = None
    active: Tensor | None = None
    layout: Layout = UNSHARDED
    members: tuple[Callable[[], UpdateContext], ...] = ()

    def gaussian(self, shape: Sequence[int], like: Tensor, *, axis: Axis = REPLICATED) -> Tensor:
        """Gaussian columns of unit expected length: entries N(0, 1 / rows), in the dtype and on the device of `like`.

        Args:
            shape: (..., rows, columns) of what is wanted here.
            like: Any tensor.
            axis: How the rows are spread.
        """
        if self.columns is not None:
            return self.columns
        if self.members:
            return torch.stack([member().gaussian(shape[1:], like, axis=axis) for member in self.members])
        batch, is_whole = self.layout.batch, axis.is_whole and self.layout.batch.is_whole
        if not is_whole:
            *matrices, rows, columns = shape
            shape = (*map(batch.size, matrices), axis.size(rows), columns)
        draw = torch.empty(shape, dtype=like.dtype, device=like.device).normal_(0, shape[-2] ** -0.5, generator=self.generator)
        # Where other processes hold some of the rows or of the batch, all draw the same numbers: each takes those of its part.
        return draw if is_whole else batch.local_shard(axis.local_shard(draw, -2), 0)


@dataclass
class Update:
    """A direction D; the optimizer writes `W ← (1 − ηλ) W − η D`.

    `D = diag(row_scale) left rightᵀ + diag(dense_rows) dense diag(dense_columns)`.

    Attributes:
        left: (..., m, r), or None where there is no low-rank part; a `RowsOnDemand` is made a block of rows at a time.
        right: (..., n, r), with `left`.
        row_scale: (..., m, 1), with `left`; None for ones.
        dense: The parameter's view (..., m, n), in any floating dtype, or None; the optimizer may overwrite it. A `RowsOnDemand`,
            new tensors of float32 or wider, is made a block of rows at a time, before the new state is kept: entries of that one
            and of `dense_rows` may be written on the way, the same each time. It comes with a `check`.
        dense_rows: (..., m, 1), with `dense`; None for ones.
        dense_columns: (..., 1, n), likewise.
        rows: Row numbers (t,), int64, where `dense` holds only those rows, (t, n); as in `gradlr.gradient.RowSparse`.
        check: Any number of numbers that are all finite if and only if all else is, where a rule has them at hand; None to let
            the optimizer look at everything.
    """

    left: Tensor | RowsOnDemand | None = None
    right: Tensor | None = None
    dense: Tensor | RowsOnDemand | None = None
    row_scale: Tensor | None = None
    dense_rows: Tensor | None = None
    dense_columns: Tensor | None = None
    rows: Tensor | None = None
    check: Tensor | None = None

    def parts(self) -> list[Tensor]:
        """The tensors that make up the direction, but for what is made on demand."""
        parts = (self.left, self.right, self.row_scale, self.dense, self.dense_rows, self.dense_columns)
        return [part for part in parts if isinstance(part, Tensor)]

    def named_parts(self) -> dict[str, Tensor]:
        """All tensors by name, with which the same update can be made."""
        return {key: part for key, part in vars(self).items() if part is not None}

    def block(self, rows: tuple[Any, ...]) -> Update:
        """The same for a slice of the matrix rows, the last but one axis; shares its memory with this one."""
        of_rows = {
            key: part[rows] for key in ("left", "row_scale", "dense", "dense_rows") if (part := getattr(self, key)) is not None
        }
        return Update(right=self.right, dense_columns=self.dense_columns, **of_rows)

    def direction(self) -> Tensor:
        """D itself, as a new tensor (..., m, n), or (t, n) of the rows that it holds: for those who look at it."""
        low_rank: Tensor | float = 0.0
        if self.left is not None and self.right is not None:
            left = self.left[...]
            left = left if self.row_scale is None else left * self.row_scale
            low_rank = left @ self.right.mT.to(left.dtype)
        dense: Any = 0.0 if self.dense is None else self.dense[...]
        for scale in (self.dense_rows, self.dense_columns):
            dense = dense if scale is None else dense * scale
        return torch.as_tensor(low_rank + dense)


class Rule:
    """Base of all rules. A rule holds options only; everything that changes is in the state, a dict of plain tensors.

    Class attributes:
        name: What `rule="..."` and `repr(opt)` call it.
        is_elementwise: Whether the rule needs the gradient's entries (`gradient.matrix`); such a rule may suit vectors too.
            Matrix rules use `gradient @ X` and `gradient.mT @ Y` only.
        has_rank: Whether the rule looks at r directions of the gradient; where it looks at all of them, rank and momentum rank
            say nothing, and what waits for `opt.step()` is the gradient itself.
        accepts_row_factors: Whether such a rule works row by row with `row_energies` and `scaled_rows`, so that it takes the
            `RowSparse` of an embedding and the `OuterProduct` gradient of a head as they are.
        keeps_zeros: Whether entries that are zero in the gradient are zero in the update, as they are with elementwise rules:
            masks of single weights need that.
        carries_nonfinite: Whether NaN and infinity anywhere in the gradient always show in the update, or in its `check`: then
            nobody looks at the gradient before, and `update` may be handed one that is not finite.
        is_batched: Whether several parameters of one shape may come as one, with an axis more in front, as `opt.step()` hands
            them over: the rule treats them apart, and draws by `context.gaussian` only.
        pads_rank: Whether columns of zeros among the random ones lower the rank, so that one compiled graph serves all ranks.
        supports_sharding: Whether the rule follows `UpdateContext.layout`, so that several processes may each hold a block of the
            parameter. Elementwise rules need nothing for that.
        state_sharding: Axis that the last but one of a state entry lies along, "rows" or "columns", by its key; of blocks only.
        optional_state: Keys that a checkpoint may lack, as one of a run without momentum does: they start at zero then.
    """

    name = "rule"
    is_elementwise = False
    has_rank = True
    accepts_row_factors = False
    keeps_zeros = False
    carries_nonfinite = False
    is_batched = False
    pads_rank = False
    supports_sharding = False
    state_sharding: ClassVar[Mapping[str, str]] = {}
    optional_state: ClassVar[frozenset[str]] = frozenset()

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first update.

        Args:
            shape: Of the parameter's view, (..., m, n), or any shape for elementwise rules.
            context: `rank` and `momentum_rank` are the largest there will be.
            dtype: float32, or float64 for float64 parameters.
            device: The parameter's.
        """
        raise NotImplementedError

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        """One update.

        Args:
            gradient: Finite, unless the rule `carries_nonfinite`. Elementwise rules get a `Dense`.
            state: What `init` or the last `update` returned; not modified.
            context: Of this update.

        Called in `torch.inference_mode` where there is no state.

        Returns:
            The update, in the state's dtype, and the new state with the same keys.
        """
        raise NotImplementedError

    def sketch(self, gradient: GradientOperator, state: State, context: UpdateContext) -> Sketched:
        """A few numbers per row and column that stand for the gradient until `opt.step()`; others are added with `add_`.

        Here the range of the gradient under `right_basis`: a randomized range finder on both sides.

        Args:
            gradient: The first gradient of the step, finite.
            state: The rule's state; not modified.
            context: Those that `update` will get: the same random numbers.
        """
        right = self.right_basis(gradient.shape, state, context, dtype=gradient.dtype, device=gradient.device)
        image = gradient @ right
        left = orthonormalize(image)
        return Sketched(right, image, left, gradient.mT @ left, left_spans=True)

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
        """X, (..., n, r) with orthonormal columns: what the gradient is projected on where it is not seen whole.

        Known before the gradient. Here random directions, or those of the layer's inputs where these are at hand: G is a sum of
        output gradient times input, so directions that the inputs lack are missing in G as well. A rule with momentum does
        better by starting from what it follows.

        Args:
            shape: Of the parameter's view, (..., m, n).
            state, context: Those that `update` will get: the same random numbers.
            dtype, device: Of the result.
            covariance_matmul: The covariance of the layer's inputs, not centred, times a matrix (n, c).
        """
        *batch, _, n = shape
        draw = context.gaussian((*batch, n, context.rank), torch.empty(0, dtype=dtype, device=device))
        return orthonormalize(draw if covariance_matmul is None else covariance_matmul(draw))

    def columns_shape(self, shape: torch.Size, rank: int) -> tuple[int, ...]:
        """Shape of the random columns that an update of a parameter seen as (..., m, n) draws, where it draws any."""
        return (*shape[:-2], shape[-1], rank)

    def resize(self, state: State, shape: torch.Size, context: UpdateContext) -> State:
        """The state for another rank or momentum rank; itself where its shapes depend on neither."""
        return state

    def momentum(self, state: State) -> tuple[Tensor, Tensor] | None:
        """The momentum that a state holds, as factors (..., m, k) and (..., n, k) of `left rightᵀ`; None where there is none.

        Only asked for by `opt.report()`.
        """
        return None

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def fit_columns(x: Tensor, columns: int) -> Tensor:
    """The leading columns of (..., c), with zeros behind them up to `columns`, as a new tensor."""
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1]))  # a negative number cuts


# Root mean square of an update at lr = 1. Adam's is near 1 in its first steps and falls to about 0.2 in long runs (Moonlight,
# arXiv 2502.16982, section 2.2). With 2, AdamW's best rate of a workload is about ours: `python -m gradlr bench quality`.
UPDATE_RMS = 2.0


def update_scale(shape: torch.Size, rank: int | Tensor, residual: float = 0.0) -> float | Tensor:
    """2 √(mn / (r + α²(d − r))) with d = min(m, n): gives the update one root mean square, whatever its rank and shape.

    So AdamW's learning rate is the right one for all of them.

    Args:
        shape: (..., m, n).
        rank: r, the number of orthonormal directions.
        residual: α, the size of the other directions beside these.
    """
    m, n = shape[-2:]
    return UPDATE_RMS * (m * n / (rank + residual**2 * (min(m, n) - rank))) ** 0.5


def require_fraction(name: str, value: float) -> float:
    """`value` as a float, where it lies in [0, 1); an ArgumentError otherwise."""
    value = require_number(name, value)
    if value >= 1:
        raise ArgumentError(f"{name}={value}: it must lie in [0, 1)")
    return value


def require_positive(name: str, value: float) -> float:
    """`value` as a float, where it is a positive finite number; an ArgumentError otherwise."""
    if require_number(name, value) == 0:
        raise ArgumentError(f"{name}=0: it must be positive, or rows and directions without gradient become NaN")
    return float(value)


def require_rate(name: str, value: float | Tensor) -> float | Tensor:
    """`require_number` of a learning rate; one that is a tensor stays a tensor, into which schedulers write."""
    rate = require_number(name, value)
    return value if isinstance(value, Tensor) else rate


def require_number(name: str, value: float | Tensor, *, minimum: float = 0.0) -> float:
    """`value` as a float, where it is a finite number not below `minimum`, of Python, NumPy or a tensor of one element.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not minimum <= value < float("inf"):
        raise ArgumentError(f"{name}={value!r}: it must be a finite number, at least {minimum:g}")
    return float(value)
