"""Language modelling on real text: the byte transformer, pretrained or from scratch, with large batches or small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .pretrain import load_pretrained, pretrained_of_width
from .text import Corpus, batches, documentation, library_sources, validation_batches
from .transformer import ByteTransformer, evaluate, language_model_loss


@dataclass(frozen=True)
class FineTuning:
    """The shipped byte transformer (0.86 M weights, pretrained on library sources), fine-tuned on documentation strings.

    Attributes:
        length: Bytes a window; the checkpoint knows 128 positions.
        validation_windows: Windows of `length` bytes that the validation loss is the mean over.
    """

    steps: int = 200
    batch_size: int = 8
    warmup: int = 10
    length: int = 128
    validation_windows: int = 256
    name: ClassVar[str] = "pretrained"
    rate_scale: ClassVar[float] = 1.0
    needs_pretrained: ClassVar[bool] = True
    times_apart: ClassVar[bool] = True
    text: ClassVar[Callable[[], Corpus]] = documentation

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training."""
        torch.manual_seed(seed)
        return load_pretrained(device=device)

    def losses(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """One function per step that computes the training loss."""
        device = next(model.parameters()).device
        sizes = {"batch_size": self.batch_size, "length": self.length, "steps": self.steps}
        for inputs, targets in batches(type(self).text().train, seed=seed, **sizes):
            yield partial(language_model_loss, model, inputs.to(device), targets.to(device))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on what is held out, in nats per byte."""
        return {"loss": evaluate(model, self.validation())}

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """The fixed validation batches of 16 windows."""
        count = max(1, self.validation_windows // 16)
        return list(validation_batches(type(self).text().validation, batch_size=16, length=self.length, count=count))


@dataclass(frozen=True)
class FromScratch(FineTuning):
    """A byte transformer of the same shape, trained from its initialization on library sources."""

    name = "scratch"
    needs_pretrained = False
    text = library_sources

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training."""
        torch.manual_seed(seed)
        return ByteTransformer(context=self.length).to(device)


@dataclass(frozen=True)
class SmallBatches(FineTuning):
    """`FineTuning` with 256 bytes a step, where gradients are noisy and momentum matters."""

    batch_size: int = 2
    name = "small-batches"


@dataclass(frozen=True)
class Wide(FineTuning):
    """`FineTuning` of a byte transformer of another width: how the rank must grow with it.

    Attributes:
        width: Of the model, a multiple of 32.
    """

    width: int = 256
    name = "wide"

    def __post_init__(self) -> None:
        if self.width % 32:
            raise ArgumentError(f"width {self.width}: heads are of 32, so give a multiple of that")

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training; pretrained when it is first asked for, which takes minutes."""
        torch.manual_seed(seed)
        return load_pretrained(pretrained_of_width(self.width), device)
