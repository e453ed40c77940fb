"""A trajectory as a few numbers in JSON, each written to the last bit, and what has moved between two of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
# Of the losses, those of these steps are written down; of each tensor at the end so many entries, evenly spread.
LOSSES_OF = (1, 5, 10, 20)
ENTRIES = 16


@dataclass(frozen=True)
class Move:
    """A number that is another one than before.

    Attributes:
        where: Which.
        before, now: Its value.
        share: The difference in units of its tensor's scale.
    """

    where: str
    before: float
    now: float
    share: float

    def __str__(self) -> str:
        return f"{self.where}: {self.before!r} -> {self.now!r}, by {self.share:.1e} of the tensor's scale"


def digest(kept: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers in hexadecimal that stand for what a trajectory has kept.

    Of each tensor: "peak" (its largest absolute entry, the scale that the others are compared on) and "projection" (on a fixed
    vector: it moves where any entry does, or where two change places); at the end also "norm", "sum" and some entries.
    """
    losses = kept["loss"].tolist()
    tensors = {name: one for name, one in kept.items() if name != "loss"}
    end = list(tensors)[-1].partition(":")[0]
    return {
        "loss": {str(step): losses[step - 1].hex() for step in LOSSES_OF},
        **{name: _digest_of(one, is_at_end=name.startswith(f"{end}:")) for name, one in tensors.items()},
    }


def moves(before: dict[str, Any], now: dict[str, Any]) -> list[Move]:
    """Every number that differs, the largest difference first; entries that one of both lacks have moved infinitely far."""
    missing = [Move(f"{name} is in one of both only", math.nan, math.nan, math.inf) for name in before.keys() ^ now.keys()]
    found = [move for name in before.keys() & now.keys() for move in _moves_of(name, before[name], now[name])]
    return missing + sorted(found, key=lambda move: (-move.share, move.where))


def read(name: str) -> dict[str, Any] | None:
    """The digest on disk; None where there is none."""
    path = DATA / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(name: str, numbers: dict[str, Any]) -> None:
    """Put a digest on disk, one tensor a line."""
    DATA.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in numbers.items())
    (DATA / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _digest_of(tensor: Tensor, *, is_at_end: bool) -> dict[str, Any]:
    flat = tensor.detach().double().flatten()
    waves = torch.arange(len(flat), dtype=torch.float64).mul(0.7).cos()
    numbers = {"size": len(flat), "peak": float(flat.abs().max()).hex(), "projection": math.fsum((flat * waves).tolist()).hex()}
    if is_at_end:
        places = torch.linspace(0, len(flat) - 1, min(ENTRIES, len(flat))).long()
        numbers["norm"] = math.sqrt(math.fsum((flat * flat).tolist())).hex()
        numbers["sum"] = math.fsum(flat.tolist()).hex()
        numbers["entries"] = [one.hex() for one in flat[places].tolist()]
    return numbers


def _moves_of(name: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[Move]:
    if before.keys() != now.keys() or before.get("size") != now.get("size"):
        yield Move(f"{name}: is of another form", math.nan, math.nan, math.inf)
        return
    if name == "loss":
        for step, one in before.items():
            yield from _compared(f"loss of step {step}", one, now[step], abs(float.fromhex(one)))
        return
    # Where each entry moves by a share of the largest, and each for itself, then sums move by that times √size.
    peak, size = float.fromhex(before["peak"]), before["size"]
    for key, factor in (("peak", 1.0), ("projection", math.sqrt(size)), ("norm", math.sqrt(size)), ("sum", math.sqrt(size))):
        if key in before:
            yield from _compared(f"{name}: {key}", before[key], now[key], peak * factor)
    for number, (one, other) in enumerate(zip(before.get("entries", []), now.get("entries", []), strict=True)):
        yield from _compared(f"{name}: entry {number}", one, other, peak)


def _compared(where: str, before: str, now: str, scale: float) -> Iterator[Move]:
    if before != now:
        was, is_now = float.fromhex(before), float.fromhex(now)
        yield Move(where, was, is_now, abs(is_now - was) / scale if scale and math.isfinite(is_now) else math.inf)
