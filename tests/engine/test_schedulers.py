"""Every scheduler of torch moves the rate that an update uses, as it moves that of a plain SGD beside it."""

import copy
import json

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


KINDS = {"embedding": {"rule": Constant()}, "vector": {"rule": Constant()}}


def of_each_kind(**options):
    """(model, tracker, optimizer) of an embedding, a matrix and a vector, whose weights show the rate of each step."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)).double()
    tracker = gradlr.LossTracker()
    return model, tracker, gradlr.attach(model, tracker, **{"rule": Constant(), "kinds": KINDS} | options)


def moved_by_step(model, tracker, opt):
    """What one step takes off an entry of each kind: embedding, matrix, vector."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tracker(model(torch.arange(4)).sum()).backward()
    opt.step()
    return [(old - new).mean().item() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["float", "tensor"])
def test_the_rate_of_each_step_is_that_of_plain_sgd_and_kinds_keep_their_ratio(rate, name, apply):
    """Also where a scheduler sets one rate for all groups, as OneCycleLR, CyclicLR and SWALR do."""
    rate = rate.clone() if isinstance(rate, torch.Tensor) else rate
    model, tracker, opt = of_each_kind(lr=rate, apply=apply)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (opt, plain)]
    moved, rates = [], []
    for _ in range(7):
        moved.append(moved_by_step(model, tracker, opt))
        plain.step()
        rates.append(plain.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    for share, of_kind in zip((1 / 8, 1, 1), zip(*moved, strict=True), strict=True):
        assert of_kind == pytest.approx([share * one for one in rates], rel=1e-9)
    assert len(set(rates)) > 1


def test_one_number_means_the_same_for_all_kinds():
    model, tracker, opt = of_each_kind(lr=1e-2)
    assert {group["lr"] for group in opt.param_groups} == {1e-2}
    assert {group["kind"]: group["lr_scale"] for group in opt.param_groups} == {"matrix": 1, "embedding": 1 / 8, "vector": 1}
    for group in opt.param_groups:  # as a finder of learning rates does
        group["lr"] = 0.5
    assert moved_by_step(model, tracker, opt) == pytest.approx([0.0625, 0.5, 0.5])
    embedding, matrix, *_ = str(opt).splitlines()[2:]
    assert "0.5 x 0.125" in embedding or "0.5 x 0.125" in matrix


def test_a_rate_of_a_kinds_own_is_taken_as_it_is():
    kinds = {"embedding": {"rule": Constant(), "lr": 0.25}, "vector": {"rule": Constant()}}
    model, tracker, opt = of_each_kind(lr=1e-2, kinds=kinds)
    assert {group["kind"]: (group["lr"], group["lr_scale"]) for group in opt.param_groups}["embedding"] == (0.25, 1.0)
    assert moved_by_step(model, tracker, opt) == pytest.approx([0.25, 1e-2, 1e-2])


def without_scale(saved):
    """As gradlr wrote it when what a kind takes of the rate was part of `lr`."""
    saved = copy.deepcopy(saved)
    saved["gradlr"]["version"] = 2
    saved["param_groups"][0]["gradlr"] = json.dumps(saved["gradlr"])
    for group in saved["param_groups"]:
        scale = group.pop("lr_scale")
        group |= {key: group[key] * scale for key in ("lr", "initial_lr") if key in group}
    return saved


def test_a_checkpoint_of_format_2_means_the_same_with_its_scheduler():
    def start():
        model, tracker, opt = of_each_kind(lr=1e-2)
        return model, tracker, opt, lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))

    def train(model, tracker, opt, scheduler):
        found = []
        for _ in range(3):
            found.append(moved_by_step(model, tracker, opt))
            scheduler.step()
        return found

    run = start()
    train(*run)
    saved, schedule = without_scale(run[2].state_dict()), run[3].state_dict()
    schedule["base_lrs"] = [
        rate * group["lr_scale"] for rate, group in zip(schedule["base_lrs"], run[2].param_groups, strict=True)
    ]
    went_on, other = train(*run), start()
    other[2].load_state_dict(saved)
    other[3].load_state_dict(schedule)
    assert train(*other) == [pytest.approx(step, rel=1e-9) for step in went_on]


@pytest.mark.synchronous("transformers' schedules read what they need when they are made")
@pytest.mark.parametrize("name", ["polynomial", "cosine_with_min_lr", "cosine", "linear", "inverse_sqrt"])
def test_transformers_schedules_find_the_rate_that_was_given(name):
    optimization = pytest.importorskip("transformers.optimization")
    special = {"polynomial": {"lr_end": 1e-4}, "cosine_with_min_lr": {"min_lr": 1e-3}}.get(name, {})
    model, tracker, opt = of_each_kind(lr=1e-2)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    made = [
        optimization.get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6, scheduler_specific_kwargs=special)
        for optimizer in (opt, plain)
    ]
    for _ in range(6):
        moved_by_step(model, tracker, opt)
        plain.step()
        for scheduler in made:
            scheduler.step()
        assert {group["lr"] for group in opt.param_groups} == {plain.param_groups[0]["lr"]}
