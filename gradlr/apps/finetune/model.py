"""Which model `--model` means."""

from __future__ import annotations

from pathlib import Path

from ...errors import ArgumentError
from .builtin import BuiltinModel


def find_model(name: str, tokenizer: Path | None = None):
    """The model with this name, its config and tokenizer read and its weights not yet.

    Args:
        name: "builtin", a folder of transformers, or a config.json. Nothing is fetched.
        tokenizer: Folder of the tokenizer, where it is not the model's.

    Returns:
        A `BuiltinModel` or a `PretrainedModel`.

    Raises:
        ArgumentError: there is no such path, or something in it is missing or cannot be read.
    """
    path = Path(name)
    if name == "builtin":
        if tokenizer is not None:
            raise ArgumentError(f"--tokenizer {tokenizer}: --model builtin reads bytes; leave --tokenizer out")
        return BuiltinModel()
    if not path.exists():
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
    return PretrainedModel(path, tokenizer)
