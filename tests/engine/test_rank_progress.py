"""The default rank reads into a loss what it says, and no more: where its zero lies, and its unit, change nothing."""

import pytest
import torch
from models import mlp, regression, weights
from torch import nn

import gradlr

WIDTH, STEPS = 48, 60


def run(shown, apply):
    """(weights, ranks) of a run that falls quickly and then hardly, and shows `shown(loss)`: one loss, or several for a step."""
    model, tracker = mlp(WIDTH, 1, dtype=torch.float64), gradlr.LossTracker()
    model[0].bias = None  # Adam's eps is a number in the gradient's unit
    x, y = regression(WIDTH, dtype=torch.float64)
    opt, ranks = gradlr.attach(model, tracker, lr=1e-2, apply=apply), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    for _ in range(STEPS):
        losses = shown((model(x) - y).square().mean())
        for loss in losses if isinstance(losses, tuple) else (losses,):
            tracker(loss).backward(retain_graph=isinstance(losses, tuple))
        ranks.append(opt.records[0].rank)
        opt.step()
        scheduler.step()
    return weights(model), ranks


@pytest.mark.also_asynchronous
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("constant", [100.0, -100.0])
def test_a_constant_added_to_the_loss_changes_nothing(apply, constant):
    plain, ranks = run(lambda loss: loss, apply)
    moved, moved_ranks = run(lambda loss: loss + constant, apply)
    assert moved_ranks == ranks and len(set(ranks)) == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_of_the_loss_changes_nothing(apply, factor):
    plain, ranks = run(lambda loss: loss, apply)
    moved, moved_ranks = run(lambda loss: loss * factor, apply)
    assert moved_ranks == ranks and len(set(ranks)) == 3
    for one, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # rounding of the gradient, over sixty orthogonalized updates


def test_the_rank_begins_full_and_falls_where_the_loss_has_ceased_to():
    _, ranks = run(lambda loss: loss, "backward")
    assert ranks[0] == WIDTH and ranks == sorted(ranks, reverse=True) and ranks[-1] == 32


def test_a_loss_that_is_zero_by_construction_trains_at_full_rank():
    _, ranks = run(lambda loss: loss - loss.detach(), "step")
    assert set(ranks) == {WIDTH}


def test_losses_of_one_step_may_come_in_any_order():
    def split(loss):
        return loss * 0.01, loss * 5 + 7, loss * 0.3 - 1

    (_, ranks), (_, turned) = run(split, "step"), run(lambda loss: split(loss)[::-1], "step")
    assert ranks == turned and len(set(ranks)) >= 3


def test_losses_below_zero_train_at_full_rank_by_loss_which_is_told_once():
    model, tracker = nn.Linear(16, 16), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, rank=gradlr.ByLoss(8))
    ranks = []
    for shift in (4.0, 1.0, -3.0, -2.0, 0.5):
        loss = model(torch.zeros(1, 16)).sum() * 0 + shift
        if shift == -3.0:
            with pytest.warns(gradlr.GradlrWarning, match="loss number 3.*below zero.*ByLoss.*largest rank"):
                tracker(loss)
        else:
            tracker(loss)
        ranks.append(opt.records[0].rank)
    assert ranks == [8, 2, 8, 8, 8]


@pytest.mark.parametrize("steps", [7, 20])
def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_ranks(steps):
    def start():
        model, tracker = nn.Linear(WIDTH, WIDTH), gradlr.LossTracker()
        return model, tracker, gradlr.attach(model, tracker)

    def show(tracker, opt, numbers):
        ranks = []
        for number in numbers:
            tracker(1 + 0.9**number)
            ranks.append(opt.records[0].rank)
        return ranks

    _, tracker, opt = start()
    show(tracker, opt, range(steps))
    saved = opt.state_dict()
    _, other_tracker, other = start()
    other.load_state_dict(saved)
    went_on = show(tracker, opt, range(steps, 80))
    assert show(other_tracker, other, range(steps, 80)) == went_on
    assert len(set(went_on)) >= 2


def test_a_rank_schedule_of_ones_own_still_reads_the_ratio():
    class HalfOfRatio(gradlr.RankSchedule):
        def __call__(self, inputs):
            return int(inputs.ratio * inputs.limit / 2)

        def ceiling(self, limit):
            return limit // 2

    tracker = gradlr.LossTracker()
    opt = gradlr.attach(nn.Linear(16, 16), tracker, rank=HalfOfRatio())
    tracker(4.0)
    tracker(2.0)
    assert opt.records[0].rank == 4
    assert gradlr.RankInputs(0.5, current=1, limit=8).progress == 1.0
