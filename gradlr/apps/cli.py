"""The command line: `python -m gradlr demo | estimate | finetune | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import GradlrError
from . import demo, finetune
from .bench import bench_cli as bench
from .estimate import command as estimate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of gradlr are printed without a traceback and give exit status 2."""
    parser = argparse.ArgumentParser(prog="gradlr", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|estimate|finetune|bench")
    demo.add_arguments(commands.add_parser("demo", help="fine-tune a transformer on real text with AdamW and with gradlr"))
    estimate.add_arguments(commands.add_parser("estimate", help="memory that training a model takes, for every method"))
    finetune.add_arguments(commands.add_parser("finetune", help="fine-tune a local language model on your own data"))
    bench.add_arguments(commands.add_parser("bench", help="quality, memory and speed, side by side"))
    parsed = parser.parse_args(arguments)
    runs = {"demo": demo.run, "estimate": estimate.run, "finetune": finetune.run, "bench": bench.run}
    try:
        return runs[parsed.command](parsed) or 0
    except GradlrError as error:
        print(f"gradlr: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
