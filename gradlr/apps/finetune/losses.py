"""The loss of a language model, and its mean over a whole validation set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packing import IGNORED, PackedTokens
from .workers import Workers

if TYPE_CHECKING:
    from .model import BuiltinModel
    from .pretrained import PretrainedModel


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not IGNORED, in nats per token, 0-dim float32.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        targets: int64 (batch, length).
    """
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validation_loss(
    language: BuiltinModel | PretrainedModel, model: nn.Module, data: PackedTokens, batch_size: int, workers: Workers
) -> float:
    """Mean over every target of the data, in nats per token, the same on all processes; without dropout."""
    batches = torch.arange(len(data)).split(batch_size)
    total, count = 0.0, 0
    model.eval()
    try:
        for number in range(workers.rank, -(-len(batches) // workers.size) * workers.size, workers.size):
            # Shards of a model come together for every forward: where batches run out, the last one is taken, and not counted.
            inputs, targets = data.batch(batches[min(number, len(batches) - 1)])
            loss = cross_entropy(language.logits(model, inputs.to(workers.device)), targets.to(workers.device))
            learned = int((targets != IGNORED).sum()) if number < len(batches) else 0
            total, count = total + float(loss) * learned, count + learned
    finally:
        model.train()
    total, count = workers.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count
