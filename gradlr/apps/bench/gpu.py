"""What there is to know of a GPU, within minutes: the tests, launches beside their counts, time and memory of training steps.

Made to be run once, on the day that a GPU is at hand: what matters most comes first, every result is written as it comes, and
what fails, does not fit or has no time left is told in its place. On a CPU the same is run with tiny models.
"""

from __future__ import annotations

import gc
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ... import rules
from ...checkpoint.atomic import write_json
from ..blocks import checkpoint_blocks
from . import counts, speed
from .environment import environment, markdown
from .llama import LlamaShape, random_llama
from .memory import MIB, peak_of_steps
from .peers import PEERS, Peer
from .train_steps import Baseline, TrainStep, fused_adamw, gradlr, muon, sgd

ROOT = Path(__file__).parents[3]
TESTS = ROOT / "tests" / "gpu"
_RATE = 1e-5
_WARM, _TIMED, _ROUNDS = 2, 3, 3  # steps of a visit, and visits
_TEST_SECONDS = 60
_NO_TIME = {"error": "no time left"}
_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_COMMIT = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@dataclass(frozen=True)
class Setting:
    """A model and a batch.

    Attributes:
        shape: Of the model.
        tokens: A step, as one sequence, or several of `length`.
        is_checkpointing: Whether blocks are computed again in backward.
        length: Of a sequence.
    """

    shape: LlamaShape
    tokens: int
    is_checkpointing: bool
    length: int = 2048

    def described(self) -> dict[str, Any]:
        """For reports."""
        shape, checkpointing = self.shape, "checkpointing" if self.is_checkpointing else "no checkpointing"
        model = f"{shape.depth} blocks of {shape.width} × {shape.mlp}"
        return {"model": model, "tokens": self.tokens, "activations": checkpointing}

    def model(self, device: str) -> nn.Module:
        """A new one, in bfloat16."""
        model = random_llama(self.shape, device, torch.bfloat16)
        if self.is_checkpointing:
            checkpoint_blocks(model, preserve_rng_state=False)
        return model

    def loss(self, model: nn.Module, device: str) -> Callable[[], Tensor]:
        """Mean cross entropy of one batch of random tokens."""
        generator, length = torch.Generator(device).manual_seed(0), min(self.length, self.tokens)
        size = (self.tokens // length, length)
        tokens = torch.randint(self.shape.vocabulary, size, generator=generator, device=device)
        return lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


_1B = LlamaShape(2048, 8192, 16, 32, 8, 128_256, is_tied=True)
_STACK = LlamaShape(4096, 11008, 4, 32, 32, 32_000)
_TINY = LlamaShape(64, 96, 2, 2, 1, 128, is_tied=True)
_FIRST = [(_1B, 2048, False), (_STACK, 2048, False), (_1B, 8192, True), (_STACK, 8192, True)]
_LATER = [(shape, tokens, not is_checkpointing) for shape, tokens, is_checkpointing in _FIRST]
# Of the first each round has all in turn; the others come one after another, where time is left.
SETTINGS = {
    "cuda": [[Setting(*sizes) for sizes in _FIRST], [Setting(*sizes) for sizes in _LATER]],
    "cpu": [[Setting(_TINY, 32, False), Setting(_TINY, 64, True, length=32)], []],
}
SUBJECTS = {
    "cuda": [counts.Subject("matrix", (512, 512)), counts.Subject("matrix", (4096, 4096)), counts.Subject("vector", (4096,))],
    "cpu": [counts.Subject("matrix", (64, 96), rank=8, tokens=32)],
}
_COUNTED = ("hook", "hook_no_residual", "adaptor", "adaptor_no_residual", "step")


def methods() -> list[Baseline]:
    """What is timed, in the order in which it matters; the first is what the others' ratios are to."""
    bare = rules.LowRankPolar(residual=0)
    return [
        Baseline("adamw", "AdamW (fused)", fused_adamw),
        Baseline("hook", "gradlr", gradlr()),
        Baseline("adaptor_no_residual", 'gradlr, capture="adaptor", no residual', gradlr(capture="adaptor", rule=bare)),
        Baseline("adaptor", 'gradlr, capture="adaptor"', gradlr(capture="adaptor")),
        Baseline("step", 'gradlr, apply="step"', gradlr(apply="step")),
        Baseline("dropped", "gradients dropped at once", dropped),
        Baseline("sgd", "SGD", sgd),
        *([Baseline("muon", "Muon", muon)] if hasattr(torch.optim, "Muon") else []),
        PEERS["adamw_8bit"],
        PEERS["lora"],
        replace(PEERS["galore"], label="GaLore, between two projections", make=galore),
    ]


COMPILED = Baseline("compiled", "gradlr, compile=True", gradlr(compile=True))


def dropped(model: nn.Module, lr: float) -> TrainStep:
    """No optimizer, and each gradient freed as it comes: the memory of weights and activations alone."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))

    def step(compute: Callable[[], Tensor]) -> Tensor:
        loss = compute()
        loss.backward()
        return loss

    return TrainStep(step, [])


def galore(model: nn.Module, lr: float) -> TrainStep:
    """galore-torch's, with random projections: an SVD of each gradient would take minutes, once in 200 steps."""
    train_step = PEERS["galore"].make(model, lr)
    plain = train_step.step

    def svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        (m, n), k = matrix.shape, min(matrix.shape)
        return matrix.new_empty(m, k).normal_(0, m**-0.5), matrix.new_ones(k), matrix.new_empty(k, n).normal_(0, n**-0.5)

    def step(compute: Callable[[], Tensor]) -> Tensor:
        with mock.patch("torch.linalg.svd", svd):
            return plain(compute)

    train_step.step = step
    return train_step


class OutOfTime(BaseException):
    """No Exception: nothing on the way, a compiler least of all, takes it for an error of its own."""


class _Run:
    """A report that is written as it grows, and the time that is left for it."""

    def __init__(self, minutes: float, device: str, out: Path | None) -> None:
        self.device, self.kind, self._out = device, torch.device(device).type, out
        self._end = time.monotonic() + 60 * minutes
        self.report: dict[str, Any] = {
            "environment": {**environment(device), "driver": _said(*_DRIVER), "commit": _said(*_COMMIT)},
            "workload": {"minutes": minutes}, "tests": {}, "launches": [], "host": {}, "results": [],
        }  # fmt: skip

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def take(self, work: Callable[[], dict[str, Any]], *, seconds: float = 0.0) -> dict[str, Any]:
        """What the work, which will take so long, returns; or the error that has ended it, no time for it among them."""
        if seconds >= self.seconds_left:
            return dict(_NO_TIME)
        try:
            with _alarm(self.seconds_left):
                found = work()
        except OutOfTime:
            found = dict(_NO_TIME)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        return found

    def write(self) -> None:
        if self._out is not None:
            write_json(self._out, {"bench": "gpu", **self.report})


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def measure(*, minutes: float = 4, device: str = "cuda", out: Path | None = None) -> dict[str, Any]:
    """All of it, in so many minutes.

    Args:
        minutes: After which nothing new begins, and what runs is ended.
        device: "cuda"; on "cpu" tiny models, which says nothing but that the way is free.
        out: Written after every result.
    """
    run = _Run(minutes, device, out)
    run.report["tests"] = run.take(partial(_tested, run))
    for subject in SUBJECTS[run.kind]:
        for form in map(counts.FORMS.__getitem__, _COUNTED if subject.kind == "matrix" else ("hook", "step")):
            name = f"{subject.kind} {' × '.join(map(str, subject.shape))}, {form.label}"
            run.report["launches"].append({"name": name, **run.take(partial(_launched, form, subject, run))})
            run.write()
    run.report["host"] = run.take(partial(speed.measure_host, rounds=5, device=device))
    _train(run)
    run.write()
    return run.report


def _tested(run: _Run) -> dict[str, Any]:
    if not TESTS.is_dir():
        return {"error": f"{TESTS} is not there: run this in a checkout"}
    seconds = min(_TEST_SECONDS, run.seconds_left / 2)
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {seconds:.0f} s"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {"passed": done.returncode == 0, "said": lines[-1:] if done.returncode == 0 else lines[-40:]}


class Kernels:
    """Counts what runs on the GPU inside it: kernels, copies and fills, as the profiler sees them; a stand-in for a `Counter`."""

    def __init__(self) -> None:
        self.counts = counts.Counts()

    def __enter__(self) -> Kernels:
        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.cuda.synchronize()
        self._profile.__exit__(*exception)
        for event in self._profile.events() or ():
            if event.device_type == DeviceType.CUDA:
                self.counts.launches += 1
                self.counts.calls[event.name] = self.counts.calls.get(event.name, 0) + 1


def _launched(form: counts.Form, subject: counts.Subject, run: _Run) -> dict[str, Any]:
    counted = counts.count(form, subject)
    seen = counts.difference(form, subject, Kernels if run.kind == "cuda" else counts.Counter, run.device)
    return {"counted": counted.launches, "seen": seen.launches, "calls": seen.calls}


def _train(run: _Run) -> None:
    """Rounds of visits: in each, every method trains a new model for a few steps; last what has to be compiled first."""
    first, later = SETTINGS[run.kind]
    turns = [(setting, number) for number in range(_ROUNDS) for setting in first]
    turns += [(setting, number) for setting in later for number in range(_ROUNDS)]
    shuffle = random.Random(0)
    for setting, number in turns:
        # The first round in the order of importance.
        for baseline in methods() if number == 0 else shuffle.sample(methods(), len(methods())):
            _visit(baseline, setting, run)
        _tell_ratios(run.report["results"])
    for baseline in (methods()[0], COMPILED):
        _visit(baseline, first[0], run)
    _tell_ratios(run.report["results"])


def _visit(baseline: Baseline, setting: Setting, run: _Run) -> None:
    if isinstance(baseline, Peer) and not baseline.is_installed():
        return
    case = {**setting.described(), "name": baseline.name, "label": baseline.label}
    row = next((row for row in run.report["results"] if case.items() <= row.items()), {**case, "rounds": []})
    if "error" in row:  # it would come again
        return
    start = time.monotonic()
    found = run.take(partial(_trained, baseline, setting, run.device), seconds=row.get("visit_s", 0.0))
    if row["rounds"] and found == _NO_TIME:
        return
    if not row["rounds"]:
        run.report["results"].append(row)
    row["rounds"] += [found.pop("ms")] if "ms" in found else []
    row.update(found, visit_s=round(time.monotonic() - start, 2))
    run.write()


def _trained(baseline: Baseline, setting: Setting, device: str) -> dict[str, Any]:
    model = setting.model(device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    loss = setting.loss(model, device)
    peak, train_step = peak_of_steps(lambda: baseline.make(model, _RATE), loss, steps=_WARM, device=device)
    times = speed.interleaved([lambda: train_step.step(loss)], _TIMED, device, warmup=0)
    found = {"weights_mib": round(weights / MIB, 2), "peak_mib": round(peak / MIB, 2)}
    return {**found, "ms": [round(1e3 * one, 3) for (one,) in times]}


def _tell_ratios(rows: list[dict[str, Any]]) -> None:
    """Medians over all visits; ratios to AdamW's in the same round, and memory beside the least that any way needs."""
    reference = {_case(row): row for row in rows if row["name"] == "adamw"}
    least = {_case(row): row["peak_mib"] for row in rows if row["name"] == "dropped" and "peak_mib" in row}
    for row in rows:
        if not row["rounds"]:
            continue
        beside, floor = reference.get(_case(row), row)["rounds"], least.get(_case(row))
        row["ms"] = round(statistics.median(one for times in row["rounds"] for one in times), 2)
        row["tokens_per_s"] = round(1e3 * row["tokens"] / row["ms"])
        ratios = [statistics.median(one) / statistics.median(other) for one, other in zip(row["rounds"], beside, strict=False)]
        row["ratio"] = round(statistics.median(ratios), 3) if ratios else None
        row["above_least_mib"] = None if floor is None else round(row["peak_mib"] - floor, 2)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["tokens"], row["activations"]


_COLUMNS = {
    "model": "model", "tokens": "tokens", "activations": "", "label": "trained by", "ms": "ms", "ratio": "to AdamW's",
    "tokens_per_s": "tokens/s", "peak_mib": "peak above weights, MiB", "above_least_mib": "above the least", "error": "",
}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: what the tests said, and three tables."""
    tests, keys = report["tests"], ("name", "counted", "seen", "error")
    parts = ["Tests: " + "\n".join(tests.get("said", [tests.get("error", "not run")]))]
    parts.append(
        markdown(("update", "counted", "seen", ""), ([str(row.get(key, "")) for key in keys] for row in report["launches"]))
    )
    parts += [speed.table(report["host"])] if "results" in report["host"] else []
    parts.append(markdown([*_COLUMNS.values()], ([str(row.get(key, "")) for key in _COLUMNS] for row in report["results"])))
    return "\n\n".join(parts)
