"""The arguments of `python -m gradlr finetune`; every other one is an option of TRL's SFTConfig."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...attach import DEFAULT_LR, DEFAULT_MOMENTUM_RANK
from ...capture.select import CAPTURES
from ..byte_sizes import parse_bytes
from ..lora.export import DEFAULT_RANK as DEFAULT_LORA_RANK

WEIGHTS = ("float32", "bfloat16", "int8")

# Short names of options of SFTConfig: their own name, gradlr's default where it has one, and what they say.
SHORT = {
    "--length": ("max_length", None, "tokens of a sequence (default: the model's, at most 1024)"),
    "--epochs": ("num_train_epochs", 1.0, "times each document is seen (default 1)"),
    "--steps": ("max_steps", None, "optimizer steps, in place of --epochs"),
    "--batch-size": ("per_device_train_batch_size", 8, "sequences that a device takes at a time (default 8)"),
    "--accumulate": ("gradient_accumulation_steps", 1, "such batches a step (default 1)"),
    "--warmup": ("warmup_steps", 0.03, "a share of the steps if below 1 (default 0.03); then a cosine to 0"),
    "--checkpointing": ("activation_checkpointing", False, "compute activations again in backward"),
    "--save-every": ("save_steps", 100, "steps between checkpoints (default 100)"),
    "--eval-every": ("eval_steps", 100, "steps between validations (default 100)"),
    "--log-every": ("logging_steps", 10, "steps between entries of the log (default 10)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on what, how, and where it goes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = "".join(f"  {option:15} {text}; {name}\n" for option, (name, _, text) in SHORT.items())
    parser.epilog = f"of TRL's SFTConfig, whose other options may follow too, such as --report-to wandb:\n{lines}"
    parser.add_argument("--model", required=True, type=Path, metavar="DIR|FILE",
                        help="folder of a transformers causal LM, or a .gguf; a config.json, or a folder without weights, trains "
                             "from scratch")  # fmt: skip
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help=".txt or .jsonl; see docs/finetune.md")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run; called again, it goes on")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever run --out holds")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, if not the model's")
    parser.add_argument("--field", help="field of the .jsonl that holds the text (default text)")
    parser.add_argument("--validation", type=float, default=0.05, metavar="SHARE",
                        help="share of the documents to validate on, at least one (default 0.05)")  # fmt: skip
    parser.add_argument("--validation-data", type=Path, metavar="FILE", help="validate on this file instead")
    parser.add_argument("--lr", type=_rate, default=DEFAULT_LR, metavar="LR|auto",
                        help=f"peak learning rate, or auto: by a range test (default {DEFAULT_LR})")  # fmt: skip
    parser.add_argument("--weights", choices=WEIGHTS, default="float32",
                        help="as what they are held and trained; bfloat16 and int8 are rounded stochastically")  # fmt: skip
    parser.add_argument("--rank", type=_rank, help="r, an int or a fraction of min(m, n) (default: by the loss)")
    parser.add_argument("--momentum-rank", type=_rank, default=DEFAULT_MOMENTUM_RANK,
                        help=f"k, int or fraction (default {DEFAULT_MOMENTUM_RANK})")  # fmt: skip
    parser.add_argument("--capture", choices=CAPTURES, default="hook", help="how gradients are taken; see docs/capture.md")
    parser.add_argument("--memory-limit", type=parse_bytes, metavar="SIZE", help="such as 8GiB; default: all that is free")
    parser.add_argument("--lora-out", type=Path, metavar="DIR", help="also write what was learned as a peft adapter")
    parser.add_argument("--lora-rank", type=_rank, default=DEFAULT_LORA_RANK, help=f"its rank (default {DEFAULT_LORA_RANK})")


def _rate(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _rank(text: str) -> int | float:
    return int(text) if text.strip().isdecimal() else float(text)
