"""Every scheduler of torch moves the rate that an update uses, as it moves that of a plain SGD beside it."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import gradlr

pytestmark = pytest.mark.also_asynchronous


class Constant(gradlr.rules.Rule):
    """A direction of ones: the weight shows the rate of each step."""

    name, is_elementwise = "constant", True

    def init(self, shape, settings, *, dtype, device):
        return {}

    def update(self, gradient, state, settings):
        return gradlr.rules.Update(dense=torch.ones_like(gradient.matrix)), {}


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)])


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.8),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 4], gamma=0.5),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.3, total_iters=3),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda optimizer: swa_utils.SWALR(optimizer, 1e-3, anneal_epochs=4),
}


def test_the_table_is_complete():
    abstract = {"LRScheduler", "_LRScheduler", "EPOCH_DEPRECATION_WARNING"}
    assert set(lr_scheduler.__all__) - abstract <= SCHEDULERS.keys()


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_the_rate_of_each_step_is_that_of_plain_sgd(name, apply):
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, lr=1e-2, rule=Constant(), apply=apply)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (opt, plain)]
    moved, rates = [], []
    for _ in range(7):
        before = model.weight.detach().clone()
        tracker(model(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
        opt.step()
        plain.step()
        moved.append((before - model.weight).mean().item())
        rates.append(plain.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert moved == pytest.approx(rates, rel=1e-9)
    assert len(set(rates)) > 1
