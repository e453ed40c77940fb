"""The sixty lines of docs/algorithm.md are the rule: run as they stand there, beside `LowRankPolar`, in float64."""

import re
from pathlib import Path

import pytest
import torch

import gradlr
from gradlr.gradient import Dense
from gradlr.rules import LowRankPolar, UpdateContext

PAGE = Path(gradlr.__file__).parents[1] / "docs" / "algorithm.md"
# The rule as it is without momentum, and what a momentum adds.
CODE, MOMENTUM = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)

STEPS = 8
SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}
# r at each step, where k = 4. At 10 two of the shapes have nothing left for the residual; below 4 the momentum shrinks with r.
RANKS = {"fixed": [6] * STEPS, "falling": [10, 8, 6, 4, 4, 3, 2, 2], "rising": [1, 2, 3, 4, 5, 6, 8, 10]}
MOMENTUM_RANK = 4
# float64: rounding of 1e-16, times 485 for five Newton–Schulz steps (3.4445 each, near zero), times a thousand for the small
# directions that the orthonormal basis, the power steps and the residual's scaling divide by: 5e-11.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def documented(name):
    names = {}
    exec(CODE + MOMENTUM, names)
    return names[name]


def context(step, rank, momentum_rank=MOMENTUM_RANK):
    return UpdateContext(rank, momentum_rank, 0.9, step, torch.Generator().manual_seed(step))


def fresh_columns(n, step, rank):
    return torch.randn(n, rank, dtype=torch.float64, generator=context(step, rank).generator) / n**0.5


def gradients(shape, seed=0):
    """With a common part of a few directions, which momentum can follow, and noise of full rank."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    common = torch.randn(m, 3, dtype=torch.float64, generator=generator) @ torch.randn(
        3, n, dtype=torch.float64, generator=generator
    )
    return [common + torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def both(shape, ranks, residual, given):
    """Direction and momentum of the rule and of the page, step by step, each from its own state."""
    update_of, rule = documented("with_momentum"), LowRankPolar(residual=residual)
    state = rule.init(torch.Size(shape), context(1, max(ranks)), dtype=torch.float64, device=torch.device("cpu"))
    left, right = torch.zeros_like(state["P"]), torch.zeros_like(state["R"])
    for step, (gradient, rank) in enumerate(zip(given, ranks, strict=True), start=1):
        direction, left, right = update_of(gradient, left, right, fresh_columns(shape[1], step, rank), residual=residual)
        update, state = rule.update(Dense(gradient.clone()), state, context(step, rank))
        yield update.direction(), direction, state["P"] @ state["R"].mT, left @ right.mT


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 6, 10])
@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_the_page_is_the_rule_without_momentum(shape, rank, residual):
    update_of, rule = documented("low_rank_polar"), LowRankPolar(residual=residual)
    for step, gradient in enumerate([*gradients(shape), torch.zeros(shape, dtype=torch.float64)], start=1):
        theirs = update_of(gradient, fresh_columns(shape[1], step, rank), residual)
        update, state = rule.update(Dense(gradient.clone()), {}, context(step, rank, momentum_rank=0))
        assert state == {}
        assert bool(theirs.any()) == bool(gradient.any())
        torch.testing.assert_close(update.direction(), theirs, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_the_page_is_the_rule_with_momentum(shape, ranks, residual):
    for ours, theirs, momentum, page_momentum in both(shape, ranks, residual, gradients(shape)):
        assert ours.norm() > 0
        torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(momentum, page_momentum, **CLOSE)


def test_a_step_without_gradient_changes_nothing_in_either():
    given = gradients((24, 10))
    given[3] = torch.zeros_like(given[3])
    for step, (ours, theirs, momentum, page_momentum) in enumerate(both((24, 10), RANKS["fixed"], 0.5, given)):
        assert bool(ours.any()) == bool(theirs.any()) == (step != 3)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(momentum, page_momentum, **CLOSE)


def test_it_fits_on_a_page():
    assert len([line for line in (CODE + MOMENTUM).splitlines() if line.strip()]) <= 60
