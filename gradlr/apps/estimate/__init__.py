"""What training takes: weights, state, gradients, activations and peak of every method, counted without allocating anything."""

from .estimation import Estimate, Traffic, estimate, estimate_all
from .methods import METHODS
from .subject import CONFIGS

__all__ = ["CONFIGS", "METHODS", "Estimate", "Traffic", "estimate", "estimate_all"]
