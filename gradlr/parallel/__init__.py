"""Data parallel training: replicas in several processes that exchange sketches instead of gradients."""

from .comparison import compare, world
from .exchange import FAILED, FINE, NOT_FINITE, Told, as_shared, exchange
from .fingerprint import fingerprint, state_fingerprint
from .kept import part_of, saved_state, whole_state
from .replicas import Replicas, together, warn_of_processes
from .shards import Shards

__all__ = [
    "FAILED",
    "FINE",
    "NOT_FINITE",
    "Replicas",
    "Shards",
    "Told",
    "as_shared",
    "compare",
    "exchange",
    "fingerprint",
    "part_of",
    "saved_state",
    "state_fingerprint",
    "together",
    "warn_of_processes",
    "whole_state",
    "world",
]
