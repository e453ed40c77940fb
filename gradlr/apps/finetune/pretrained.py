"""`--model FOLDER`: a causal language model of transformers with its tokenizer, from the disk alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...errors import ArgumentError
from .packing import Tokens
from .reading import Document

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LONGEST_DEFAULT = 1024
# Documents that the tokenizer gets in one call.
_CHUNK = 1024


class PretrainedModel:
    """A folder of transformers, or a config.json to begin from scratch.

    Args:
        path: The folder, or a config.json, whose folder then also holds the tokenizer.
        tokenizer: The tokenizer's folder, where it is another one.

    Attributes:
        name: For people.
        is_from_scratch: Whether there are no weights to begin with.
        positions: Longest sequence the model takes; None where its config names none.
        default_length: Sequence length where none was asked for.
        padding: Token that fills up the last sequence.
        note: What else the user should know; None for nothing.

    Raises:
        ArgumentError: config or tokenizer are missing, cannot be read or do not belong together, or the tokenizer has no
            end-of-text token.
    """

    def __init__(self, path: Path, tokenizer: Path | None) -> None:
        self.name = str(path)
        self._folder = path if path.is_dir() else path.parent
        # A file is asked for by its name: only its config is meant, whatever lies beside it.
        self._weights = [] if path.is_file() else [file for pattern in _WEIGHTS for file in self._folder.glob(pattern)]
        self.is_from_scratch = not self._weights
        self.config = _config(path)
        text_config = self.config.get_text_config()
        self.positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.default_length = min(self.positions or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
        self.tokenizer = _tokenizer(tokenizer or self._folder)
        self.padding: int = self.tokenizer.eos_token_id
        self.note: str | None = None
        known, embedded = len(self.tokenizer), text_config.vocab_size
        if known > embedded:
            raise ArgumentError(
                f"{self.name}: the tokenizer has {known} tokens, the model embeddings for {embedded}: they do not belong "
                "together, or tokens were added without model.resize_token_embeddings"
            )

    def identity(self) -> str:
        """What tells this model from another one: names and sizes of its files, and the config itself."""
        files = sorted((file.name, file.stat().st_size) for file in self._weights)
        what = [files, self.config.to_json_string(), len(self.tokenizer)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def tokenize(self, documents: list[Document], path: Path) -> list[Tokens]:
        """Tokens of each document, the end-of-text token last; what the tokenizer puts in front stays in front.

        Raises:
            ArgumentError: a conversation, and no chat template or one that refuses it.
        """
        found = []
        for start in range(0, len(documents), _CHUNK):
            chunk = documents[start : start + _CHUNK]
            if chunk[0].messages is not None:
                found += [self._conversation(document, document.messages or (), path) for document in chunk]
                continue
            heads = self._encode([document.parts[0][0] for document in chunk], is_beginning=True)
            tails = self._encode(["".join(text for text, _ in document.parts[1:]) for document in chunk], is_beginning=False)
            for document, head, tail in zip(chunk, heads, tails, strict=True):
                flags = [document.parts[0][1]] * len(head) + [True] * (len(tail) + 1)
                found.append(Tokens([*head, *tail, self.padding], flags))
        return found

    def _encode(self, texts: list[str], *, is_beginning: bool) -> list[list[int]]:
        if not any(texts):
            return [[] for _ in texts]
        found = self.tokenizer(texts, add_special_tokens=is_beginning, truncation=False, padding=False, verbose=False).input_ids
        # Some tokenizers end every text themselves, a prompt too.
        return [ids[:-1] if ids and ids[-1] == self.padding else ids for ids in found]

    def _conversation(self, document: Document, messages: tuple[dict[str, Any], ...], path: Path) -> Tokens:
        template = self.tokenizer.chat_template
        if not template:
            raise ArgumentError(f"{path}:{document.line}: 'messages' need a chat template, and the tokenizer has none")
        marks = any(mark in template for mark in ("{% generation %}", "{%- generation", "{% generation"))
        if not marks:
            self.note = "the chat template does not mark what the assistant says: every token of a conversation is learned"
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": marks}
        try:
            found = self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # templates raise what they like
            raise ArgumentError(f"{path}:{document.line}: the chat template refuses this conversation: {error}") from error
        ids = list(found["input_ids"])
        flags = [bool(mark) for mark in found["assistant_masks"]] if marks else [True] * len(ids)
        is_ended = bool(ids) and ids[-1] == self.padding
        return Tokens(ids if is_ended else [*ids, self.padding], flags if is_ended else [*flags, True])

    def load(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """The model with its first weights, on the CPU.

        Raises:
            ArgumentError: the weights cannot be read, or do not fill the model.
        """
        if self.is_from_scratch:
            torch.manual_seed(seed)
            return self.skeleton(dtype)
        transformers.utils.logging.disable_progress_bar()
        options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(self._folder, **options)
        except Exception as error:
            raise ArgumentError(f"{self.name}: the weights cannot be loaded: {_first_line(error)}") from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            count = f"{len(missing)} in all"
            raise ArgumentError(f"{self.name}: the weights lack {missing[0]!r} ({count}) of the model in config.json")
        return model

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model with fresh weights of this dtype, on torch's default device.

        Raises:
            ArgumentError: transformers knows no causal language model of this kind.
        """
        try:
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except ValueError as error:
            raise ArgumentError(f"{self.name}: no causal language model: {_first_line(error)}") from error

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of int64 inputs (batch, length)."""
        return model(input_ids=inputs, use_cache=False).logits

    def save(self, model: Any, folder: Path) -> str:
        """Write safetensors, config and tokenizer into the folder; returns how to load it, {folder} for the folder."""
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return "transformers.AutoModelForCausalLM.from_pretrained('{folder}')"


def _config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ArgumentError(f"{path}: no config.json in this folder: it is no model of transformers")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True)
    except Exception as error:
        raise ArgumentError(f"{file}: transformers cannot read it: {_first_line(error)}") from error


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ArgumentError(
            f"{folder}: no tokenizer that transformers can load ({_first_line(error)}): put tokenizer.json and "
            "tokenizer_config.json of the model into this folder, or name their folder with --tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ArgumentError(f"{folder}: the tokenizer has no end-of-text token: set eos_token in tokenizer_config.json")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
