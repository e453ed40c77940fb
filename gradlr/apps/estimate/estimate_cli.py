"""`python -m gradlr estimate MODEL`: what training takes, one line for each method."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from ..bench.environment import markdown
from ..byte_sizes import parse_bytes
from .devices import SHARDS
from .estimation import Estimate, estimate_all, kinds
from .methods import METHODS
from .subject import CONFIGS

# The others differ from these by what is known without an estimate.
DEFAULT_METHODS = [name for name in METHODS if name not in ("no_optimizer", "adamw_foreach")]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB, GIB = 2**20, 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its step, and what to print."""
    parser.add_argument("model", help=f"{', '.join(CONFIGS)}, or a path to a transformers config.json or its folder")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--tokens", type=int, help="tokens of one sequence (default 2048, or the model's context)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step (default 1)")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the weights (default: the model's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on which the update's ways are (default cpu)")
    parser.add_argument("--rank", type=int, help="of all methods that have one (default: each one's own)")
    parser.add_argument("--momentum-rank", type=int, help="of gradlr (default 0, no momentum)")
    parser.add_argument("--packed", action="store_true", help="the sequences come as one row, as TRL packs them")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--weights", choices=("int8",), help="of gradlr: as gradlr.quantize_ makes them")
    parser.add_argument("--chunked-head", action="store_true", help="a loss without logits, as gradlr.chunk_head_ makes it")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="what one of N devices takes and sends; needs --shard")
    parser.add_argument("--shard", choices=SHARDS, help="with --gpus: a replica on each (dp), FSDP2, or tensor parallel")
    parser.add_argument("--no-reshard", action="store_true", help="with --shard fsdp: keep each block whole until its backward")
    parser.add_argument("--offload", action="store_true", help="with --shard fsdp: weights, state and updates on the host")
    parser.add_argument("--limit", type=parse_bytes, metavar="24GiB", help="mark the methods that fit into this much memory")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")


def run(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ArgumentError: an option is unknown or out of range.
    """
    given = {"momentum_rank": arguments.momentum_rank, "weights": arguments.weights}
    options = {name: value for name, value in given.items() if value is not None}
    estimates = estimate_all(
        arguments.model, _methods(arguments), rank=arguments.rank, dtype=_DTYPES.get(arguments.dtype), tokens=arguments.tokens,
        device=arguments.device, batch_size=arguments.batch_size, packed=arguments.packed, checkpointing=arguments.checkpointing,
        chunked_head=arguments.chunked_head, gpus=arguments.gpus, shard=arguments.shard, reshard=not arguments.no_reshard,
        offload=arguments.offload, **options,
    )  # fmt: skip
    if arguments.json:
        limit = arguments.limit
        fits = [{} if limit is None else {"fits": one.peak <= limit} for one in estimates]
        print(json.dumps([one.to_dict() | extra for one, extra in zip(estimates, fits, strict=True)], indent=1))
    else:
        print(table(estimates, arguments.limit))
        if arguments.shard is not None:
            print(f"\n{traffic_table(estimates)}")


def _methods(arguments: argparse.Namespace) -> list[str]:
    if arguments.methods is not None:
        return arguments.methods
    # Communicator of gradlr write in step() anyhow.
    twice = {"dp": ["gradlr_step"]}.get(arguments.shard, [])
    return [name for name in DEFAULT_METHODS if arguments.shard in (None, *METHODS[name].shards) and name not in twice]


def table(estimates: Sequence[Estimate], limit: int | None = None) -> str:
    """Estimates of one model as a Markdown table in GiB; with a limit in bytes, whether each fits."""
    shard = estimates[0].shard
    shown = (*kinds(shard), "peak")
    heads = ["method", *shown, *([] if shard is None else ["sent a step"])]
    heads += [] if limit is None else [f"fits {limit / GIB:.4g} GiB"]
    rows = []
    for one in estimates:
        cells = [one.label, *(f"{getattr(one, key) / GIB:.2f}" for key in shown)]
        cells += [] if shard is None else [f"{one.sent / GIB:.2f}"]
        cells += [] if limit is None else ["yes" if one.peak <= limit else "no"]
        rows.append(cells)
    return markdown(heads, rows)


def traffic_table(estimates: Sequence[Estimate]) -> str:
    """The collectives of a step as a Markdown table in MiB: what they move, and what one device of a ring sends."""
    rows = [
        (one.label, part.operation, part.purpose, f"{part.calls:,}", f"{part.handed / MIB:,.2f}", f"{part.sent / MIB:,.2f}")
        for one in estimates
        for part in one.traffic
    ]
    return markdown(("method", "collective", "for", "calls", "moves, MiB", "sent, MiB"), rows)
