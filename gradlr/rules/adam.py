"""Adam, for vectors: biases, norms, scalars."""

from __future__ import annotations

import torch

from ..gradient import Dense, GradientOperator
from ..linalg import kernels
from ..tensors import has_kernels
from .base import Rule, State, Update, UpdateContext, require_fraction, require_positive


class Adam(Rule):
    """Adam with bias correction; `beta` is its first decay, weight decay is decoupled (AdamW). State: 2 numbers per weight.

    Args:
        beta2: Decay of the second moment.
        eps: Added to its root.

    Raises:
        ArgumentError: an option is out of range.

    Source: Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    name = "adam"
    is_elementwise = True
    has_rank = False
    carries_nonfinite = True
    is_batched = True
    supports_sharding = True

    def __init__(self, *, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta2 = require_fraction("beta2", beta2)
        self.eps = require_positive("eps", eps)

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        return {key: torch.zeros(shape, dtype=dtype, device=device) for key in ("mean", "square")}

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        beta, beta2, step = context.beta, self.beta2, context.step
        # Both moments started at zero: divided by the sum of the weights so far they are means.
        weights = 1 - beta**step, 1 - beta2**step
        if isinstance(gradient, Dense) and has_kernels(gradient.stored):
            direction, mean, square = kernels.adam(
                gradient.stored, state["mean"], state["square"], beta, beta2, *weights, self.eps
            )
        else:
            g = gradient.matrix
            # Of g first and the mean second: β is the weight of what is kept.
            mean = torch.lerp(g, state["mean"], beta)
            square = torch.lerp(g**2, state["square"], beta2)
            # The first weight is multiplied into the root, so that one division by a whole tensor does for both.
            direction = mean / (square / weights[1]).sqrt_().add_(self.eps).mul_(weights[0])
        # Where a square is finite, so is what it was made of, and all that is made of it.
        return Update(dense=direction, check=square.sum()), {"mean": mean, "square": square}
