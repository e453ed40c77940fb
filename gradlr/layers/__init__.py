"""One truth per layer type: how its weight is seen as a matrix, and the linear map of the weight that it computes."""

from .base import AS_IT_IS, LayerOp, LayerType, View
from .linear import LinearOp
from .registry import LAYER_TYPES, layer_op, layer_type_of, natural_view

__all__ = ["AS_IT_IS", "LAYER_TYPES", "LayerOp", "LayerType", "LinearOp", "View", "layer_op", "layer_type_of", "natural_view"]
