"""`--model builtin`: the byte transformer that ships with gradlr; its tokens are bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError
from ..bench.pretrain import CHECKPOINT, load_pretrained
from ..bench.transformer import VOCABULARY, ByteTransformer
from ..estimate import checkpoint_blocks
from .packing import Tokens
from .reading import Document

FILE = "byte-transformer.pt"


class BuiltinModel:
    """The byte transformer of `gradlr.apps.bench.pretrain`, with its weights.

    Attributes:
        name, is_from_scratch, positions, default_length, padding: As in `PretrainedModel`.
    """

    name = "builtin"
    is_from_scratch = False
    # What it was pretrained with: position embeddings beyond are untrained.
    positions = default_length = 128
    # Documents were joined by an empty line in pretraining.
    _separator = b"\n\n"
    padding = _separator[-1]
    note = None

    def identity(self) -> str:
        """What tells this model from another one."""
        return f"builtin, {CHECKPOINT.stat().st_size} bytes"

    def tokenize(self, documents: list[Document], path: Path) -> list[Tokens]:
        """Bytes of each document, and an empty line after it.

        Raises:
            ArgumentError: a document is a conversation.
        """
        for document in documents:
            if document.messages is not None:
                raise ArgumentError(f"{path}:{document.line}: --model builtin has no chat template for 'messages'")
        return [self._tokens(document) for document in documents]

    def _tokens(self, document: Document) -> Tokens:
        parts = [(list(text.encode()), is_target) for text, is_target in [*document.parts, (self._separator.decode(), True)]]
        return Tokens([byte for part, _ in parts for byte in part], [flag for part, flag in parts for _ in part])

    def check_vocabulary(self) -> None:
        """Every byte is in the vocabulary."""
        if VOCABULARY < 256:
            raise ArgumentError(f"the byte transformer knows {VOCABULARY} of 256 bytes")

    def load(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """The model with its first weights, on the CPU."""
        return load_pretrained().to(dtype)

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model without its weights."""
        config = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["config"]
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return ByteTransformer(**config)
        finally:
            torch.set_default_dtype(usual)

    def enable_checkpointing(self, model: nn.Module) -> None:
        """Keep each block's input for backward, and nothing from inside it."""
        checkpoint_blocks(model)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of int64 inputs (batch, length)."""
        return model(inputs)

    def save(self, model: nn.Module, folder: Path) -> str:
        """Write the file that `apps.bench.pretrain.load_pretrained` reads, and tell how to load it, {folder} its folder."""
        saved: dict[str, Any] = {"config": model.config, "model": model.state_dict()}
        write_atomically(folder / FILE, partial(torch.save, saved))
        return f"gradlr.apps.bench.pretrain.load_pretrained('{{folder}}/{FILE}')"
