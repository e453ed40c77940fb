"""Whether a run fits: what it needs, counted before any weight is loaded, and what there is."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..attach import attach
from ..describe import format_bytes
from ..errors import ArgumentError, GradlrWarning
from ..optimizer import GradLR
from ..tracker import LossTracker
from .losses import cross_entropy

# Of the largest parameter in float32: what is alive while its update is made. gradlr/bench/results/memory.json holds the peaks
# for matrices of 4 MiB with each capture: 15.3, 8.2 and 3.9 MiB.
_UPDATE = {"hook": 4, "auto": 4, "adaptor": 2, "one_sided": 1}
# The same for the rounding of weights narrower than float32: 48 bytes a weight, by gradlr.bench.memory.peak_bytes of one step
# of a Linear of 1024 x 1024.
_ROUNDING = 12


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes at its worst moment, by what they hold.

    Attributes:
        weights: The parameters and buffers.
        state: The optimizer's state.
        activations: What forward keeps for backward; None where it could not be counted.
        work: What comes on top for a moment, the most of three things that do not happen at once: the gradient of the largest
            activation, a layer that is computed again, the update of the largest parameter with what waits for `opt.step()`.
    """

    weights: int
    state: int
    activations: int | None
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + (self.activations or 0) + self.work

    def __str__(self) -> str:
        parts = [f"{format_bytes(self.weights)} weights", f"{format_bytes(self.state)} state"]
        counted = self.activations is not None
        parts.append(f"{format_bytes(self.activations)} activations" if counted else "activations not counted")
        return f"{format_bytes(self.total)}: {', '.join(parts)}, {format_bytes(self.work)} at work"


def required_bytes(
    language: Any, *, batch_size: int, length: int, dtype: torch.dtype, is_checkpointed: bool, options: dict[str, Any]
) -> Need:
    """Count what a run needs, from a forward with tensors that have shapes and no values.

    Args:
        language: The model, as `find_model` returns it.
        batch_size, length: Of one micro-batch, in sequences and tokens.
        dtype: Of the weights.
        is_checkpointed: Whether layers keep their input alone.
        options: What `gradlr.attach` will be called with.
    """
    with FakeTensorMode():
        model = language.skeleton(dtype).train()
        opt = _attached(model, options)
        tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
        share = _UPDATE[options["capture"]] + (0 if dtype == torch.float32 else _ROUNDING)
        update = 4 * share * max(parameter.numel() for parameter in model.parameters())
        update += _waiting_bytes(opt) if options["apply"] == "step" else 0
        state, projected = opt.state_bytes(), _projected_bytes(opt, batch_size * length)
        opt.detach()
        for slot in opt.slots:
            if slot.capture == "one_sided":
                slot.plan.parameter.requires_grad_(False)  # so that forward does not keep its input
        sizes = (batch_size, length, is_checkpointed)
        found = _activation_bytes(language, model, *sizes)
        if found is None and dtype == torch.float32:
            # Without values, torch multiplies grouped matrices (experts) in bfloat16 only: half the bytes, or a little more.
            found = _activation_bytes(language, language.skeleton(torch.bfloat16).train(), *sizes)
            found = None if found is None else (2 * found[0], 2 * found[1])
    weights = sum(tensors.values())
    if found is None:
        return Need(weights, state, None, update)
    kept, work = found
    return Need(weights, state, kept + projected, max(work, update))


def _attached(model: nn.Module, options: dict[str, Any]) -> GradLR:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradlrWarning)  # the real one warns
        return attach(model, LossTracker(), **options)


def _waiting_bytes(opt: GradLR) -> int:
    total = 0
    for slot in opt.slots:
        count = slot.plan.parameter.numel()
        if not slot.rule.needs_dense:
            *batch, m, n = slot.plan.shape
            sketch = (2 * slot.largest_rank + slot.momentum_rank) * (m + n) * (count // (m * n))
            count = min(count, sketch)
        total += 4 * count
    return total


def _projected_bytes(opt: GradLR, tokens: int) -> int:
    return sum(4 * tokens * slot.largest_rank for slot in opt.slots if slot.capture == "one_sided")


def _activation_bytes(
    language: Any, model: nn.Module, batch_size: int, length: int, is_checkpointed: bool
) -> tuple[int, int] | None:
    """Bytes that forward keeps, and the most that comes on top of them in backward."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what cannot be counted is told in one word by us, in forty lines by torch
    try:
        plain = _saved_bytes(language, model, batch_size, length)
        if not is_checkpointed:
            return sum(plain.values()), 2 * max(plain.values())
        language.enable_checkpointing(model)
        kept = _saved_bytes(language, model, batch_size, length)
    except ArgumentError:
        raise
    except Exception:  # models may do with values what cannot be done without
        return None
    finally:
        log.setLevel(level)
    # One layer at a time is computed again, with all that it keeps.
    layers = max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1)
    return sum(kept.values()), max((sum(plain.values()) - sum(kept.values())) // layers, 2 * max(kept.values()))


def _saved_bytes(language: Any, model: nn.Module, batch_size: int, length: int) -> dict[int, int]:
    """Bytes of each memory that forward keeps for backward, the weights left out."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory._cdata not in own:
            kept[memory._cdata] = memory.nbytes()
            alive.append(tensor)  # or its memory's address could come again
        return tensor

    inputs = torch.zeros(batch_size, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(language.logits(model, inputs), inputs)
    del loss
    return kept


def available_bytes(device: str) -> int | None:
    """Bytes that can still be taken: free memory of the GPU, or of the machine and of its control groups; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = [room for room in (_machine_room(), *_group_rooms()) if room is not None]
    return min(found) if found else None


def _machine_room() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _group_rooms() -> list[int]:
    root, own = Path("/sys/fs/cgroup"), Path()
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = Path(line.removeprefix("0::/"))
    folders = [root / part for part in (own, *own.parents)]
    rooms = [_room(folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in folders]
    old = root / "memory"
    rooms.append(_room(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"))
    return [room for room in rooms if room is not None]


def _room(limit: Path, usage: Path, statistics: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        # Pages of files that nobody uses go when memory is asked for.
        entries = dict(line.split() for line in statistics.read_text().splitlines())
        spare = int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
        return max(int(limit.read_text()) - int(usage.read_text()) + spare, 0)
    return None


def require_fit(need: Need, room: int | None, where: str, advice: list[str]) -> None:
    """Raise an ArgumentError, with the numbers, where a run needs more than there is.

    Args:
        need: Of the run.
        room: Bytes there are; None if unknown.
        where: Says what has them.
        advice: What would need less.
    """
    if room is not None and need.total > room:
        raise ArgumentError(f"the run needs about {need}; {where} {format_bytes(room)}. To need less: {', '.join(advice)}")
