"""Several processes: replicas that exchange sketches instead of gradients, and models that are sharded."""

from .communicator import Communicator, propagate_errors, warn_of_processes
from .fingerprint import fingerprint, state_fingerprint
from .replicated import FAILED, FINE, NOT_FINITE, SyncResult, as_shared, exchange
from .sharded import Shards
from .sharded_state import part_of, saved_state, whole_state

__all__ = [
    "FAILED",
    "FINE",
    "NOT_FINITE",
    "Communicator",
    "Shards",
    "SyncResult",
    "as_shared",
    "exchange",
    "fingerprint",
    "part_of",
    "propagate_errors",
    "saved_state",
    "state_fingerprint",
    "warn_of_processes",
    "whole_state",
]
