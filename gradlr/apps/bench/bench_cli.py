"""`python -m gradlr bench quality|memory|speed|counts|...`: measure, print, write; `pareto|front|study`: draw."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.atomic import write_json
from ...errors import ArgumentError
from . import counts, devices, estimate, figures, fits, gpu, head, int8, memory, quality, speed
from .baselines import BASELINES, OWN_BASELINES, SPELLING, baseline, require_baselines
from .environment import require_device
from .peers import PEERS, installed_peers
from .workloads import WORKLOADS

_HELP = {
    "quality": "fine-tuning: validation loss at each optimizer's best learning rate",
    "memory": "peak memory above 100 MiB of parameters",
    "head": "an output head with logits and without: peak memory and time of a step",
    "int8": "peak memory with int8 weights, these included",
    "speed": "time of one step: of a Linear, or of a whole transformer",
    "counts": "what one update asks of a GPU: launches, bytes, waits and workspace, counted without one",
    "gpu": "all there is to know of a GPU in a few minutes: tests, launches, time and memory of training steps",
    "crossover": "time of one Linear's step by rank: from where on hooks are faster",
    "devices": "several processes: time of one step and bytes that travel, beside DDP and FSDP2",
    "estimate": "the peak that `gradlr estimate` tells against the measured one",
    "fits": "which models fit on which cards, trained in which ways: estimates",
    "pareto": "draw results of `quality`: loss against state, and against time",
    "front": "draw results of `quality` on SmolLM2: loss against what is forgotten, and against state",
    "study": "draw results of `quality`: loss over rank and momentum rank, and schedules",
}
_DRAWINGS = ("pareto", "front", "study")
_MODULES = {
    "quality": quality,
    "memory": memory,
    "head": head,
    "int8": int8,
    "speed": speed,
    "counts": counts,
    "gpu": gpu,
    "crossover": speed,
    "devices": devices,
    "estimate": estimate,
    "fits": fits,
}
# Options that are integers of at least 1, with their defaults; threads of torch are its own choice where None.
_NUMBERS: dict[str, dict[str, int | None]] = {
    "quality": {"seeds": 3, "steps": None, "batch-size": None, "width": None, "jobs": os.cpu_count() or 1},
    "memory": {"tokens": 64, "rank": 16},
    "head": {"vocabulary": 32768, "width": 576, "tokens": 2048, "rounds": 3, "threads": None},
    "int8": {"tokens": 64, "rank": 16},
    "speed": {"tokens": 2048, "width": 1024, "depth": 2, "rank": 32, "rounds": 40, "threads": None},
    "counts": {"tokens": 2048, "rank": 64},
    "gpu": {"minutes": 4},
    "crossover": {"tokens": 2048, "width": 1024, "rounds": 40, "threads": None},
    "devices": {"processes": 2, "threads": 1, "width": 512, "depth": 4, "tokens": 1024, "rank": 32, "rounds": 20},
    "estimate": {"threads": None},
    "fits": {"tokens": 2048},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks and their options."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="|".join(_HELP))
    made = {name: benches.add_parser(name, help=text) for name, text in _HELP.items()}
    for name, numbers in _NUMBERS.items():
        for option, default in numbers.items():
            own = "torch's own choice" if option == "threads" else "the workload's"
            made[name].add_argument(f"--{option}", type=int, default=default, help=f"default {default or own}")
    quality_parser, speed_parser = made["quality"], made["speed"]
    quality_parser.add_argument("--workload", choices=list(WORKLOADS), default="pretrained", help="what is trained")
    named = f"any of {', '.join(BASELINES)}, or {SPELLING}; default: {', '.join(OWN_BASELINES)}"
    quality_parser.add_argument("--baselines", nargs="+", metavar="NAME", help=named)
    resumed = "file of runs, one a line: what it holds is not done again, and what is done is added to it"
    quality_parser.add_argument("--resume", type=Path, metavar="RUNS.jsonl", help=resumed)
    quality_parser.add_argument("--stored", action="store_true", help="run nothing: tell what the file of --resume holds")
    models = "what is trained; small: 200 Linears of 16 × 16, of which the host's time is told beside Muon's"
    speed_parser.add_argument("--model", choices=("linear", "small", "transformer", "smollm2"), default="linear", help=models)
    dtypes = ("float32", "bfloat16", "float16")
    speed_parser.add_argument("--dtype", choices=dtypes, default="float32", help="of weights and inputs")
    made["counts"].add_argument("--dtype", choices=dtypes, default="bfloat16", help="of weights and inputs")
    shapes = "matrices, such as 4096x11008; default: three of them, an embedding and a vector"
    made["counts"].add_argument("--shapes", nargs="+", default=(), metavar="MxN", help=shapes)
    ranks = "default: shares of the width from 1/32 to 3/8"
    made["crossover"].add_argument("--ranks", type=int, nargs="+", default=(), help=ranks)
    for name, option, choices in (
        ("devices", "--baselines", devices.STRATEGIES),
        ("estimate", "--models", estimate.CASES),
        ("fits", "--models", fits.MODELS),
    ):
        text = f"any of {', '.join(choices)}; default: all"
        made[name].add_argument(option, nargs="+", choices=list(choices), default=list(choices), metavar="NAME", help=text)
    peers = f"other packages beside: any of {', '.join(PEERS)}; default: those installed, or none where baselines are named"
    for name in ("quality", "memory", "speed"):
        made[name].add_argument("--peers", nargs="*", choices=list(PEERS), metavar="NAME", help=peers)
    for name in ("quality", "memory", "head", "int8", "speed", "crossover", "estimate"):
        made[name].add_argument("--device", default="cpu", help="cpu (default) or cuda")
    made["gpu"].add_argument("--device", default="cuda", help="cuda (default), or cpu with tiny models, to see that it runs")
    for name in _MODULES:
        made[name].add_argument("--out", type=Path, help="write the report as JSON to this file")
    for name in _DRAWINGS:
        made[name].add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
        made[name].add_argument("--out", type=Path, required=True, help="the picture, a .png or .svg")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON where asked for.

    Raises:
        ArgumentError: an option is out of range, the device or the folder of `--out` is not there. Nothing was measured.
    """
    _check(arguments)
    if arguments.bench in _DRAWINGS:
        figures.write(arguments.bench, arguments.results, arguments.out)
        return
    report = _measure(arguments)
    print(_MODULES[arguments.bench].table(report))
    if arguments.out is not None:
        write_json(arguments.out, {"bench": arguments.bench, **report})


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    bench, given = arguments.bench, vars(arguments)
    numbers = {key: given[key] for key in _NUMBERS[bench] if key in given}
    if bench == "devices":
        return devices.measure(**numbers, names=arguments.baselines)
    if numbers.pop("threads", None) is not None:
        torch.set_num_threads(arguments.threads)
    if bench == "quality":
        sizes = {key: given[key] for key in ("steps", "batch_size", "width") if given[key] is not None}
        if "width" in sizes and arguments.workload != "wide":
            raise ArgumentError(f"--width {arguments.width}: only --workload wide has one")
        workload, seeds = WORKLOADS[arguments.workload](**sizes), list(range(arguments.seeds))
        where = {"device": arguments.device, "jobs": arguments.jobs}
        if arguments.stored:
            store = quality.RunStore(arguments.resume, workload, arguments.device)
            names = arguments.baselines or list(dict.fromkeys(run.baseline for run in store))
            return quality.report([baseline(name) for name in names], seeds, store, workload, **where)
        return quality.measure(chosen(arguments), seeds, workload, **where, resume=arguments.resume)
    if bench == "memory":
        return memory.measure(**numbers, device=arguments.device, peers=_peers(arguments))
    if bench in ("head", "int8"):
        return _MODULES[bench].measure(**numbers, device=arguments.device)
    if bench == "crossover":
        return speed.measure_crossover(**numbers, device=arguments.device, ranks=tuple(arguments.ranks))
    if bench == "gpu":
        return gpu.measure(**numbers, device=arguments.device, out=arguments.out)
    if bench == "counts":
        return counts.measure(**numbers, dtype=arguments.dtype, shapes=arguments.shapes)
    if bench == "estimate":
        return estimate.measure(arguments.models)
    if bench == "fits":
        return fits.measure(arguments.models, **numbers)
    options = {**numbers, "device": arguments.device, "dtype": arguments.dtype}
    if arguments.model == "transformer":
        return speed.measure_transformer(**options, peers=_peers(arguments))
    if arguments.model == "smollm2":
        kept = {key: options[key] for key in ("tokens", "rounds", "device")}
        return speed.measure_language_model(**kept, peers=arguments.peers or ())
    if arguments.model == "small":
        return speed.measure_host(rounds=options["rounds"], device=arguments.device)
    del options["depth"]
    return speed.measure(**options)


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Names of the baselines that `bench quality` compares: those asked for, or all that can be."""
    return list(dict.fromkeys([*(arguments.baselines or OWN_BASELINES), *_peers(arguments)]))


def _peers(arguments: argparse.Namespace) -> list[str]:
    if arguments.peers is not None:
        return arguments.peers
    return [] if getattr(arguments, "baselines", None) else installed_peers()


def _check(arguments: argparse.Namespace) -> None:
    # Before minutes of measuring, not after.
    given = vars(arguments)
    numbers = [(key, value) for key, value in given.items() if type(value) is int]
    numbers += [("ranks", rank) for rank in given.get("ranks", ())]
    for key, value in numbers:
        if value < 1:
            raise ArgumentError(f"--{key.replace('_', '-')} {value}: it must be at least 1")
    for shape in given.get("shapes", ()):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise ArgumentError(f"--shapes {shape}: write rows and columns as 4096x11008")
    if arguments.out is not None:
        _check_out(arguments.out, is_picture=arguments.bench in _DRAWINGS)
    if "device" in given:
        require_device(arguments.device)
    if arguments.bench == "estimate" and arguments.device != "cpu":
        raise ArgumentError(f"--device {arguments.device}: the estimate is that of a CPU, and compared on one")
    if arguments.bench == "devices" or given.get("model") == "transformer":
        if arguments.width % max(1, arguments.width // 64):
            raise ArgumentError(f"--width {arguments.width}: heads of about 64 do not divide it: give a multiple of 64")
        if arguments.tokens < speed.SEQUENCES:
            raise ArgumentError(f"--tokens {arguments.tokens}: it must be at least {speed.SEQUENCES}, one for each sequence")
    if given.get("stored") and arguments.resume is None:
        raise ArgumentError("--stored tells what a file of runs holds: name it with --resume RUNS.jsonl")
    if "peers" in given:
        require_baselines(chosen(arguments) if arguments.bench == "quality" else _peers(arguments))


def _check_out(out: Path, *, is_picture: bool) -> None:
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"--out {out}: the folder {out.parent} does not exist or cannot be written; make it first")
    if out.is_dir():
        raise ArgumentError(f"--out {out}: this is a folder; give a file")
    if is_picture and out.suffix not in ("", ".png", ".svg"):
        raise ArgumentError(f"--out {out}: the picture is a .png or .svg")
