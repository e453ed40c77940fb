"""find_lr: a rate that trains, from steps that leave no trace."""

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import gradlr
from gradlr import find_lr
from gradlr.apps import find_lr as module


def digits(size=32, count=24):
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: size * count]
    return list(zip(images[order].split(size), labels[order].split(size), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def loss_of(model, batch):
    images, labels = batch
    return cross_entropy(model(images), labels)


def trained(lr, steps=60):
    model, batches = network(), digits()
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, lr=lr)
    for batch in itertools.islice(itertools.cycle(batches[:16]), steps):
        tracker(loss_of(model, batch)).backward()
    opt.detach()
    model.eval()
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in batches[16:]) / 8


def test_the_rate_trains_better_than_one_far_below_and_one_far_above():
    found = find_lr(network(), digits(), loss_of, highest=1.0)
    at_it, below, above = trained(found.lr), trained(found.lr / 100), trained(found.lr * 10)
    assert at_it < below and at_it < above


def test_the_model_and_random_numbers_are_what_they_were_to_the_bit():
    model = network()
    model[3].eval()  # a mode of a module's own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    find_lr(model, digits(), loss_of)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model] == [True, True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    gradlr.attach(model, gradlr.LossTracker()).detach()  # nothing is attached any more


def test_int8_weights_are_what_they_were_and_find_their_direction_afterwards():
    model, (first, *_) = gradlr.quantize_(network()), digits()
    before = [part.clone() for part in model[0].weight.parts()]
    find_lr(model, digits()[1:], loss_of, steps=6)
    assert all(map(torch.equal, model[0].weight.parts(), before))
    loss_of(model, first)
    leading = torch.linalg.svd(first[0], full_matrices=False).Vh[0]
    assert (model[0].weight.direction.flatten() @ leading).abs() > 0.99


@pytest.mark.parametrize("fails_at", [1, 5, 6])
def test_an_exception_half_way_leaves_the_model_as_it_was(fails_at):
    model, calls = network(), itertools.count()

    def failing(model, batch):
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        find_lr(model, digits(), failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    gradlr.attach(model, gradlr.LossTracker()).detach()


def test_a_constant_added_to_the_loss_changes_nothing():
    plain = find_lr(network(), digits(), loss_of)
    raised = find_lr(network(), digits(), lambda model, batch: loss_of(model, batch) + 7)
    assert raised.lr == plain.lr and len(raised.rates) == len(plain.rates)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_rates_of_groups_keep_their_ratio(apply, monkeypatch):
    made, seen = [], []
    monkeypatch.setattr(module, "attach", lambda *args, **options: made.append(gradlr.attach(*args, **options)) or made[0])

    def watching(model, batch):
        if torch.is_grad_enabled():
            seen.append([group["lr"] for group in made[0].param_groups])
        return loss_of(model, batch)

    groups = [{"match": "4.weight", "lr": 5e-3}]
    find_lr(network(), digits(), watching, lr=1e-3, apply=apply, steps=4, highest=1e-4, groups=groups)
    assert all(max(rates) == pytest.approx(5 * min(rates)) for rates in seen)
    assert [min(rates) for rates in seen] == pytest.approx([1e-6, 1e-6 * 100 ** (1 / 3), 1e-6 * 100 ** (2 / 3), 1e-4])


def test_what_is_printed_marks_the_rate():
    found = find_lr(network(), digits(), loss_of)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"lr {found.lr:.1e}, from {len(found.rates)} rates; loss before {found.start:.4f}")
    (marked,) = [line for line in lines if "← lr" in line]
    assert f"{found.lr:.1e}" in marked
    assert 0.9 * len(found.rates) / 2 <= len(lines) - 1 <= 1 + len(found.rates) / 2


def test_a_loss_that_nothing_lowers_is_told():
    with pytest.raises(gradlr.LossError, match=r"none of \d+ rates from 1.0e-06 on lowers the loss of two batches, 0.0"):
        find_lr(network(), digits(), lambda model, batch: loss_of(model, batch) * 0)


@pytest.mark.parametrize(
    "options", [{"lowest": 0}, {"lowest": 1, "highest": 1}, {"steps": 1}, {"highest": torch.inf}, {"lr": -1.0}]
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(gradlr.ArgumentError):
        find_lr(network(), digits(), loss_of, **options)


def test_too_few_batches_are_refused():
    with pytest.raises(gradlr.ArgumentError, match="2 batches; two are the probe, and at least one is trained on"):
        find_lr(network(), digits(count=2), loss_of)
