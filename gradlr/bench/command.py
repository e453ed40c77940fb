"""`python -m gradlr bench quality|memory|speed`: measure, print a table, write JSON with the environment."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..files import write_atomically
from . import memory, quality, speed
from .contenders import CONTENDERS
from .environment import require_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three benchmarks and their options."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="quality|memory|speed")
    one = benches.add_parser("quality", help="fine-tuning: validation loss at each optimizer's best learning rate")
    one.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME",
                     help=f"any of {', '.join(CONTENDERS)}; all by default")  # fmt: skip
    one.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    one.add_argument("--steps", type=int, default=quality.Workload.steps, help="optimizer steps a run")
    one.add_argument("--batch-size", type=int, default=quality.Workload.batch_size, help="windows of 128 bytes a step")
    one.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    two = benches.add_parser("memory", help="peak memory above 100 MiB of parameters")
    two.add_argument("--tokens", type=int, default=64)
    two.add_argument("--rank", type=int, default=16)
    three = benches.add_parser("speed", help="time of one step against plain forward + backward")
    three.add_argument("--tokens", type=int, default=2048)
    three.add_argument("--width", type=int, default=1024)
    three.add_argument("--rank", type=int, default=32)
    three.add_argument("--rounds", type=int, default=40)
    three.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    for bench in (one, two, three):
        bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        bench.add_argument("--out", type=Path, help="write the report as JSON to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON where asked for.

    Raises:
        ArgumentError: an option is out of range, the device or the folder of `--out` is not there. Nothing was measured.
    """
    _check(arguments)
    if arguments.bench == "quality":
        workload = quality.Workload(steps=arguments.steps, batch_size=arguments.batch_size)
        seeds = list(range(arguments.seeds))
        report = quality.measure(arguments.contenders, seeds, workload, device=arguments.device, jobs=arguments.jobs)
        text = quality.table(report)
    elif arguments.bench == "memory":
        report = memory.measure(tokens=arguments.tokens, rank=arguments.rank, device=arguments.device)
        text = memory.table(report)
    else:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        sizes = {"tokens": arguments.tokens, "width": arguments.width, "rank": arguments.rank, "rounds": arguments.rounds}
        report = speed.measure(**sizes, device=arguments.device)
        text = speed.table(report)
    print(text)
    if arguments.out is not None:
        write_json(arguments.out, {"bench": arguments.bench, **report})


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _check(arguments: argparse.Namespace) -> None:
    # Before minutes of measuring, not after.
    numbers = {key: value for key, value in vars(arguments).items() if isinstance(value, int)}
    small = [f"--{key.replace('_', '-')} {value}" for key, value in numbers.items() if value < 1]
    if small:
        raise ArgumentError(f"{small[0]}: it must be at least 1")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ArgumentError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    require_device(arguments.device)
    if arguments.bench == "quality" and "muon" in arguments.contenders and not hasattr(torch.optim, "Muon"):
        raise ArgumentError(f"torch {torch.__version__} has no Muon: install 2.9 or later, or leave muon out of --contenders")
