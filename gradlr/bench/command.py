"""`python -m gradlr bench quality|memory|speed|crossover|estimate`: measure, print a table, write JSON with the environment."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..files import write_atomically
from . import estimate, memory, quality, speed
from .contenders import CAPTURE_CONTENDERS, CONTENDERS
from .environment import require_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks and their options."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="quality|memory|speed|crossover|estimate")
    one = benches.add_parser("quality", help="fine-tuning: validation loss at each optimizer's best learning rate")
    default = [name for name in CONTENDERS if name not in CAPTURE_CONTENDERS]
    one.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=default, metavar="NAME",
                     help=f"any of {', '.join(CONTENDERS)}; default: all but {', '.join(CAPTURE_CONTENDERS)}")  # fmt: skip
    one.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    one.add_argument("--steps", type=int, default=quality.Workload.steps, help="optimizer steps a run")
    one.add_argument("--batch-size", type=int, default=quality.Workload.batch_size, help="windows of 128 bytes a step")
    one.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    two = benches.add_parser("memory", help="peak memory above 100 MiB of parameters")
    two.add_argument("--tokens", type=int, default=64)
    two.add_argument("--rank", type=int, default=16)
    three = benches.add_parser("speed", help="time of one step: of a Linear, or of a whole transformer")
    three.add_argument("--model", choices=("linear", "transformer"), default="linear")
    three.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    three.add_argument("--rank", type=int, default=32)
    three.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and inputs")
    four = benches.add_parser("crossover", help="time of one Linear's step by rank: from where on hooks are faster")
    four.add_argument("--ranks", type=int, nargs="+", default=(), help="default: shares of the width from 1/32 to 3/8")
    for bench in (three, four):
        bench.add_argument("--tokens", type=int, default=2048)
        bench.add_argument("--width", type=int, default=1024)
        bench.add_argument("--rounds", type=int, default=40)
        bench.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    five = benches.add_parser("estimate", help="the peak that `gradlr estimate` tells against the measured one")
    five.add_argument("--models", nargs="+", choices=list(estimate.CASES), default=list(estimate.CASES), metavar="NAME",
                      help=f"any of {', '.join(estimate.CASES)}")  # fmt: skip
    five.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    for bench in (one, two, three, four, five):
        bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        bench.add_argument("--out", type=Path, help="write the report as JSON to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON where asked for.

    Raises:
        ArgumentError: an option is out of range, the device or the folder of `--out` is not there. Nothing was measured.
    """
    _check(arguments)
    report = _MEASURE[arguments.bench](arguments)
    text = _MODULES[arguments.bench].table(report)
    print(text)
    if arguments.out is not None:
        write_json(arguments.out, {"bench": arguments.bench, **report})


def _measure_quality(arguments: argparse.Namespace) -> dict[str, Any]:
    workload = quality.Workload(steps=arguments.steps, batch_size=arguments.batch_size)
    seeds = list(range(arguments.seeds))
    return quality.measure(arguments.contenders, seeds, workload, device=arguments.device, jobs=arguments.jobs)


def _measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    return memory.measure(tokens=arguments.tokens, rank=arguments.rank, device=arguments.device)


def _measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    _set_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("tokens", "width", "rank", "rounds", "device", "dtype")}
    if arguments.model == "transformer":
        return speed.measure_transformer(**options, depth=arguments.depth)
    return speed.measure(**options)


def _measure_crossover(arguments: argparse.Namespace) -> dict[str, Any]:
    _set_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("tokens", "width", "rounds", "device")}
    return speed.measure_crossover(**options, ranks=tuple(arguments.ranks))


def _measure_estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.device != "cpu":
        raise ArgumentError(f"--device {arguments.device}: the estimate is that of a CPU, and compared on one")
    _set_threads(arguments.threads)
    return estimate.measure(arguments.models)


def _set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


_MODULES = {"quality": quality, "memory": memory, "speed": speed, "crossover": speed, "estimate": estimate}
_MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "quality": _measure_quality,
    "memory": _measure_memory,
    "speed": _measure_speed,
    "crossover": _measure_crossover,
    "estimate": _measure_estimate,
}


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _check(arguments: argparse.Namespace) -> None:
    # Before minutes of measuring, not after.
    numbers = {key: value for key, value in vars(arguments).items() if isinstance(value, int)}
    small = [f"--{key.replace('_', '-')} {value}" for key, value in numbers.items() if value < 1]
    small += [f"--ranks {rank}" for rank in getattr(arguments, "ranks", ()) if rank < 1]
    if small:
        raise ArgumentError(f"{small[0]}: it must be at least 1")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ArgumentError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    require_device(arguments.device)
    if arguments.bench == "quality" and "muon" in arguments.contenders and not hasattr(torch.optim, "Muon"):
        raise ArgumentError(f"torch {torch.__version__} has no Muon: install 2.9 or later, or leave muon out of --contenders")
