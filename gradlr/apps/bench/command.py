"""`python -m gradlr bench quality|memory|speed|crossover|devices|estimate`: measure, print, write; `pareto|study`: draw that."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.atomic import write_atomically
from ...errors import ArgumentError
from . import devices, estimate, memory, pareto, quality, speed, study
from .baselines import BASELINES, OWN_BASELINES, SPELLING, require_baselines
from .environment import require_device
from .peers import PEERS, installed_peers
from .workloads import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks and their options."""
    metavar = "quality|memory|speed|crossover|devices|estimate|pareto|study"
    benches = parser.add_subparsers(dest="bench", required=True, metavar=metavar)
    one = benches.add_parser("quality", help="fine-tuning: validation loss at each optimizer's best learning rate")
    one.add_argument("--workload", choices=list(quality.WORKLOADS), default="pretrained", help="what is trained")
    one.add_argument("--baselines", nargs="+", metavar="NAME",
                     help=f"any of {', '.join(BASELINES)}, or {SPELLING}; default: the first six")  # fmt: skip
    one.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    one.add_argument("--steps", type=int, help="optimizer steps a run (default: the workload's)")
    one.add_argument("--batch-size", type=int, help="examples a step (default: the workload's)")
    one.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    one.add_argument("--add", action="store_true", help="put the rows into the report that --out holds already")
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
    five = benches.add_parser("pareto", help="draw results of `quality`: loss against state, and against time")
    six = benches.add_parser("study", help="draw results of `quality`: loss over rank and momentum rank, and schedules")
    for drawing in (five, six):
        drawing.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
        drawing.add_argument("--out", type=Path, required=True, help="the picture, a .png or .svg")
    for bench in (one, two, three):
        bench.add_argument("--peers", nargs="*", choices=list(PEERS), metavar="NAME",
                           help=f"other packages beside: any of {', '.join(PEERS)}; default: those installed, or none "
                           "where baselines are named")  # fmt: skip
    for bench in (three, four):
        bench.add_argument("--tokens", type=int, default=2048)
        bench.add_argument("--width", type=int, default=1024)
        bench.add_argument("--rounds", type=int, default=40)
        bench.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    seven = benches.add_parser("estimate", help="the peak that `gradlr estimate` tells against the measured one")
    seven.add_argument("--models", nargs="+", choices=list(estimate.CASES), default=list(estimate.CASES), metavar="NAME",
                      help=f"any of {', '.join(estimate.CASES)}")  # fmt: skip
    seven.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    eight = benches.add_parser("devices", help="several processes: time of one step and bytes that travel, beside DDP and FSDP2")
    eight.add_argument("--baselines", nargs="+", choices=list(devices.STRATEGIES), default=devices.DEFAULT, metavar="NAME",
                       help=f"any of {', '.join(devices.STRATEGIES)}; default: {', '.join(devices.DEFAULT)}")  # fmt: skip
    eight.add_argument("--processes", type=int, default=2)
    eight.add_argument("--threads", type=int, default=1, help="threads of torch in each process (default 1)")
    for name, default in (("width", 512), ("depth", 4), ("tokens", 1024), ("rank", 32), ("rounds", 20)):
        eight.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    eight.add_argument("--out", type=Path, help="write the report as JSON to this file")
    for bench in (one, two, three, four, seven):
        bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        bench.add_argument("--out", type=Path, help="write the report as JSON to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON where asked for.

    Raises:
        ArgumentError: an option is out of range, the device or the folder of `--out` is not there. Nothing was measured.
    """
    _check(arguments)
    if arguments.bench in _DRAWINGS:
        _DRAWINGS[arguments.bench].write(arguments.results, arguments.out)
        return
    report = _MEASURE[arguments.bench](arguments)
    if getattr(arguments, "add", False):
        report = quality.merged(pareto.read_report(arguments.out), report)
    text = _MODULES[arguments.bench].table(report)
    print(text)
    if arguments.out is not None:
        write_json(arguments.out, {"bench": arguments.bench, **report})


def _measure_quality(arguments: argparse.Namespace) -> dict[str, Any]:
    seeds, options = list(range(arguments.seeds)), {"device": arguments.device, "jobs": arguments.jobs}
    return quality.measure(_contenders(arguments), seeds, _workload(arguments), **options)


def _workload(arguments: argparse.Namespace) -> Workload:
    sizes = {key: getattr(arguments, key) for key in ("steps", "batch_size") if getattr(arguments, key) is not None}
    return quality.WORKLOADS[arguments.workload](**sizes)


def _contenders(arguments: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys([*(arguments.baselines or OWN_BASELINES), *_peers(arguments)]))


def _peers(arguments: argparse.Namespace) -> list[str]:
    if arguments.peers is not None:
        return arguments.peers
    return [] if getattr(arguments, "baselines", None) else installed_peers()


def _measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {key: getattr(arguments, key) for key in ("tokens", "rank", "device")}
    return memory.measure(**options, peers=_peers(arguments))


def _measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    _set_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("tokens", "width", "rank", "rounds", "device", "dtype")}
    if arguments.model == "transformer":
        return speed.measure_transformer(**options, depth=arguments.depth, peers=_peers(arguments))
    return speed.measure(**options)


def _measure_crossover(arguments: argparse.Namespace) -> dict[str, Any]:
    _set_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("tokens", "width", "rounds", "device")}
    return speed.measure_crossover(**options, ranks=tuple(arguments.ranks))


def _measure_devices(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {key: getattr(arguments, key) for key in ("processes", "threads", "width", "depth", "tokens", "rank", "rounds")}
    return devices.measure(**options, names=arguments.baselines)


def _measure_estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.device != "cpu":
        raise ArgumentError(f"--device {arguments.device}: the estimate is that of a CPU, and compared on one")
    _set_threads(arguments.threads)
    return estimate.measure(arguments.models)


def _set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


_DRAWINGS = {"pareto": pareto, "study": study}
_MODULES = {"quality": quality, "memory": memory, "speed": speed, "crossover": speed, "devices": devices,
            "estimate": estimate}  # fmt: skip
_MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "quality": _measure_quality,
    "memory": _measure_memory,
    "speed": _measure_speed,
    "crossover": _measure_crossover,
    "devices": _measure_devices,
    "estimate": _measure_estimate,
}


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _check_addition(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        raise ArgumentError("--add needs --out, the report that the rows are put into")
    held = pareto.read_report(arguments.out)
    if held["workload"]["name"] != arguments.workload:
        raise ArgumentError(f"--out {arguments.out} is about {held['workload']['name']}, not {arguments.workload}")
    seeds = range(arguments.seeds)
    quality.require_same_conditions(held, quality.conditions(seeds, _workload(arguments), arguments.device, arguments.jobs))


def _check(arguments: argparse.Namespace) -> None:
    # Before minutes of measuring, not after.
    numbers = {key: value for key, value in vars(arguments).items() if type(value) is int}
    small = [f"--{key.replace('_', '-')} {value}" for key, value in numbers.items() if value < 1]
    small += [f"--ranks {rank}" for rank in getattr(arguments, "ranks", ()) if rank < 1]
    if small:
        raise ArgumentError(f"{small[0]}: it must be at least 1")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ArgumentError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    if arguments.out is not None and arguments.out.is_dir():
        raise ArgumentError(f"--out {arguments.out}: this is a folder; give a file")
    if arguments.out is not None and not os.access(arguments.out.parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"--out {arguments.out}: the folder {arguments.out.parent} cannot be written")
    if arguments.bench in _DRAWINGS:
        if arguments.out.suffix not in ("", ".png", ".svg"):
            raise ArgumentError(f"--out {arguments.out}: the picture is a .png or .svg")
    else:
        require_device(getattr(arguments, "device", "cpu"))
    if arguments.bench == "devices" or getattr(arguments, "model", None) == "transformer":
        if arguments.width % max(1, arguments.width // 64):
            raise ArgumentError(f"--width {arguments.width}: heads of about 64 do not divide it: give a multiple of 64")
        if arguments.tokens < speed.SEQUENCES:
            raise ArgumentError(f"--tokens {arguments.tokens}: it must be at least {speed.SEQUENCES}, one for each sequence")
    if arguments.bench in ("memory", "speed"):
        require_baselines(_peers(arguments))
    if arguments.bench == "quality":
        require_baselines(_contenders(arguments))
        if arguments.add:
            _check_addition(arguments)
