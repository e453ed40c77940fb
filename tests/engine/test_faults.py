"""Hundreds of random faults in a training loop: no step is ever half taken without a word."""

import copy
import random
import warnings

import pytest
import torch
from models import attached, regression
from torch import nn

import gradlr

WIDTH, DEPTH = 12, 4
PLACES = ("forward", "backward", "gradient", "loss")
ERRORS = (MemoryError, RuntimeError, KeyboardInterrupt, ValueError)
CAPTURES = pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
STEPS = pytest.mark.parametrize("steps", [90, pytest.param(700, marks=pytest.mark.slow)])
pytestmark = [pytest.mark.also_asynchronous, pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")]
LATE = pytest.mark.synchronous("told one loss late there: test_asynchronous.py")


class Fault(nn.Module):
    """The identity, until it is told to fail once: in forward, in backward, or by a gradient that is not finite."""

    def __init__(self):
        super().__init__()
        self.place, self.error = None, None

    def forward(self, x):
        place, self.place = self.place, None
        if place == "forward":
            raise self.error("injected")  # anew: a kept error keeps its frames, and with them the graph
        if place == "backward":
            x.register_hook(self._fail)
        if place == "gradient":
            x.register_hook(lambda gradient: gradient * float("nan"))
        return x * 1

    def _fail(self, gradient):
        raise self.error("injected")


def network():
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), Fault())]
    return nn.Sequential(*layers)


def plan(count, seed=0):
    """(step, place or None, layer, error class), one fault in two steps."""
    generator = random.Random(seed)
    for step in range(count):
        place = generator.choice(PLACES) if generator.random() < 0.5 else None
        yield step, place, generator.randrange(DEPTH), generator.choice(ERRORS)


def loss_of(model, step):
    x, y = regression(WIDTH)
    rows = slice(4 * (step % 16), 4 * (step % 16) + 4)
    return nn.functional.mse_loss(model(x[rows]), y[rows])


def prepare(model, place, layer, error):
    fault = [module for module in model if isinstance(module, Fault)][layer]
    fault.place, fault.error = place, error


def everything(model, opt):
    states = {record.plan.name: opt.state[record.plan.parameter] for record in opt.records}
    return copy.deepcopy([list(model.parameters()), states])


def is_same(one, other):
    weights = all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    states = all(torch.equal(one[1][key][entry], other[1][key][entry]) for key in one[1] for entry in one[1][key])
    return weights and states


def attempt(model, tracker, opt, step, place):
    """One turn of an ordinary loop that goes on after an error; whether there was one."""
    try:
        loss = loss_of(model, step)
        tracker(loss * float("nan") if place == "loss" else loss).backward()
        opt.step()
    except (*ERRORS, gradlr.GradlrError):
        return True
    return False


# A forward that comes before the host has heard of the step left out draws its basis for the step after.
ONE_SIDED = pytest.param("one_sided", marks=pytest.mark.synchronous("other random numbers after a step left out"))


@pytest.mark.parametrize("capture", ["hook", "adaptor", ONE_SIDED])
@STEPS
def test_a_step_is_whole_or_not_at_all(capture, steps):
    """With apply="step" a run of which half the steps fail ends, bit for bit, as the run without them."""
    options = {"apply": "step", "capture": capture, "rank": 4}
    (model, tracker, opt), (shadow, shadow_tracker, shadow_opt) = (attached(network(), **options) for _ in range(2))
    faults = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the step was left out whole", gradlr.GradlrWarning)
        warnings.filterwarnings("ignore", "the backward of loss number", gradlr.GradlrWarning)
        for step, place, layer, error in plan(steps):
            if place is not None:
                prepare(model, place, layer, error)
            attempt(model, tracker, opt, step, place)
            faults += place is not None
            if place is None:
                attempt(shadow, shadow_tracker, shadow_opt, step, None)
            if place is None and faults % 5 == 0:  # after a good step, when the host has heard of the last one that was not
                assert is_same(everything(model, opt), everything(shadow, shadow_opt)), step
    assert faults > 0.45 * steps and opt.skipped > steps / 8


@LATE
@CAPTURES
@STEPS
def test_a_step_that_is_half_taken_is_told(capture, steps):
    """With apply="backward", what an unfinished backward has changed is named, exactly, and told at the next call."""
    model, tracker, opt = attached(network(), capture=capture, rank=4)
    names = [name for name, _ in model.named_parameters()]
    halves = 0
    for step, place, layer, error in plan(steps, seed=1):
        if place is not None:
            prepare(model, place, layer, error)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            has_failed = attempt(model, tracker, opt, step, place)
        changed = {name for name, old, new in zip(names, before, model.parameters(), strict=True) if not torch.equal(old, new)}
        if place is None:
            assert not has_failed and changed == set(names) and opt.interrupted == ()
        elif place in ("forward", "loss"):
            assert not changed
            assert opt.interrupted == () or place == "forward"  # there the last backward is still the one before
        else:
            halves += 1
            assert has_failed and set(opt.interrupted) == changed
            assert changed == {name for name in names if int(name.split(".")[0]) > 3 * layer}
        was_interrupted = [warning for warning in told if "did not come to its end" in str(warning.message)]
        assert len(was_interrupted) <= 1
    assert halves > steps / 6


class Running(gradlr.rules.LowRankPolar):
    """The default rule, until it runs out of memory."""

    is_failing = False

    def update(self, gradient, state, settings):
        if self.is_failing and gradient.shape[0] == WIDTH + 1:
            raise MemoryError("injected")
        return super().update(gradient, state, settings)


def test_a_step_whose_rule_fails_leaves_nothing_for_the_next_one():
    def start():
        torch.manual_seed(0)
        model, rule = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH + 1)), Running()
        return rule, *attached(model, apply="step", rule=rule, rank=4)

    def backward(model, tracker, seed):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        tracker(model(x).square().mean()).backward()

    (rule, model, tracker, opt), (_, shadow, shadow_tracker, shadow_opt) = start(), start()
    before = everything(model, opt)
    backward(model, tracker, 0)
    rule.is_failing = True
    with pytest.raises(MemoryError):
        opt.step()
    rule.is_failing = False
    assert is_same(before, everything(model, opt)) and opt.interrupted == ()
    backward(model, tracker, 1)
    opt.step()
    backward(shadow, shadow_tracker, 1)
    shadow_opt.step()
    assert is_same(everything(model, opt), everything(shadow, shadow_opt))


def test_a_step_that_fails_while_it_writes_names_what_it_has_written(monkeypatch):
    model, tracker, opt = attached(network(), apply="step", rank=4)
    tracker(loss_of(model, 0)).backward()
    real, calls = opt.committer.writer, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments, **options)

    monkeypatch.setattr(opt.committer, "writer", failing)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.warns(gradlr.GradlrWarning, match="2 of 8 parameters were updated"), pytest.raises(KeyboardInterrupt):
        opt.step()
    names = [name for name, _ in model.named_parameters()]
    changed = {name for name, old, new in zip(names, before, model.parameters(), strict=True) if not torch.equal(old, new)}
    assert set(opt.interrupted) == changed and len(changed) == 2
    monkeypatch.undo()
    tracker(loss_of(model, 1)).backward()
    opt.step()
    assert opt.interrupted == ()
