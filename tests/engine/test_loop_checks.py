"""A loss, its backward and its step belong together: each loop that breaks this is told, with the way out."""

import contextlib
import copy

import pytest
import torch
from models import attached, is_unchanged, loss_of, mlp, regression, train, weights
from torch import nn

import gradlr
from gradlr import AttachError, BackwardError, GradlrWarning, LossError

pytestmark = pytest.mark.also_asynchronous
LATE = pytest.mark.synchronous("told one loss late there: test_asynchronous.py")


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_tracker_that_was_never_shown_a_loss(apply):
    model, _, _ = attached(apply=apply)
    before = weights(model)
    with pytest.raises(LossError, match=r"tracker\(loss\)\.backward\(\)"):
        loss_of(model).backward()
    assert is_unchanged(model, before)


def test_a_second_gradient_before_the_next_loss():
    model, tracker, _ = attached()
    tracker(loss_of(model)).backward()
    before = weights(model)
    with pytest.raises(BackwardError, match='second gradient.*apply="step"'):
        loss_of(model).backward()
    assert is_unchanged(model, before)
    tracker(loss_of(model)).backward()  # and the next shown loss goes on


@LATE
@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_a_scaled_loss_is_refused_in_backward_mode_before_anything_changes(scale):
    model, tracker, _ = attached()
    before = weights(model)
    with pytest.raises(BackwardError, match='multiplied by.*apply="step".*Nothing was changed'):
        (tracker(loss_of(model)) * scale).backward()
    assert is_unchanged(model, before)


def test_a_scaled_loss_is_welcome_in_step_mode():
    model, tracker, opt = attached(apply="step")
    (tracker(loss_of(model)) * 0.25).backward()
    opt.step()


def test_losses_that_are_not_shown_any_more_are_told_once_where_gradients_wait():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    opt.step()
    loss_of(model).backward()
    with pytest.warns(GradlrWarning, match=r"was not shown; the last one it saw was number 1.*tracker\(loss\)"):
        opt.step()
    loss_of(model).backward()
    opt.step()


def test_step_after_a_backward_that_reached_nothing():
    model, tracker, opt = attached()
    copied = copy.deepcopy(model)
    tracker(loss_of(copied)).backward()
    with pytest.raises(AttachError, match="none of the 6 attached parameters.*copy"):
        opt.step()


def test_step_after_a_loss_without_a_graph_and_no_gradient():
    model, tracker, opt = attached()
    tracker(1.5)
    with pytest.warns(GradlrWarning, match="nothing to do.*none of the 6"):
        opt.step()


def test_the_next_loss_after_a_backward_that_reached_nothing_warns():
    model, tracker, _ = attached()
    tracker(loss_of(copy.deepcopy(model))).backward()
    with pytest.warns(GradlrWarning, match="none of the 6"):
        tracker(loss_of(model))


def test_evaluating_between_steps_is_no_trap():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    with torch.no_grad():
        loss_of(model)
    loss_of(copy.deepcopy(model)).backward()  # another model's business
    train(model, opt, tracker, 1)
    opt.step()
    opt.step()


