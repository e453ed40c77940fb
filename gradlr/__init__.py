"""gradlr: every weight is updated inside backward, from a gradient compressed to rank r; no gradient is left over."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import linalg, rules
from .attach import attach
from .capture.linear_cross_entropy import linear_cross_entropy
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
from .layers.quantize import dequantize_, float_state_dict, quantize_
from .optimizer import GradLR
from .ranks import ByLoss, ByProgress, Fixed, RankInputs, RankSchedule, decide_rank
from .tracker import LossTracker

if TYPE_CHECKING:
    from .apps.estimate import Estimate, estimate, estimate_all
    from .apps.find_lr import LrRange, find_lr
    from .apps.lora import LoraLayer, LoraReport, export_lora
    from .checkpoint.file import load, save
    from .integrations.chunked_head import chunk_head_

# Loaded when first asked for: `import gradlr` is what every training run waits for, and needs none of them.
_ON_FIRST_USE = {
    "Estimate": "apps.estimate",
    "LoraLayer": "apps.lora",
    "LoraReport": "apps.lora",
    "LrRange": "apps.find_lr",
    "chunk_head_": "integrations.chunked_head",
    "estimate": "apps.estimate",
    "estimate_all": "apps.estimate",
    "export_lora": "apps.lora",
    "find_lr": "apps.find_lr",
    "load": "checkpoint.file",
    "save": "checkpoint.file",
}

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttachError",
    "BackwardError",
    "ByLoss",
    "ByProgress",
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
    "LrRange",
    "NonFiniteError",
    "ParallelError",
    "RankInputs",
    "RankSchedule",
    "ShapeError",
    "attach",
    "chunk_head_",
    "decide_rank",
    "dequantize_",
    "estimate",
    "estimate_all",
    "export_lora",
    "find_lr",
    "float_state_dict",
    "linalg",
    "linear_cross_entropy",
    "load",
    "quantize_",
    "rules",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'gradlr' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
