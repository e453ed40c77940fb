"""Pure functions on tensors: bases, polar factors, normalization, rounding. Imports torch only."""

from .axes import REPLICATED, UNSHARDED, Axis, Layout
from .bases import orthonormalize, spectral_norm, svd_lowrank
from .normalize import multi_normalize, normalize_columns
from .polar import newton_schulz
from .rounding import stochastic_round

__all__ = [
    "REPLICATED",
    "UNSHARDED",
    "Axis",
    "Layout",
    "multi_normalize",
    "newton_schulz",
    "normalize_columns",
    "orthonormalize",
    "spectral_norm",
    "stochastic_round",
    "svd_lowrank",
]
