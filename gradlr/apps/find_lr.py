"""A learning rate from a range test: a few dozen steps on a rising rate, after which the model is what it was."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attach import DEFAULT_LR, attach
from ..errors import ArgumentError, LossError, NonFiniteError
from ..layers.quantize import find_directions
from ..linalg.int8 import stored_parts
from ..optimizer import GradLR
from ..rules.base import require_positive
from ..tracker import LossTracker

Batch = TypeVar("Batch")

# Two batches tell a rate that helps from one that does not: they are the same ones at every rate.
_PROBES = 2
_BAR = 40


@dataclass(frozen=True)
class LrRange:
    """What a range test has seen; printed, a line for every other rate.

    Attributes:
        lr: The rate that it suggests.
        rates: Those that were tried, rising.
        losses: Mean loss of the probes after a step at each of them.
        start: That of the model as it came.
    """

    lr: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    start: float

    def __str__(self) -> str:
        lowest, highest = min(self.losses), max(self.start, *self.losses)
        span = max(highest - lowest, 1e-12)
        lines = [f"lr {self.lr:.1e}, from {len(self.rates)} rates; loss before {self.start:.4f}"]
        chosen = self.rates.index(self.lr)
        for index in range(chosen % 2, len(self.rates), 2):
            bar = "█" * round(_BAR * (self.losses[index] - lowest) / span)
            mark = " ← lr" if index == chosen else ""
            lines.append(f"  {self.rates[index]:.1e}  {self.losses[index]:9.4f}  {bar}{mark}")
        return "\n".join(lines)


def find_lr(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    *,
    lowest: float = 1e-6,
    highest: float = 1e-2,
    steps: int = 40,
    **options: Any,
) -> LrRange:
    """Train on a rising rate until the loss no longer falls, and say which rate to use; the model is left as it was, to the bit.

    Two batches are kept aside, and their loss is taken after each step, with the same random numbers each time: the rate after
    which it is lowest is the one. A copy of weights and buffers lies in the CPU's memory meanwhile.

    Args:
        model: Not attached; its mode (`train()` or `eval()`) stays.
        batches: What a loader yields, on the model's device, three at least; those after the first two are trained on, again
            and again where there are fewer than `steps`.
        loss_of: The loss of a batch, a tensor with one element.
        lowest, highest: First and last rate.
        steps: Rates in between, evenly spaced on a logarithmic scale; one step each.
        options: As `attach` takes them, those that you will train with. Rates in `groups` and `kinds` keep their ratio to `lr`.

    Returns:
        The rate and what it was chosen from; print it.

    Raises:
        ArgumentError: an argument is out of range, or there are too few batches; those of `attach` too.
        LossError: no rate lowers the loss.

    Source: the range test of L. Smith, arXiv 1506.01186, section 3.3, on a fixed probe.
    """
    require_positive("lowest", lowest)
    if not (lowest < highest < math.inf and isinstance(steps, int) and steps >= 2):
        raise ArgumentError(f"find_lr: lowest={lowest}, highest={highest}, steps={steps}; needed is lowest < highest, 2 steps")
    with _forked_random_numbers(model):  # a loader draws from them too
        given = list(itertools.islice(batches, _PROBES + steps))
    if len(given) <= _PROBES:
        raise ArgumentError(f"find_lr: {len(given)} batches; two are the probe, and at least one is trained on")
    reference = require_positive("lr", options.pop("lr", DEFAULT_LR))
    rates = [lowest * (highest / lowest) ** (index / (steps - 1)) for index in range(steps)]
    with _restored(model):
        opt = attach(model, LossTracker(), lr=reference, **options)
        try:
            if opt.processes > 1:
                raise ArgumentError(f"find_lr: {opt.processes} processes train this model; find the rate in one of them, first")
            start = _probe(model, given[:_PROBES], loss_of)
            found = list(_losses(opt, model, given, loss_of, start, [rate / reference for rate in rates]))
        finally:
            opt.detach()
    return _chosen(rates[: len(found)], found, start)


def _losses(
    opt: GradLR,
    model: nn.Module,
    batches: list[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    start: float,
    factors: list[float],
) -> Iterator[float]:
    """Of the probe, after a step at each rate, until it lies as far above the start as it has fallen below."""
    own = [group["lr"] for group in opt.param_groups]
    shown: list[float] = []
    best = start
    for factor, batch in zip(factors, itertools.cycle(batches[_PROBES:])):
        for group, lr in zip(opt.param_groups, own, strict=True):
            group["lr"] = lr * factor
        try:
            opt.zero_grad()
            loss = loss_of(model, batch)
            opt.tracker(loss)
            loss.backward()
            opt.step()
        except NonFiniteError:
            return
        shown.append(loss.item())
        found = _probe(model, batches[:_PROBES], loss_of)
        if not (math.isfinite(found) and math.isfinite(shown[-1])):
            return
        yield found
        best = min(best, found)
        # The spread of the losses themselves stands for a fall where there was none yet.
        if len(shown) > 2 and found > start + max(start - best, statistics.stdev(shown)):
            return


@torch.no_grad()
def _probe(model: nn.Module, batches: list[Batch], loss_of: Callable[[nn.Module, Batch], Tensor]) -> float:
    # The same random numbers for a dropout each time: what moves is the weights' doing.
    with _forked_random_numbers(model):
        torch.manual_seed(0)
        return statistics.fmean(loss_of(model, batch).item() for batch in batches)


def _forked_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    device = next(model.parameters(), torch.empty(0)).device
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Weights, buffers and torch's random numbers are afterwards what they were before."""
    held = [part for tensor in (*model.parameters(), *model.buffers()) for part in stored_parts(tensor)]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in held]
    with _forked_random_numbers(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(held, copies, strict=True):
                    tensor.copy_(copy)
            find_directions(model)


def _chosen(rates: list[float], losses: list[float], start: float) -> LrRange:
    # A mean of three, so that one lucky batch is no minimum.
    smooth = [statistics.fmean(losses[max(0, index - 1) : index + 2]) for index in range(len(losses))]
    lowest = min(smooth, default=start)
    if not lowest < start:
        raise LossError(
            f"find_lr: none of {len(losses)} rates from {rates[0] if rates else 0:.1e} on lowers the loss of two batches, "
            f"{start:.4f} before: is `loss_of` the loss of what is trained? More, or larger, batches may tell"
        )
    return LrRange(rates[smooth.index(lowest)], tuple(rates), tuple(losses), start)
