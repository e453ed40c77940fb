"""The loss of a language model, and its mean over a whole validation set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packing import IGNORED, PackedTokens


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not IGNORED, in nats per token, 0-dim float32.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        targets: int64 (batch, length).
    """
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validation_loss(language: Any, model: nn.Module, data: PackedTokens, batch_size: int, device: str) -> float:
    """Mean over every target of the data, in nats per token; without dropout."""
    model.eval()
    total, count = 0.0, 0
    try:
        for rows in torch.arange(len(data)).split(batch_size):
            inputs, targets = data.batch(rows)
            learned = int((targets != IGNORED).sum())
            loss = cross_entropy(language.logits(model, inputs.to(device)), targets.to(device))
            total, count = total + float(loss) * learned, count + learned
    finally:
        model.train()
    return total / count
