"""How a gradient is seen: as a linear operator with two products, captured by hooks or inside a layer's own backward."""

from .adaptor import AdaptorCapture, Receiver, is_plain_embedding
from .factored import Factored, Rows
from .hook import Claim, HookCapture
from .layers import AdaptedLayer, CapturedLayer, LayerCapture, release_abandoned
from .linear_maps import ConvolutionMap, LinearMap, TokenMap, is_transposed_linear, linear_map
from .operator import Dense, GradientOperator, Sketched
from .registered import RegisteredCapture

__all__ = [
    "AdaptedLayer",
    "AdaptorCapture",
    "CapturedLayer",
    "Claim",
    "ConvolutionMap",
    "Dense",
    "Factored",
    "GradientOperator",
    "HookCapture",
    "LayerCapture",
    "LinearMap",
    "Receiver",
    "RegisteredCapture",
    "Rows",
    "Sketched",
    "TokenMap",
    "is_plain_embedding",
    "is_transposed_linear",
    "linear_map",
    "release_abandoned",
]
