"""What lies on a CUDA device is not waited for: it is told at the next loss. Shown with flags that only pretend to lie there."""

import pytest
import torch

from gradlr import BackwardError, LossTracker, NonFiniteError
from gradlr.engine.loop_checks import BackwardWatch


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch):
    """The copy to pinned memory needs CUDA; what is left is that nobody reads before it is time."""
    monkeypatch.setattr("gradlr.engine.loop_checks.AsyncScalar", lambda scalar: scalar)


class OnDevice:
    """A scalar that counts how often the host asks for its value."""

    is_cuda = True

    def __init__(self, value):
        self.value, self.reads = value, 0

    def read(self):
        self.reads += 1
        return float(self.value)


def backward(watch, scale):
    watch.backward_begins(scale)
    watch._tracker.has_begun = True
    watch.gradient_arrives("first.weight", None)


def shown(*, is_immediate=True):
    tracker = LossTracker()
    tracker(2.0)
    return tracker, BackwardWatch(tracker, 6, is_immediate=is_immediate)


def test_a_flag_on_the_device_is_read_at_the_next_loss_only():
    _, watch = shown()
    good, bad = OnDevice(True), OnDevice(False)
    watch.require_finite("first.weight", good)
    watch.require_finite("second.weight", bad)
    assert good.reads == bad.reads == 0
    with pytest.raises(NonFiniteError, match=r"'second\.weight'.*number 1.*one loss late"):
        watch.loss_shown(pending=0)
    watch.loss_shown(pending=0)  # told once


def test_a_scale_on_the_device_is_read_at_the_next_loss_and_says_that_it_is_too_late():
    _, watch = shown()
    backward(watch, OnDevice(1.0))
    watch.loss_shown(pending=0)
    backward(watch, OnDevice(4.0))
    with pytest.raises(BackwardError, match="multiplied by 4.*The update has been applied"):
        watch.loss_shown(pending=0)


def test_where_weights_change_in_step_any_scale_is_right():
    _, watch = shown(is_immediate=False)
    backward(watch, torch.tensor(0.25))
    watch.loss_shown(pending=0)