def test_the_update_never_goes_round_the_version_counter():
    """Two forwards before two backwards: autograd itself must notice that the weight has changed. It is told before."""
    model, tracker, _ = attached(mlp(16, 3))
    first, second = loss_of(model), loss_of(model)
    tracker(first).backward()
    with pytest.warns(GradlrWarning, match=r"loss number 2 was computed before.*6 parameters.*modified by an.*apply=\"step\""):
        tracker(second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.synchronous("torch warns once in a process")
def test_create_graph_does_not_spoil_the_graph():
    model, tracker, opt = attached(nn.Linear(6, 6, bias=False))
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.warns(UserWarning, match="create_graph"), pytest.warns(GradlrWarning, match="loss number 1 keeps its graph"):
        tracker(model(x).pow(3).sum()).backward(create_graph=True)
    assert model.weight.grad is None
    assert x.grad is not None


def test_a_backward_that_does_not_pass_through_the_shown_loss():
    """The second half of a GAN's step: the generator's loss reaches the discriminator, whose tracker was shown another one."""
    model, tracker, _ = attached()
    before = weights(model)
    tracker(loss_of(model))
    with pytest.raises(BackwardError, match="does not pass through loss number 1.*a tracker each.*Nothing was changed"):
        loss_of(model).backward()
    assert is_unchanged(model, before)


def test_where_gradients_wait_backwards_add_up_as_in_torch():
    """One of two losses is shown, and not the first to be called: exact at full rank."""
    x, y = regression(8, count=16, dtype=torch.float64)
    results = []
    for is_split in (False, True):
        model, tracker, opt = attached(mlp(8, 2, dtype=torch.float64), apply="step", rank=8, momentum_rank=8)
        first, second = (nn.functional.mse_loss(model(x[rows]), y[rows]) for rows in (slice(8), slice(8, 16)))
        tracker(first)
        if is_split:
            second.backward()
            first.backward()
        else:
            (first + second).backward()
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_tracker_that_is_rolled_back_is_no_second_gradient():
    model, tracker, opt = attached()
    tracker(loss_of(model)).backward()
    state = tracker.state_dict()
    tracker(loss_of(model)).backward()
    tracker.load_state_dict(state)
    tracker(loss_of(model)).backward()


def test_a_loss_of_shape_one_has_a_scalar_scale():
    model, tracker, opt = attached()
    tracker(loss_of(model).reshape(1)).backward()
    assert tracker.scale.shape == ()


def test_two_optimizers_may_share_a_tracker_and_a_loss():
    encoder, decoder = mlp(), mlp(seed=1)
    tracker = gradlr.LossTracker()
    with gradlr.attach(encoder, tracker) as one, gradlr.attach(decoder, tracker) as other:
        for _ in range(2):
            tracker(loss_of(nn.Sequential(encoder, decoder))).backward()
            one.step()
            other.step()
        tracker(loss_of(encoder)).backward()  # the decoder's rest is no trap
        one.step()
        other.step()


def test_accumulating_where_backward_updates_is_told_at_step():
    model, tracker, opt = attached()
    for _ in range(3):
        tracker(loss_of(model)).backward()
    with pytest.warns(GradlrWarning, match='3 backward passes have each updated.*apply="step"'):
        opt.step()
    for _ in range(2):
        tracker(loss_of(model)).backward()
    opt.step()  # told once


class FailingLayer(nn.Module):
    """Identity whose backward fails while `is_failing`."""

    def __init__(self):
        super().__init__()
        self.is_failing = False

    def forward(self, x):
        if self.is_failing:
            x.register_hook(self.fail)
        return x * 1

    def fail(self, gradient):
        raise MemoryError("out of memory")


def failing_model():
    layers = list(mlp())
    return nn.Sequential(*layers[:2], FailingLayer(), *layers[2:])


def test_an_interrupted_backward_is_told_at_the_next_loss_with_what_it_changed():
    model, tracker, opt = attached(failing_model())
    model[2].is_failing = True
    with pytest.raises(MemoryError):
        tracker(loss_of(model)).backward()
    model[2].is_failing = False
    opt.zero_grad()  # the head of an ordinary loop
    with pytest.warns(GradlrWarning, match="loss number 1 did not come to its end.*4 parameters were updated"):
        tracker(loss_of(model)).backward()
    opt.step()
    tracker(loss_of(model)).backward()


def test_each_optimizer_of_a_shared_tracker_drops_its_own_half():
    encoder, decoder, tracker = failing_model(), mlp(seed=1), gradlr.LossTracker()
    one = gradlr.attach(encoder, tracker, apply="step")
    other = gradlr.attach(decoder, tracker, apply="step")
    both, before = nn.Sequential(encoder, decoder), weights(decoder)
    encoder[2].is_failing = True
    with pytest.raises(MemoryError):
        tracker(loss_of(both)).backward()
    one.zero_grad()
    with pytest.raises(BackwardError, match="did not come to its end"):
        other.step()
    assert is_unchanged(decoder, before)


def test_the_sketches_of_an_interrupted_backward_never_join_a_step():
    model, tracker, opt = attached(failing_model(), apply="step")
    shadow, shadow_tracker, shadow_opt = attached(failing_model(), apply="step")
    before = weights(model)
    model[2].is_failing = True
    for call in ("loss", "step", "zero_grad"):
        with pytest.raises(MemoryError):
            tracker(loss_of(model)).backward()
        if call == "loss":
            with pytest.warns(GradlrWarning, match="did not come to its end.*4 parameters\\) are dropped"):
                tracker(loss_of(model))
        elif call == "step":
            with pytest.raises(BackwardError, match="did not come to its end"):
                opt.step()
        else:
            opt.zero_grad()
    assert is_unchanged(model, before)
    model[2].is_failing = False
    train(model, opt, tracker, 1, x=regression(16)[0], y=regression(16)[1])
    train(shadow, shadow_opt, shadow_tracker, 1, x=regression(16)[0], y=regression(16)[1])
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), shadow.parameters(), strict=True))


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_backward_that_ends_well_does_not_hide_one_that_failed(is_shown, is_last):
    """Two losses are there before the first backward: half of one of them must not join the other."""
    model, tracker, opt = attached(failing_model(), apply="step")
    before = weights(model)
    model[2].is_failing = True
    failing = loss_of(model)
    model[2].is_failing = False
    failing = tracker(failing) if is_shown else failing
    sound = tracker(loss_of(model))
    for loss in (sound, failing) if is_last else (failing, sound):
        with pytest.raises(MemoryError) if loss is failing else contextlib.nullcontext():
            loss.backward()
    name = "loss number 1" if is_shown else "a loss that was not shown"
    with pytest.raises(BackwardError, match=f"the backward of {name} did not come to its end.*6 parameters"):
        opt.step()
    assert is_unchanged(model, before) and opt.interrupted == ()
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)


def test_a_step_after_detach():
    model, tracker, opt = attached()
    opt.detach()
    with pytest.raises(AttachError, match="after opt.detach"):
        opt.step()


def test_detaching_while_gradients_wait_is_told_but_not_after_an_error():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    with pytest.warns(GradlrWarning, match="drops the gradients of 6 parameters"):
        opt.detach()
    _, tracker, opt = attached(model, apply="step")
    tracker(loss_of(model)).backward()
    opt.__exit__(KeyError, KeyError(), None)


def test_no_loss_was_shown_since_a_checkpoint_was_loaded():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(LossError, match="since a checkpoint was loaded"):
        loss_of(model).backward()


def test_a_step_that_never_comes_is_told():
    model, tracker, opt = attached(nn.Linear(4, 4), apply="step")
    for _ in range(256):
        tracker(model(torch.randn(2, 4)).square().mean()).backward()
    with pytest.warns(GradlrWarning, match="256 losses wait.*call opt.step"):
        tracker(1.0)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_warning_points_at_the_line_of_the_loop(apply):
    model, tracker, opt = attached(apply=apply)
    tracker(loss_of(model).detach())
    with pytest.warns(GradlrWarning, match="nothing to do") as told:
        opt.step()
    assert [warning.filename for warning in told] == [__file__]
