"""`--model`: a causal language model of transformers with its tokenizer, from the disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ...errors import ArgumentError
from .reading import Document

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LONGEST_DEFAULT = 1024


class Language:
    """A folder of transformers, a .gguf, or a config.json to begin from scratch; config and tokenizer are read, weights not yet.

    Args:
        path: The folder or file; a file's folder then also holds the tokenizer, but for a .gguf, which has its own.
        tokenizer: The tokenizer's folder, where it is another one.

    Attributes:
        is_from_scratch: Whether there are no weights to begin with.
        positions: Longest sequence the model takes; None where its config names none.
        default_length: Of a sequence, in tokens.

    Raises:
        ArgumentError: there is no such path; config or tokenizer are missing, cannot be read or do not belong together, or the
            tokenizer has no end-of-text token.
    """

    def __init__(self, path: Path, tokenizer: Path | None) -> None:
        if not path.exists():
            raise ArgumentError(
                f"--model {path}: there is no such folder or file. gradlr downloads nothing: if this is a model of the Hugging "
                f"Face hub, fetch it with `hf download {path} --local-dir FOLDER` and give --model FOLDER"
            )
        transformers.utils.logging.disable_progress_bar()
        self.path, self._folder = path, path if path.is_dir() else path.parent
        self._options: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        # A config.json is asked for by its name: only this is meant, whatever lies beside it.
        self.files = [path] if self._options else [] if path.is_file() else [f for one in _WEIGHTS for f in path.glob(one)]
        self.is_from_scratch = not self.files
        self.config = self._config()
        text_config = self.config.get_text_config()
        self.positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.default_length = min(self.positions or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
        self.tokenizer = self._tokenizer(tokenizer)
        if len(self.tokenizer) > text_config.vocab_size:
            raise ArgumentError(
                f"{path}: the tokenizer has {len(self.tokenizer)} tokens, the model embeddings for {text_config.vocab_size}: "
                "they do not belong together, or tokens were added without model.resize_token_embeddings"
            )

    def require_length(self, length: int | None) -> None:
        """Raise an ArgumentError where the model takes no sequence of so many tokens."""
        if length is None or length < 2 or (self.positions is not None and length > self.positions):
            raise ArgumentError(f"--length {length}: {self.path} takes 2 to {self.positions or 'any number of'} tokens")

    def require_template(self, documents: list[Document], path: Path) -> None:
        """Raise an ArgumentError where a conversation has no chat template, or one that refuses it."""
        for document in documents:
            if "messages" not in document.record:
                return
            where = f"{path}:{document.line}"
            if all(message["role"] != "assistant" for message in document.record["messages"]):
                raise ArgumentError(f"{where}: in this conversation the assistant says nothing: there is nothing to learn")
            if not self.tokenizer.chat_template:
                raise ArgumentError(f"{where}: 'messages' need a chat template, and the tokenizer has none")
            try:
                self.tokenizer.apply_chat_template(document.record["messages"], tokenize=False)
            except Exception as error:  # templates raise what they like
                raise ArgumentError(f"{where}: the chat template refuses this conversation: {error}") from error

    def load(self, dtype: torch.dtype, seed: int) -> Any:
        """The model with its first weights, on the CPU.

        Raises:
            ArgumentError: the weights cannot be read, or do not fill the model.
        """
        if self.is_from_scratch:
            torch.manual_seed(seed)
            return self.skeleton(dtype)
        # Otherwise the blocks of a .gguf would stay packed, which nobody can train.
        unpacked = {"quantization_config": GgufConfig(dequantize=True)} if self._options else {}
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=dtype, local_files_only=True, output_loading_info=True, **self._options, **unpacked
            )
        except Exception as error:
            raise ArgumentError(f"{self.path}: the weights cannot be loaded: {_first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            count = f"{len(missing)} in all"
            raise ArgumentError(f"{self.path}: the weights lack {missing[0]!r} ({count}) of the model in its config")
        if unpacked:  # its weights are ordinary ones; with these marks transformers would neither train nor save them
            vars(model.config).pop("quantization_config", None)
            model.hf_quantizer, model.is_quantized = None, False
        return model

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The model with fresh weights of this dtype, on torch's default device.

        Raises:
            ArgumentError: transformers knows no causal language model of this kind.
        """
        try:
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except ValueError as error:
            raise ArgumentError(f"{self.path}: no causal language model: {_first_line(error)}") from error

    def _config(self) -> Any:
        file = self._folder / "config.json" if self.path.is_dir() else self.path
        if not file.is_file():
            raise ArgumentError(f"{self.path}: no config.json in this folder: it is no model of transformers")
        try:
            return AutoConfig.from_pretrained(self._folder if self._options else file, local_files_only=True, **self._options)
        except Exception as error:
            raise ArgumentError(f"{file}: transformers cannot read it: {_first_line(error)}") from error

    def _tokenizer(self, folder: Path | None) -> Any:
        if folder is not None and not folder.is_dir():
            raise ArgumentError(f"--tokenizer {folder}: there is no such folder")
        options = self._options if folder is None else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder or self._folder, local_files_only=True, **options)
        except Exception as error:
            raise ArgumentError(
                f"{folder or self._folder}: no tokenizer that transformers can load ({_first_line(error)}): put tokenizer.json "
                "and tokenizer_config.json of the model into this folder, or name their folder with --tokenizer"
            ) from error
        if tokenizer.eos_token_id is None:
            raise ArgumentError(f"{folder or self._folder}: the tokenizer has no end-of-text token: set eos_token in its config")
        return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
