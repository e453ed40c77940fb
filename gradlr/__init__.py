"""gradlr: every weight is updated inside backward, from a gradient compressed to rank r; no gradient is left over."""

from . import linalg, rules
from .attach import attach
from .errors import (
    ArgumentError,
    AttachError,
    BackwardError,
    CheckpointError,
    GradlrError,
    GradlrWarning,
    LossError,
    NonFiniteError,
    ParallelError,
    ShapeError,
)
from .lora import LoraLayer, LoraReport, export_lora
from .memory import Estimate, estimate, estimate_all
from .optimizer import GradLR
from .ranks import ByEnergy, ByLoss, Fixed, RankInputs, RankSchedule, decide_rank
from .storage import load, save
from .tracker import LossTracker

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttachError",
    "BackwardError",
    "ByEnergy",
    "ByLoss",
    "CheckpointError",
    "Estimate",
    "Fixed",
    "GradLR",
    "GradlrError",
    "GradlrWarning",
    "LoraLayer",
    "LoraReport",
    "LossError",
    "LossTracker",
    "NonFiniteError",
    "ParallelError",
    "RankInputs",
    "RankSchedule",
    "ShapeError",
    "attach",
    "decide_rank",
    "estimate",
    "estimate_all",
    "export_lora",
    "linalg",
    "load",
    "rules",
    "save",
]
