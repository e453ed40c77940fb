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


@pytest.mark.parametrize("losses", [[-3.0], [2.0, -1.0], [4.0, -1.0, 1.0], [0.0, 0.0]])
def test_a_ratio_that_says_nothing_is_one(losses):
    tracker = LossTracker()
    for loss in losses:
        tracker(loss)
    assert tracker.ratio == 1.0


def progress_of(losses):
    """After each of them, that of all before it."""
    tracker, found = LossTracker(), []
    for loss in (*losses, 0.0):
        tracker(float(loss))
        found.append(tracker.progress)
    return found[1:]


def test_half_of_an_even_fall_is_recent():
    found = progress_of(range(2000, 0, -1))
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(0.5, abs=2e-3)  # of 1 / steps, for the sums, and the noise that a slope looks like


@pytest.mark.parametrize(("losses", "low", "high"), [
    ([0.9**step for step in range(400)], 0.0, 0.1),  # all fell long ago
    ([(1 + step) ** -0.5 for step in range(400)], 0.2, 0.4),  # (4/3 - 8/7) / (2 - 8/7) / (8/9) = 0.25
    ([-1.0] * 300 + [-1 - 0.01 * step for step in range(60)], 0.65, 0.75),  # all fell at the end
    (list(range(400)), 1.0, 1.0),  # rises
    ([5.0] * 400, 1.0, 1.0),
    ([8.0] + [2.0] * 399, 1.0, 1.0),  # one step is no trend
    ([2.0] * 100 + [1e6] + [2.0] * 299, 1.0, 1.0),
    ([1e300, -1e300] * 5, 1.0, 1.0),
])  # fmt: skip
def test_progress_tells_where_the_loss_fell(losses, low, high):
    assert low <= progress_of(losses)[-1] <= high


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_a_loss_is_no_fall(seed):
    generator = torch.Generator().manual_seed(seed)
    found = progress_of(torch.randn(500, generator=generator, dtype=torch.float64).tolist())
    # Two standard deviations of the mean that matters are allowed for, so that it dips below rarely, and not by much.
    assert sum(found) / len(found) > 0.97


@pytest.mark.parametrize("change", [lambda x: x + 100, lambda x: x - 100, lambda x: x * 1e-3, lambda x: 1e3 * x - 5e3])
def test_progress_knows_neither_zero_nor_unit_of_a_loss(change):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200, generator=generator, dtype=torch.float64) * 0.1
    losses = [4 / (1 + step / 5) + float(extra) for step, extra in enumerate(noise)]
    plain, moved = progress_of(losses), progress_of(map(change, losses))
    assert moved == pytest.approx(plain, abs=1e-9)  # rounding of losses a thousand times as large
    assert min(plain) < 0.3


def test_what_waits_for_a_step_is_one_loss_with_its_mean():
    class Waiting(Listener):
        waiting = ()

    def show(losses):
        tracker, listener = LossTracker(), Waiting()
        tracker.subscribe(listener)
        for step in losses:
            for place, loss in enumerate(step):
                listener.waiting = step[:place]
                tracker(float(loss))
        listener.waiting = ()
        tracker(0.0)
        return tracker.progress

    steps = [(0.1 + 0.8**step, 9.0 + 0.8**step, -4.0) for step in range(50)]
    means = [(sum(step) / 3,) for step in steps]
    backwards = [step[::-1] for step in steps]
    assert show(steps) == pytest.approx(show(means), abs=1e-9) == pytest.approx(show(backwards), abs=1e-9)
    assert show(steps) < 0.4


@pytest.mark.usefixtures("asynchronous")
def test_progress_is_the_same_where_losses_are_read_late():
    losses = [0.9**step for step in range(60)]
    tracker, found = LossTracker(), []
    for loss in (*losses, 0.0):
        tracker(torch.tensor(loss, dtype=torch.float64))
        found.append(tracker.progress)
    assert found[1:] == progress_of(losses)


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
    assert str(other.state_dict()) == str(tracker.state_dict())
    assert str(other.history) == str(tracker.history)


def test_a_foreign_state_is_refused_whole():
    tracker = LossTracker()
    tracker(2.0)
    with pytest.raises(CheckpointError, match="running_max"):
        tracker.load_state_dict({"count": 7, "max_loss": None})
    assert tracker.count == 1


def test_the_record_of_an_earlier_version_is_taken_and_its_trend_begins_anew():
    tracker = LossTracker()
    for loss in (3.0, 2.0, 1.0):
        tracker(loss)
    saved = {key: value for key, value in tracker.state_dict().items() if key not in ("trend", "is_signed")}
    tracker.load_state_dict(saved)
    assert (tracker.ratio, tracker.progress) == (1 / 3, 1.0)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: [-1, *t[1:]], lambda t: ["1", *t[1:]], lambda t: [1.5, *t[1:]],
                                    lambda t: [*t[:6], 2.0, *t[7:]], lambda t: None])  # fmt: skip
def test_a_damaged_trend_is_refused(change):
    saved = LossTracker().state_dict()
    with pytest.raises(CheckpointError, match="'trend'"):
        LossTracker().load_state_dict({**saved, "trend": change(saved["trend"])})
