"""What all processes must have in common, as words that can be compared and told."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.record import ParamRecord
from ..engine.state_store import StateStore

# Checksums are kept below this, so that float32 holds them exactly.
_CHECKSUMS = 2**23


def fingerprint(store: StateStore, options: Mapping[str, Any]) -> dict[str, str]:
    """Library versions, options and each parameter's form, rule and rates: name → value.

    The number of threads is among them, since products of matrices may round differently with another.
    """
    told: dict[str, Any] = {
        "the call": "attach",
        "gradlr's version": sys.modules["gradlr"].__version__,
        "torch's version": torch.__version__,
        "seed": store.seed,
        "state_dtype": store.dtype,
        **options,
    }
    if all(record.plan.parameter.device.type == "cpu" for record in store.records):
        told["torch.get_num_threads()"] = torch.get_num_threads()
    for record in store.records:
        told |= _of_parameter(record, _form(record) | _rates(store, record))
    # What prints where it lies in memory differs between processes.
    return {key: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for key, value in told.items()}


def _form(record: ParamRecord) -> dict[str, Any]:
    parameter, plan = record.plan.parameter, record.plan
    return {
        "place in the order": record.index, "shape": tuple(parameter.shape), "dtype": parameter.dtype,
        "device": parameter.device.type, "placements": getattr(parameter, "placements", "none"),
        "kind": plan.kind, "view": plan.view.pattern, "view's shape": tuple(plan.shape),
        "rule": record.rule, "rank schedule": record.schedule, "momentum_rank": record.momentum_rank, "capture": record.capture,
    }  # fmt: skip


def _rates(store: StateStore, record: ParamRecord) -> dict[str, float]:
    group = store.group(record)
    return {key: float(group[key]) for key in ("lr", "lr_scale", "beta", "weight_decay")}


def _of_parameter(record: ParamRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key} of {record.plan.name!r}": value for key, value in told.items()}


def state_fingerprint(store: StateStore, options: Mapping[str, Any]) -> dict[str, str]:
    """The same of what a checkpoint brings: ranks, rates, step counts and a checksum of each parameter's state."""
    told: dict[str, Any] = {"the call": "load_state_dict", "seed": store.seed, **options}
    for record in store.records:
        state, bits = store.of(record), 0
        if record.plan.layout.is_whole:
            for key, value in sorted(state.items()):
                flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                bits = zlib.crc32(flat.numpy().tobytes(), zlib.crc32(key.encode(), bits))
        loaded = {"rank": record.rank, "step count": int(state["step"]), "state": f"{bits:08x}"}
        told |= _of_parameter(record, loaded | _rates(store, record))
    return {key: str(value) for key, value in told.items()}


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bits: another one where two copies have drifted apart, almost surely."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().reshape(-1).view(bits).sum(dtype=torch.int64) % _CHECKSUMS)
