"""`nn.MultiheadAttention`, whose one weight of query, key and value is three matrices."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerType, View

_QUERY_KEY_VALUE = View("(three o) i -> three o i", (("three", 3),))


def _view(layer: nn.MultiheadAttention, name: str, weight: Tensor) -> View | None:
    return _QUERY_KEY_VALUE if name == "in_proj_weight" and weight.shape[0] == 3 * layer.embed_dim else None


ATTENTION = LayerType(lambda module: isinstance(module, nn.MultiheadAttention), _view)
