"""Pure functions on tensors: bases, polar factors, normalization, rounding. Imports torch only."""

from .axes import REPLICATED, UNSHARDED, Axis, Layout
from .bases import orthonormalize, svd_lowrank
from .normalize import multi_normalize, normalize_columns
from .polar import leading_directions, newton_schulz, newton_schulz_sharded, polar_factor
from .rounding import stochastic_round
from .spectral import spectral_norm

__all__ = [
    "REPLICATED",
    "UNSHARDED",
    "Axis",
    "Layout",
    "leading_directions",
    "multi_normalize",
    "newton_schulz",
    "newton_schulz_sharded",
    "normalize_columns",
    "orthonormalize",
    "polar_factor",
    "spectral_norm",
    "stochastic_round",
    "svd_lowrank",
]
