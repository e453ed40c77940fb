"""The arguments of `python -m gradlr finetune`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ...attach import DEFAULT_LR, DEFAULT_MOMENTUM_RANK
from ...capture.select import CAPTURES
from ..byte_sizes import parse_bytes
from ..lora.export import DEFAULT_RANK as DEFAULT_LORA_RANK

# Torch takes seeds of 64 bits; a whole number of epochs beyond is a slip of the keyboard.
_MOST = 2**63 - 1
# Sequences, tokens, steps: beyond, too.
_MOST_COUNTED = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on what, how, and where it goes."""
    parser.add_argument("--model", required=True, metavar="DIR|CONFIG|builtin",
                        help="folder of a transformers causal LM; a config.json or folder without weights trains from scratch; "
                             "builtin is a small byte-level transformer")  # fmt: skip
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help=".txt or .jsonl; see docs/finetune.md")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run; called again, it goes on")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever run --out holds")
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    _add_memory(parser.add_argument_group("memory and device"))
    output = parser.add_argument_group("output")
    output.add_argument("--save-every", type=_whole(1), default=100, metavar="STEPS", help="between checkpoints (default 100)")
    output.add_argument("--eval-every", type=_whole(1), default=100, metavar="STEPS", help="between validations (default 100)")
    output.add_argument("--log-every", type=_whole(1), default=10, metavar="STEPS", help="between log lines (default 10)")
    output.add_argument("--lora-out", type=Path, metavar="DIR", help="also write what was learned as a peft adapter")
    output.add_argument("--lora-rank", type=_rank, default=DEFAULT_LORA_RANK, help=f"its rank (default {DEFAULT_LORA_RANK})")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, if not the model's")
    group.add_argument("--field", help="field of the .jsonl that holds the text (default text)")
    group.add_argument(
        "--length", type=_whole(1, 2**20), help="tokens of a sequence (default: the model's, at most 1024; builtin 128)"
    )
    group.add_argument("--validation", type=_number(0, 1), default=0.05, metavar="SHARE",
                       help="share of the documents to validate on, at least one (default 0.05)")  # fmt: skip
    group.add_argument("--validation-data", type=Path, metavar="FILE", help="validate on this file instead")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=_number(0, _MOST), default=1.0, help="times each document is seen (default 1)")
    group.add_argument("--steps", type=_whole(1), help="optimizer steps, in place of --epochs")
    group.add_argument("--batch-size", type=_whole(1), default=8, help="sequences in memory at a time (default 8)")
    group.add_argument("--accumulate", type=_whole(1), default=1, help="such batches a step (default 1)")
    group.add_argument("--lr", type=_number(0), default=DEFAULT_LR, help=f"peak learning rate (default {DEFAULT_LR})")
    group.add_argument("--warmup", type=_number(0, is_open=False), default=0.03, metavar="SHARE|STEPS",
                       help="linear warm-up, a share of the steps if below 1 (default 0.03); then a cosine to 0")  # fmt: skip
    group.add_argument("--weight-decay", type=_number(0, is_open=False), default=0.0, help="of matrices and tables (default 0)")
    group.add_argument("--max-grad-norm", type=_number(0), help="clip the global norm (default: not)")
    group.add_argument("--rank", type=_rank, help="r, an int or a fraction of min(m, n) (default: up to 64, by the loss)")
    group.add_argument("--momentum-rank", type=_rank_or_none, default=DEFAULT_MOMENTUM_RANK,
                       help=f"k, int or fraction (default {DEFAULT_MOMENTUM_RANK})")  # fmt: skip
    group.add_argument("--seed", type=_whole(0, _MOST), default=0, help="of data order, split and random directions (default 0)")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bf16", action="store_true", help="weights in bfloat16, rounded stochastically")
    group.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    group.add_argument("--capture", choices=CAPTURES, default="hook", help="how gradients are taken; see docs/capture.md")
    group.add_argument("--memory-limit", type=parse_bytes, metavar="SIZE", help="such as 8GiB; default: what the device has free")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=device, help="default: cuda if there, else cpu")
    group.add_argument("--shard", choices=["dp", "fsdp"],
                       help="how the processes that torchrun starts share the work: each has a part of every batch, and the "
                            "whole model (dp) or a shard of it (fsdp)")  # fmt: skip


def _whole(least: int, most: int = _MOST_COUNTED) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.strip().isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be a whole number from {least} to {most}")
        return int(text)

    return read


def _number(least: float, most: float = math.inf, *, is_open: bool = True) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value < most or (not is_open and value == least)):
            what = f"above {least:g}" if is_open else f"of at least {least:g}"
            below = "" if most == math.inf else f" and below {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: it must be a number {what}{below}")
        return value

    return read


def _rank_or_none(text: str) -> int | float:
    return 0 if text.strip() == "0" else _rank(text)


def _rank(text: str) -> int | float:
    return _whole(1)(text) if text.strip().isdecimal() else _number(0, 1)(text)
