"""MultiNormalized: rows and columns of the whole gradient normalized in turn (SinkGD); no state."""

from __future__ import annotations

import torch

from ..gradient import Dense, GradientOperator
from ..linalg import multi_normalize
from ..linalg.token_space import normalization_is_cheaper, token_scales
from .base import Rule, State, Update, UpdateContext


class MultiNormalized(Rule):
    """Rows and columns of the gradient scaled to unit length in turn, three times; every column moves by `lr`, root mean square.

    It keeps nothing, and rank and momentum do nothing for it. Under adaptor capture the scales are found in token space, and the
    update goes into the weight as one product of output gradient and input: the gradient never exists, where a step has few
    tokens. Where it has many, forming it is less work, and it exists for its own layer only.

    Source: SinkGD, gradient multi-normalization, arXiv 2502.06742.
    """

    name = "multi_normalized"
    has_rank = False
    keeps_zeros = True
    carries_nonfinite = True
    supports_sharding = True

    def init(self, shape: torch.Size, context: UpdateContext, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def update(self, gradient: GradientOperator, state: State, context: UpdateContext) -> tuple[Update, State]:
        layout, shape = context.layout, gradient.shape
        # Columns end with unit length, so with a root mean square of 1 / √m.
        size = (shape if layout.is_whole else layout.whole(shape))[-2] ** 0.5
        if tokens := gradient.tokens_where(normalization_is_cheaper):
            delta, x = tokens
            rows, columns = token_scales(delta, x)
            return Update(left=delta.mT, right=(x * columns.mT).mT * size, row_scale=rows), {}
        whole = gradient.consume() if isinstance(gradient, Dense) else gradient.matrix
        return Update(dense=multi_normalize(whole, inplace=True, layout=layout).mul_(size)), {}
