"""`python -m gradlr estimate MODEL`: what training takes, one line for each method."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence

import torch

from ..errors import ArgumentError
from .estimation import Estimate, estimate_all
from .ledger import KINDS
from .methods import METHODS
from .shapes import SHAPES

# The others differ from these by what is known without an estimate.
DEFAULT_METHODS = [name for name in METHODS if name not in ("no_optimizer", "sgd", "adamw_foreach")]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its step, and what to print."""
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, or a path to a transformers config.json or its folder")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="NAME", help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--tokens", type=int, help="tokens of one sequence (default 2048, or the model's context)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step (default 1)")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the weights (default: the model's own)")
    parser.add_argument("--rank", type=int, help="of all methods that have one (default: each one's own)")
    parser.add_argument("--momentum-rank", type=int, help="of gradlr (default 4)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--limit", metavar="24GiB", help="mark the methods that fit into this much memory")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")


def run(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ArgumentError: an option is unknown or out of range.
    """
    limit = None if arguments.limit is None else bytes_of(arguments.limit)
    options = {} if arguments.momentum_rank is None else {"momentum_rank": arguments.momentum_rank}
    estimates = estimate_all(
        arguments.model, arguments.methods, rank=arguments.rank, dtype=_DTYPES.get(arguments.dtype), tokens=arguments.tokens,
        batch_size=arguments.batch_size, checkpointing=arguments.checkpointing, **options,
    )  # fmt: skip
    if arguments.json:
        fits = [{} if limit is None else {"fits": one.peak <= limit} for one in estimates]
        print(json.dumps([one.to_dict() | extra for one, extra in zip(estimates, fits, strict=True)], indent=1))
    else:
        print(table(estimates, limit))


def table(estimates: Sequence[Estimate], limit: int | None = None) -> str:
    """Estimates of one model as a Markdown table in GiB; with a limit in bytes, whether each fits."""
    last = "" if limit is None else f" fits {limit / GIB:.4g} GiB |"
    lines = [f"| method | {' | '.join(KINDS)} | peak |{last}", "|---" * (len(KINDS) + (2 if limit is None else 3)) + "|"]
    for one in estimates:
        sizes = " | ".join(f"{getattr(one, key) / GIB:.2f}" for key in (*KINDS, "peak"))
        verdict = "" if limit is None else f" {'yes' if one.peak <= limit else 'no'} |"
        lines.append(f"| {one.label} | {sizes} |{verdict}")
    return "\n".join(lines)


def bytes_of(text: str) -> int:
    """ "24GiB" as 25769803776.

    Raises:
        ArgumentError: it is no positive number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): count for unit, count in _UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ArgumentError(f"--limit {text}: give a number with one of {', '.join(_UNITS)}, such as 24GiB")
    return int(float(found[1]) * units[found[2].lower()])
