"""How a gradient is seen: as a linear operator with two products, captured by hooks or inside a layer's own backward."""

from .adaptor import AdaptedLayer, AdaptorCapture, CapturedLayer, Receiver, is_plain_embedding, release_abandoned
from .factored import Factored, Rows
from .hook import HookCapture
from .linear_maps import ConvolutionMap, LinearMap, TokenMap, is_transposed_linear, linear_map
from .operator import Dense, GradientOperator, Sketched

__all__ = [
    "AdaptedLayer",
    "AdaptorCapture",
    "CapturedLayer",
    "ConvolutionMap",
    "Dense",
    "Factored",
    "GradientOperator",
    "HookCapture",
    "LinearMap",
    "Receiver",
    "Rows",
    "Sketched",
    "TokenMap",
    "is_plain_embedding",
    "is_transposed_linear",
    "linear_map",
    "release_abandoned",
]
