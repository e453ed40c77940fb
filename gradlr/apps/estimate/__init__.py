"""What training takes: weights, state, gradients, activations and peak of every method, counted without allocating anything."""

from .blank import checkpoint_blocks
from .collectives import Traffic
from .estimation import Estimate, estimate, estimate_all
from .methods import METHODS
from .subject import CONFIGS

__all__ = ["CONFIGS", "METHODS", "Estimate", "Traffic", "checkpoint_blocks", "estimate", "estimate_all"]
