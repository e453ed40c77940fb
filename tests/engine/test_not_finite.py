"""NaN and infinity, in a loss, a gradient or an update: a step is left out, or an error names what was changed."""

import copy

import pytest
import torch
from models import attached, is_unchanged, loss_of, mlp, train, weights
from torch import nn

import gradlr
from gradlr import GradlrWarning, NonFiniteError
from gradlr.gradient import Dense

pytestmark = pytest.mark.also_asynchronous
LATE = pytest.mark.synchronous("told one loss late there: test_asynchronous.py")


@LATE
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_whole_step_out(apply, bad, capture):
    model, tracker, opt = attached(apply=apply, capture=capture)
    train(model, opt, tracker, 2)
    before, state = weights(model), copy.deepcopy(opt.state_dict())

    def one_step():
        tracker(loss_of(model) * bad).backward()
        opt.step()

    with pytest.warns(GradlrWarning, match=r"left out whole: loss number 3 is (nan|inf)"):
        one_step()
    assert is_unchanged(model, before)
    assert opt.skipped == 1
    torch.testing.assert_close(state["state"], opt.state_dict()["state"], rtol=0, atol=0)
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)
    assert opt.skipped == 1


@LATE
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_bad_loss_leaves_out_the_step_of_those_only_that_its_backward_reaches(apply):
    encoder, decoder, tracker = mlp(), mlp(seed=1), gradlr.LossTracker()
    one, other = (gradlr.attach(model, tracker, apply=apply) for model in (encoder, decoder))
    before, kept = weights(encoder), weights(decoder)

    def one_turn():
        tracker(loss_of(decoder)).backward()
        tracker(loss_of(encoder) * float("nan")).backward()
        one.step()

    with pytest.warns(GradlrWarning, match="left out whole: loss number 2 is nan") as told:
        one_turn()
    other.step()
    assert len(told) == 1 and (one.skipped, other.skipped) == (1, 0)
    assert is_unchanged(encoder, before) and not any(torch.equal(a, b) for a, b in zip(kept, weights(decoder), strict=True))


@LATE
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error_where_backward_updates(bad, capture):
    model, tracker, opt = attached(capture=capture)
    before = weights(model)
    loss = loss_of(model)
    loss.register_hook(lambda gradient: gradient * bad)  # behind the tracker's own look at the loss
    with pytest.raises(NonFiniteError, match=r"'4\.(weight|bias)' holds NaN or infinity.*Nothing was changed"):
        tracker(loss.clone()).backward()
    assert is_unchanged(model, before)
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)


@LATE
def test_a_gradient_that_explodes_on_its_way_names_what_was_changed():
    model, tracker, opt = attached()
    before = weights(model)
    model[2].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"'2\.weight'.*(parameters were|parameter was) updated before it"):
        tracker(loss_of(model)).backward()
    assert set(opt.interrupted) == {"4.weight", "4.bias", "2.bias"}
    assert not torch.equal(before[4], model[4].weight)
    assert torch.equal(before[2], model[2].weight)


def test_huge_finite_gradients_are_no_error():
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False))
    before = weights(model)
    (tracker(model(torch.randn(8, 16)).square().mean() * 1e34)).backward()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not is_unchanged(model, before)


@LATE
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_gradient_too_large_to_be_squared_does_not_silence_adam_for_ever(apply):
    """Adam's second moment would be infinite from here on, and every later update zero."""
    model, tracker, opt = attached(apply=apply)
    before = weights(model)

    def one_step():
        tracker(loss_of(model) * 1e34).backward()
        opt.step()

    is_told = pytest.raises if apply == "backward" else pytest.warns
    with is_told(NonFiniteError if apply == "backward" else GradlrWarning, match=r"'\d\.bias'.*too large for its update"):
        one_step()
    assert all(value.isfinite().all() for state in opt.state.values() for value in state.values())
    assert torch.equal(before[5], model[4].bias)
    assert apply == "backward" or is_unchanged(model, before)  # a step is taken whole or not at all
    train(model, opt, tracker, 1)


@LATE
def test_an_update_that_is_not_finite_is_refused():
    class Dividing(gradlr.rules.Rule):
        name, is_elementwise = "dividing", True

        def init(self, shape, settings, *, dtype, device):
            return {}

        def update(self, gradient, state, settings):
            return gradlr.rules.Update(dense=gradient.matrix / gradient.matrix.norm()), {}

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Dividing())
    before = weights(model)
    with pytest.raises(NonFiniteError, match="'weight'"):
        tracker((model(torch.randn(4, 8)) * 0).sum()).backward()
    assert is_unchanged(model, before)


@LATE
def test_entries_whose_products_overflow_are_an_error_of_ours():
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False))
    tracker(1.0)
    with pytest.raises(NonFiniteError, match="'weight'"):
        opt.receive(model.weight, Dense(torch.full((16, 16), 3e38)))
