"""From documents to training sequences: tokens packed without gaps, in an order that depends on seed and step alone; the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ArgumentError
from ..bench.text import generator_of

# What cross_entropy passes over.
IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """A document's tokens.

    Attributes:
        ids: Token numbers, separator included.
        is_target: Whether each is to be learned.
    """

    ids: list[int]
    is_target: list[bool]


class PackedTokens:
    """Documents laid end to end and cut into sequences of `length` inputs, each with the token that follows as its target.

    Every token but the first is a target once. The last sequence is filled up with `padding`, which is never learned; sequences
    without anything to learn are left out. Attention reaches across documents in a sequence.

    Args:
        documents: At least one.
        length: Inputs of a sequence.
        padding: Token number.

    Attributes:
        size: Number of tokens, separators included.
        learned: Number of tokens that are targets in one epoch.
    """

    def __init__(self, documents: Sequence[Tokens], length: int, padding: int) -> None:
        self.length = length
        ids = torch.cat([torch.tensor(document.ids, dtype=torch.int32) for document in documents])
        is_target = torch.cat([torch.tensor(document.is_target, dtype=torch.bool) for document in documents])
        self.size = len(ids)
        count = -(-(self.size - 1) // length)
        missing = count * length + 1 - len(ids)
        self._ids = torch.cat([ids, torch.full((missing,), padding, dtype=torch.int32)])
        self._is_target = torch.cat([is_target, torch.zeros(missing, dtype=torch.bool)])
        per_sequence = self._is_target[1:].view(count, length).sum(1)
        self._kept = per_sequence.nonzero().flatten()
        self.learned = int(per_sequence.sum())

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these sequences, both int64 of shape (len(indices), length); IGNORED where nothing is learned."""
        places = self._kept[indices][:, None] * self.length + torch.arange(self.length)
        targets = self._ids[places + 1].long()
        return self._ids[places].long(), targets.masked_fill(~self._is_target[places + 1], IGNORED)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not IGNORED, in nats per token, 0-dim float32.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        targets: int64 (batch, length).
    """
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the documents to train on and of those to validate on, each in the order of the file.

    Args:
        count: Number of documents, at least 2.
        share: Of the documents to validate on; at least one, and all but one at most.
        seed: Decides which.
    """
    held_out = min(max(round(share * count), 1), count - 1)
    chosen = set(torch.randperm(count, generator=generator_of(seed, "validation"))[:held_out].tolist())
    return [index for index in range(count) if index not in chosen], sorted(chosen)


def sequences_of_step(count: int, size: int, *, seed: int, step: int) -> Tensor:
    """The `size` sequences of a step: each epoch is a new permutation of all `count`, and steps run on across its end.

    Depends on (seed, step) alone, so that a resumed run replays nothing.
    """
    places = range(step * size, (step + 1) * size)
    return torch.stack([_permutation(count, seed, place // count)[place % count] for place in places])


def steps_of_epochs(epochs: float, count: int, size: int) -> int:
    """Steps of `size` sequences until each of `count` was seen `epochs` times; at least one."""
    return max(-(-round(epochs * count) // size), 1)


def require_whole_sequence(data: PackedTokens, where: str) -> None:
    """Raise an ArgumentError where the data to train on does not fill one sequence, or holds nothing to learn."""
    if data.size <= data.length or not data.learned:
        raise ArgumentError(
            f"{where}: {data.size} tokens are there to train on, {data.learned} of them to be learned, and one sequence takes "
            f"{data.length} and one more: give more data, or a smaller --length"
        )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_of(seed, f"epoch {epoch}"))
