"""Data parallel training: replicas in several processes that exchange sketches instead of gradients."""

from .comparison import compare, world
from .exchange import FAILED, FINE, NOT_FINITE, Told, as_shared, exchange
from .fingerprint import fingerprint, state_fingerprint
from .replicas import Replicas, together, warn_of_processes

__all__ = [
    "FAILED",
    "FINE",
    "NOT_FINITE",
    "Replicas",
    "Told",
    "as_shared",
    "compare",
    "exchange",
    "fingerprint",
    "state_fingerprint",
    "together",
    "warn_of_processes",
    "world",
]
