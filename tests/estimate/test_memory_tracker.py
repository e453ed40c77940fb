"""The tracker counts births and deaths, and answers what code asks of values that are not there."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradlr.apps.estimate.memory_tracker import MemoryTracker
from gradlr.apps.estimate.stubs import stub_internals


def test_births_and_deaths_are_counted_and_views_are_not():
    with FakeTensorMode(), MemoryTracker() as tracker:
        x = torch.empty(100)
        y = x.view(10, 10).T[2:]
        assert tracker.held["activations"] == 400
        del x
        assert tracker.held["activations"] == 400
        del y
        assert tracker.held["activations"] == 0
        tracker.enter("end")
    assert tracker.peak == tracker.largest["activations"] == 400


def test_kinds_can_be_moved_and_the_peak_follows():
    with FakeTensorMode(), MemoryTracker() as tracker:
        with tracker.counting_as("workspace"):
            x = torch.empty(100)
        tracker.move([x], "state")
        tracker.enter("end")
    assert tracker.at_peak == {"weights": 0, "state": 400, "gradients": 0, "activations": 0, "workspace": 0, "exchange": 0}
    assert tracker.largest["workspace"] == 0


def test_work_of_the_same_form_is_done_once_and_counted_each_time():
    calls = []

    def work():
        calls.append(torch.empty(50).add(1).numel())

    with FakeTensorMode(), MemoryTracker() as tracker:
        tracker.replay("one", work)
        first = tracker.peak
        kept = torch.empty(100)
        tracker.replay("one", work)
        tracker.enter("end")
    assert kept.numel() == 100
    assert calls == [50]
    assert (first, tracker.peak) == (400, 800)


def test_a_step_in_which_nothing_goes_wrong():
    with FakeTensorMode(), MemoryTracker():
        x = torch.empty(7)
        assert x.isfinite().all()
        is_scaled = x[0] != 1
        assert not is_scaled
        assert (x != 1).any()
        assert float(x.sum()) == 1.0
        assert int(torch.arange(7)[-1]) == 6


def test_memory_that_a_storage_is_given_and_loses_is_counted():
    with FakeTensorMode(), MemoryTracker() as tracker, stub_internals(tracker, is_packed=False):
        x = torch.empty(100)
        x.untyped_storage().resize_(0)
        assert tracker.held["exchange"] == tracker.held["activations"] == 0
        x.untyped_storage().resize_(400)
        assert tracker.held["exchange"] == 400
        with tracker.aside():
            y = torch.empty(50)
        assert sum(tracker.held.values()) == 400
        del x, y
        assert sum(tracker.held.values()) == 0
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
