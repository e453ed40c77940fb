"""What an exported adapter holds, how much of the difference it captures, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...report.summary import aligned, format_bytes


@dataclass(frozen=True)
class LoraLayer:
    """One weight whose difference became B A.

    Attributes:
        name: The module's name.
        shape: (fan_out, fan_in) of the difference ΔW.
        rank: Of B A.
        difference: ‖ΔW‖, Frobenius.
        error: ‖ΔW − B A‖, Frobenius, of the numbers as they are stored.
        bytes: Of A, B, and the bias where it changed.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    difference: float
    error: float
    bytes: int

    @property
    def energy(self) -> float:
        """Captured share of ‖ΔW‖²."""
        return _captured(self.difference, self.error)


@dataclass(frozen=True)
class LoraReport:
    """What `export_lora` wrote.

    Attributes:
        path: The adapter's folder.
        layers: The low-rank layers.
        saved: Name of each module that is stored whole (`modules_to_save`), and its bytes.
        left_out: Name of each changed parameter that is not in the adapter, and why.
        unchanged: Number of parameters and buffers that are as they were in the base model.
        bytes: Size of the file of weights.
        whole_bytes: Size of everything that changed, in the model's own dtype.
    """

    path: Path
    layers: tuple[LoraLayer, ...]
    saved: dict[str, int]
    left_out: dict[str, str]
    unchanged: int
    bytes: int
    whole_bytes: int

    @property
    def energy(self) -> float:
        """Captured share of the squared difference over all low-rank layers."""
        difference = math.hypot(*(layer.difference for layer in self.layers))
        return _captured(difference, math.hypot(*(layer.error for layer in self.layers)))

    def __str__(self) -> str:
        rows = [
            (layer.name, " x ".join(map(str, layer.shape)), str(layer.rank), f"{layer.energy:.2%}", format_bytes(layer.bytes))
            for layer in self.layers
        ]
        rows += [(name, "whole", "", "", format_bytes(size)) for name, size in self.saved.items()]
        share = f" with {self.energy:.2%} of the squared difference" if self.layers else ""
        rest = f"{len(self.saved)} modules whole, {len(self.left_out)} parameters left out, {self.unchanged} unchanged"
        sizes = f"{format_bytes(self.bytes)} for {format_bytes(self.whole_bytes)} of changed weights"
        lines = [f"LoRA adapter in {self.path}", *aligned(("layer", "shape", "rank", "energy", "size"), rows)]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n  ".join([*lines, f"{len(self.layers)} low-rank layers{share}, {rest}; {sizes}"])

    __repr__ = __str__


def _captured(difference: float, error: float) -> float:
    return max(0.0, 1 - (error / difference) ** 2) if difference else 1.0
