"""`python -m gradlr bench quality|memory|speed`: measure, print a table, write JSON with the environment."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import memory, quality, speed
from .contenders import CONTENDERS


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
    """Measure, print the table, write the JSON where asked for."""
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
    """Write whole or not at all: a temporary file beside the target, then a rename."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.replace(file.name, path)
