"""`python -m gradlr finetune`: all weights of a local causal language model on TRL, from a data file to safetensors."""

from __future__ import annotations

import argparse
import os

from ...errors import ArgumentError
from .options import add_arguments

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run the command, as `finetune_cli.run`; an ArgumentError where the extra is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, and what is missing is told at once
    try:
        from .finetune_cli import run as run_command
    except ImportError as error:
        what = error.name or error
        raise ArgumentError(f"finetune needs {what}, which is not installed: pip install 'gradlr[finetune]'") from error
    return run_command(arguments)
