"""The command line: `python -m gradlr demo | estimate | finetune | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import GradlrError
from . import demo, finetune
from .bench import bench_cli as bench
from .estimate import estimate_cli as estimate

COMMANDS = {
    "demo": (demo, "fine-tune a transformer on real text with AdamW and with gradlr"),
    "estimate": (estimate, "memory that training a model takes, for every method"),
    "finetune": (finetune, "fine-tune a local language model on your own data"),
    "bench": (bench, "quality, memory and speed, side by side"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of gradlr are printed without a traceback and give exit status 2."""
    parser = argparse.ArgumentParser(prog="gradlr", description=(__doc__ or "").split("\n")[0])
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(parsers.add_parser(name, help=text, allow_abbrev=False))
    # What finetune does not know is TRL's.
    parsed, further = parser.parse_known_args(arguments)
    if further and parsed.command != "finetune":
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    parsed.further = further
    try:
        return COMMANDS[parsed.command][0].run(parsed) or 0
    except GradlrError as error:
        print(f"gradlr: {error}", file=sys.stderr)
        return 2
