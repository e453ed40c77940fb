"""What training takes: weights, state, gradients, activations and peak of every method, counted without allocating anything."""

from .blank import checkpoint_blocks
from .collectives import Traffic, replica_traffic, update_traffic
from .estimation import Estimate, estimate, estimate_all
from .methods import METHODS
from .shapes import SHAPES

__all__ = [
    "METHODS",
    "SHAPES",
    "Estimate",
    "Traffic",
    "checkpoint_blocks",
    "estimate",
    "estimate_all",
    "replica_traffic",
    "update_traffic",
]
