"""Norms: their weights are scales, one by one, also where they have the shape of a matrix."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .base import LayerType

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)

NORM = LayerType(lambda module: isinstance(module, _NORMS), is_norm=True)
