"""`python -m gradlr demo`: fine-tune a transformer on real text with tuned AdamW and with gradlr, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import ArgumentError
from ..bench.environment import require_device
from .results import print_table, write_figure, write_results
from .training import METHODS, Plan, train

INTERRUPTED_STATUS = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo; the defaults take about a minute on two CPU cores."""
    parser.add_argument("--out", type=Path, default=Path("gradlr-demo"), help="folder for the results (default gradlr-demo)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each method (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and random directions")


def run(arguments: argparse.Namespace) -> int:
    """Train with both methods, print the table, write report.png, results.json and the fine-tuned model.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        ArgumentError: an option is out of range, or the device is not there.
    """
    steps, seed, device, out = arguments.steps, arguments.seed, arguments.device, arguments.out
    if steps < 1 or seed < 0:
        raise ArgumentError(f"--steps {steps} --seed {seed}: steps must be at least 1, the seed at least 0")
    require_device(device)
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps, seed, device)
    try:
        records = [train(method, plan, out) for method in METHODS]
    except KeyboardInterrupt:
        print("\ninterrupted")
        return INTERRUPTED_STATUS
    print_table(records)
    print(f"wrote {write_figure(records, out)}\nwrote {write_results(records, plan, out)}")
    print(f"wrote {out / 'gradlr-fine-tuned.pt'}: load it with gradlr.apps.bench.pretrain.load_pretrained(path)")
    return 0
