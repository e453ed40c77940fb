"""How a gradient is seen: as a linear operator with two products, captured by hooks or inside a Linear's own backward."""

from .adaptor import AdaptorCapture, AdaptorLinear, Factored, release_abandoned
from .hook import HookCapture
from .operator import Dense, GradientOperator, Sketched

__all__ = [
    "AdaptorCapture",
    "AdaptorLinear",
    "Dense",
    "Factored",
    "GradientOperator",
    "HookCapture",
    "Sketched",
    "release_abandoned",
]
