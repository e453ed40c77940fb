"""`python -m gradlr finetune`: full-weight fine-tuning of a local causal language model, from a data file to safetensors."""

from .finetune_cli import run
from .options import add_arguments

__all__ = ["add_arguments", "run"]
