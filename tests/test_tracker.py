"""LossTracker: what it records, what it refuses, what it tells its listeners."""

import gc
import math
import weakref

import pytest
import torch

import gradlr
from gradlr import CheckpointError, LossError, LossTracker


class Listener:
    def __init__(self):
        self.counts, self.scales = [], []

    def on_loss(self, tracker):
        self.counts.append(tracker.count)

    def on_backward(self, scale):
        self.scales.append(float(scale))


@pytest.mark.parametrize("loss", [2.0, 3, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0, requires_grad=True)])
def test_returns_the_very_same_object(loss):
    assert LossTracker()(loss) is loss


def test_ratio_is_loss_over_running_maximum():
    tracker = LossTracker()
    assert tracker.ratio == 1.0  # nothing known yet
    ratios = []
    for loss in (2.0, 1.0, 4.0, 1.0):
        tracker(loss)
        ratios.append(tracker.ratio)
    assert ratios == [1.0, 0.5, 1.0, 0.25]
    assert tracker.history == [2.0, 1.0, 4.0, 1.0]
    assert (tracker.value, tracker.max_loss, tracker.count) == (1.0, 4.0, 4)


def test_a_given_maximum_wins_and_the_ratio_stays_at_one_above_it():
    tracker = LossTracker(max_loss=2.0)
    tracker(1.0)
    assert tracker.ratio == 0.5
    tracker(8.0)
    assert tracker.ratio == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_recorded_and_changes_no_ratio(bad):
    tracker = LossTracker()
    tracker(4.0)
    tracker(1.0)
    tracker(bad)
    assert tracker.ratio == 0.25
    assert tracker.max_loss == 4.0
    assert str(tracker.value) == str(bad)


def test_negative_losses_have_a_ratio_of_one():
    tracker = LossTracker()
    tracker(-3.0)
    assert tracker.ratio == 1.0


@pytest.mark.parametrize("loss", [torch.ones(3), torch.ones(2, 2), torch.empty(0), "2.0.0", None, torch.tensor(1j)])
def test_what_is_no_real_number_is_refused_and_not_recorded(loss):
    tracker = LossTracker()
    with pytest.raises(LossError, match="tracker"):
        tracker(loss)
    assert tracker.count == 0
    assert tracker.history == []


def test_vector_loss_error_names_the_shape():
    with pytest.raises(LossError, match=r"\(3,\).*mean"):
        LossTracker()(torch.ones(3))


@pytest.mark.parametrize("max_loss", [0.0, -1.0, math.nan, math.inf])
def test_max_loss_out_of_range(max_loss):
    with pytest.raises(gradlr.ArgumentError, match="max_loss"):
        LossTracker(max_loss=max_loss)


@pytest.mark.parametrize("factor", [1.0, 0.25, 1024.0])
def test_the_loss_hook_learns_the_scale_before_any_parameter_hook(factor):
    tracker, listener, order = LossTracker(), Listener(), []
    tracker.subscribe(listener)
    weight = torch.ones(3, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda p: order.append(list(listener.scales)))
    (tracker((weight**2).sum()) * factor).backward()
    assert listener.scales == [factor]
    assert order == [[factor]]
    assert float(tracker.scale) == factor


def test_listeners_are_told_once_per_loss_and_held_weakly():
    tracker, listener = LossTracker(), Listener()
    tracker.subscribe(listener)
    tracker(1.0)
    tracker(torch.tensor(1.0))
    assert listener.counts == [1, 2]
    reference = weakref.ref(listener)
    del listener
    gc.collect()
    assert reference() is None
    tracker(1.0)


def test_listeners_are_told_in_the_order_in_which_they_came():
    """Where processes train together, each listener asks the others: in another order they would answer each other."""
    tracker, told = LossTracker(), []

    class Noting(Listener):
        def on_loss(self, tracker):
            told.append(self)

    listeners = [Noting() for _ in range(20)]
    listeners = listeners[::3] + listeners[1::3] + listeners[2::3]  # not as they lie in memory
    for listener in listeners:
        tracker.subscribe(listener)
    tracker(1.0)
    assert told == listeners


def test_a_loss_does_not_keep_its_tracker_alive():
    tracker = LossTracker()
    loss = (torch.ones(3, requires_grad=True) ** 2).sum()
    reference = weakref.ref(tracker)
    tracker(loss)
    del tracker
    gc.collect()
    assert reference() is None
    loss.backward()


def test_state_dict_round_trip(tmp_path):
    tracker = LossTracker()
    for loss in (3.0, math.nan, 1.5):
        tracker(loss)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    other = LossTracker()
    other.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    assert (other.ratio, other.max_loss, other.count) == (0.5, 3.0, 3)
    assert str(other.history) == str(tracker.history)


def test_a_foreign_state_is_refused_whole():
    tracker = LossTracker()
    tracker(2.0)
    with pytest.raises(CheckpointError, match="running_max"):
        tracker.load_state_dict({"count": 7, "max_loss": None})
    assert tracker.count == 1
