"""The loss of a language model, and its mean over a whole validation set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packing import IGNORED, PackedTokens
from .processes import Processes


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not IGNORED, in nats per token, 0-dim float32.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        targets: int64 (batch, length).
    """
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validation_loss(language: Any, model: nn.Module, data: PackedTokens, batch_size: int, processes: Processes) -> float:
    """Mean over every target of the data, in nats per token, the same on all processes; without dropout."""
    model.eval()
    total, count, device = 0.0, 0, processes.device
    try:
        for rows, is_counted in _own_batches(len(data), batch_size, processes):
            inputs, targets = data.batch(rows)
            learned = int((targets != IGNORED).sum()) * is_counted
            loss = cross_entropy(language.logits(model, inputs.to(device)), targets.to(device))
            total, count = total + float(loss) * learned, count + learned
    finally:
        model.train()
    total, count = processes.total(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count


def _own_batches(count: int, batch_size: int, processes: Processes) -> Iterator[tuple[Tensor, bool]]:
    """Batches of row numbers in turn for the processes, and whether each counts: as many for all of them."""
    batches = torch.arange(count).split(batch_size)
    for start in range(0, len(batches), processes.size):
        own = start + processes.rank
        # Shards of a model come together for every forward, so that no process may be left out.
        yield batches[min(own, len(batches) - 1)], own < len(batches)
