"""Which model `--model` means: the byte transformer that ships with gradlr, or one of transformers (`pretrained.py`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError
from ..bench.pretrain import CHECKPOINT, load_pretrained
from ..bench.transformer import ByteTransformer
from .packing import Tokens
from .reading import Document

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

FILE = "byte-transformer.pt"


class BuiltinModel:
    """The byte transformer of `gradlr.apps.bench.pretrain`, with its weights; its tokens are bytes.

    Attributes:
        name, is_from_scratch, positions, default_length, padding, note: As in `PretrainedModel`.
    """

    name, is_from_scratch, note = "builtin", False, None
    # What it was pretrained with: position embeddings beyond are untrained.
    positions = default_length = 128
    # Documents were joined by an empty line in pretraining.
    _separator = "\n\n"
    padding = ord(_separator[-1])

    def identity(self) -> str:
        """What tells this model from another one."""
        return f"builtin, {CHECKPOINT.stat().st_size} bytes"

    def tokenize(self, documents: list[Document], path: Path) -> list[Tokens]:
        """Bytes of each document, and an empty line after it.

        Raises:
            ArgumentError: a document is a conversation.
        """
        found = []
        for document in documents:
            if document.messages is not None:
                raise ArgumentError(f"{path}:{document.line}: --model builtin has no chat template for 'messages'")
            parts = [(text.encode(), is_target) for text, is_target in (*document.parts, (self._separator, True))]
            found.append(Tokens([byte for part, _ in parts for byte in part], [flag for part, flag in parts for _ in part]))
        return found

    def load(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """The model with its first weights, on the CPU."""
        return load_pretrained().to(dtype)

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model with fresh weights of this dtype, on torch's default device."""
        return ByteTransformer(**torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["config"]).to(dtype)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of int64 inputs (batch, length)."""
        return model(inputs)

    def save(self, model: nn.Module, folder: Path) -> str:
        """Write the file that `load_pretrained` reads; returns how to load it, {folder} for the folder."""
        saved = {"config": model.config, "model": model.state_dict()}
        write_atomically(folder / FILE, partial(torch.save, saved))
        return f"gradlr.apps.bench.pretrain.load_pretrained('{{folder}}/{FILE}')"


def find_model(name: str, tokenizer: Path | None = None) -> BuiltinModel | PretrainedModel:
    """The model with this name, its config and tokenizer read and its weights not yet.

    Args:
        name: "builtin", a folder of transformers, or a config.json. Nothing is fetched.
        tokenizer: Folder of the tokenizer, where it is not the model's.

    Raises:
        ArgumentError: there is no such path, or something in it is missing or cannot be read.
    """
    if name == "builtin":
        if tokenizer is not None:
            raise ArgumentError(f"--tokenizer {tokenizer}: --model builtin reads bytes; leave --tokenizer out")
        return BuiltinModel()
    if not Path(name).exists():
        raise ArgumentError(
            f"--model {name}: there is no such folder or file. gradlr downloads nothing: if this is a model of the Hugging Face "
            f"hub, fetch it with `hf download {name} --local-dir FOLDER` and give --model FOLDER; without one, --model builtin"
        )
    try:
        from .pretrained import PretrainedModel
    except ImportError as error:
        raise ArgumentError(
            f"--model {name} needs {error.name or 'transformers'}, which is not installed: pip install 'gradlr[finetune]'"
        ) from error
    return PretrainedModel(Path(name), tokenizer)
