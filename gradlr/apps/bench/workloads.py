"""What is trained in a comparison: model, data, schedule and validation of each workload, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One training task, the same for every optimizer.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples a step.
        warmup: Steps of linear warm-up; linear decay to a tenth follows.
        name: For arguments and reports.
        rate_scale: Factor on every baseline's grid of learning rates; the grid still grows where its edge is best.
        needs_pretrained: Adapters on frozen weights make sense.
    """

    steps: int
    batch_size: int
    warmup: int = 10
    name: ClassVar[str]
    rate_scale: ClassVar[float] = 1.0
    needs_pretrained: ClassVar[bool] = True

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rate at a step counted from 0; the same schedule for every baseline."""
        return min(1.0, (step + 1) / self.warmup) * (1.0 - 0.9 * step / self.steps)

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training; what is drawn at random depends on the seed alone."""
        raise NotImplementedError

    def losses(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """One function per step that computes the training loss; the data's order depends on the seed alone."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on held-out data in nats, and `accuracy` where there are classes."""
        raise NotImplementedError
