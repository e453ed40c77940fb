"""`python -m gradlr finetune`: full-weight fine-tuning of a local causal language model, from a data file to safetensors."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
