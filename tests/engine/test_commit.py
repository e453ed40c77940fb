"""What a rule hands over is written whole, or the parameter and its state stay as they were."""

import copy

import pytest
import torch
from models import attached, is_unchanged, weights
from torch import nn

import gradlr

pytestmark = pytest.mark.also_asynchronous


def test_an_error_in_a_rule_leaves_the_weight_and_its_state():
    class Broken(gradlr.rules.LowRankPolar):
        def update(self, gradient, state, settings):
            super().update(gradient, state, settings)
            raise RuntimeError("the rule is broken")

    model, tracker, opt = attached(nn.Linear(8, 8, bias=False), rule=Broken())
    before, state = weights(model), copy.deepcopy(opt.state[model.weight])
    with pytest.raises(RuntimeError, match="broken"):
        tracker(model(torch.randn(4, 8)).square().mean()).backward()
    assert is_unchanged(model, before)
    torch.testing.assert_close(dict(opt.state[model.weight]), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "parts",
    [
        lambda g: {"dense": g.mean()},
        lambda g: {"dense": g[:1]},
        lambda g: {"left": g, "right": g[:3]},
        lambda g: {"left": g},
    ],
)
def test_an_update_of_another_shape_is_refused(parts):
    class Wrong(gradlr.rules.Rule):
        name, is_elementwise = "wrong", True

        def init(self, shape, settings, *, dtype, device):
            return {}

        def update(self, gradient, state, settings):
            return gradlr.rules.Update(**parts(gradient.matrix)), {}

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Wrong())
    before = weights(model)
    with pytest.raises(gradlr.ShapeError, match="rule 'wrong' made an update"):
        tracker(model(torch.randn(4, 8)).sum()).backward()
    assert is_unchanged(model, before)


def test_an_update_of_another_type_is_refused():
    class Bare(gradlr.rules.LowRankPolar):
        def update(self, gradient, state, settings):
            return gradient.matrix

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Bare())
    with pytest.raises(gradlr.ArgumentError, match=r"update\(\) must return .*not Tensor"):
        tracker(model(torch.randn(4, 8)).sum()).backward()


@pytest.mark.parametrize(
    "options", [{}, {"momentum_rank": 2}, {"rule": "adam"}, {"rule": "multi_normalized"}, {"apply": "step"}], ids=str
)
def test_weights_and_state_may_be_written_to_after_an_update(options):
    """Updates are made in inference mode; what users see is ordinary tensors, whose changes autograd counts."""
    model, tracker, opt = attached(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), rank=2, **options)
    versions = [parameter._version for parameter in model.parameters()]
    tracker(model(torch.randn(4, 8)).square().mean()).backward()
    opt.step()
    assert all(parameter._version > before for parameter, before in zip(model.parameters(), versions, strict=True))
    for parameter in model.parameters():
        for value in (parameter.detach(), *opt.state[parameter].values()):
            value.mul_(1)
    tracker(model(torch.randn(4, 8)).square().mean()).backward()
