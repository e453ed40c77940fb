"""Embeddings: tables whose rows are looked up, so that a gradient has few rows that are not zero."""

from __future__ import annotations

from torch import nn

from .base import LayerType


def is_plain_embedding(layer: nn.Embedding) -> bool:
    """Whether the rows that were looked up are all there is to its gradient, and looking changes none of them."""
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse


EMBEDDING = LayerType(lambda module: isinstance(module, (nn.Embedding, nn.EmbeddingBag)), is_lookup=True)
