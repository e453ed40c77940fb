"""`opt.step()` makes the updates of parameters of one shape as one: the same numbers, in fewer operations."""

import pytest
import torch
from torch import nn

import gradlr
from gradlr.apps.bench.counts import Counter
from gradlr.engine import pending

WIDTH = 24


class Net(nn.Module):
    """Square layers with biases, two of another shape, and norms; the last layer is used where asked for."""

    def __init__(self, depth=3):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))

    def forward(self, x, used=None):
        x = self.first(x)
        for layer, norm in list(zip(self.layers, self.norms, strict=True))[:used]:
            x = x + torch.tanh(layer(norm(x)))
        return self.last(x)


def trained(steps=4, used=(None,), micro_batches=1, dtype=torch.float64, **options):
    """The model and its optimizer after a few steps."""
    torch.manual_seed(0)
    model, tracker = Net().to(dtype), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, lr=1e-2, apply="step", **{"rank": 3, **options})
    data = torch.randn(steps, micro_batches, 16, 8, dtype=dtype)
    for step in range(steps):
        for x in data[step]:
            tracker((model(x, used[step % len(used)]) - x).square().mean()).backward()
        opt.step()
    opt.detach()
    return model, opt


def alone(batches):
    return [[record] for records in batches for record in records]


CASES = {
    "sketches": {},
    "gradients": {"rank": 20},
    "residual": {"rank": 12},
    "accumulated": {"micro_batches": 2},
    "momentum": {"momentum_rank": 2},
    "unused": {"used": (None, 2)},
    "clipped": {"max_grad_norm": 0.1},
    "adam": {"rule": "adam"},
    "other_state": {"state_dtype": torch.bfloat16, "momentum_rank": 2},
}


@pytest.mark.also_asynchronous
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_what_each_is_alone(case, monkeypatch):
    together, opt = trained(**CASES[case])
    real, sizes = pending.Pending.batches, []

    def noted(waiting):
        batches = real(waiting)
        sizes.append(max(map(len, batches)))
        return alone(batches)

    monkeypatch.setattr(pending.Pending, "batches", noted)
    apart, opt_apart = trained(**CASES[case])
    assert max(sizes) >= 3  # something was a batch at all
    # Products of a batch add in another order: 2e-16 each, over four steps. State in bfloat16 may round the other way then.
    error = {"rtol": 1e-11, "atol": 1e-12} if case != "other_state" else {"rtol": 1e-2, "atol": 1e-4}
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, **error)
    for record in opt.records:
        state, other = opt.store.of(record), opt_apart.store.of(opt_apart.records[record.index])
        torch.testing.assert_close(state, other, **error)
        # Not a view that keeps all of the batch alive.
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_half_precision_is_batched_as_well(monkeypatch):
    """Each weight is rounded by its own random numbers: where sums round alike, so do weights."""
    together, _ = trained(dtype=torch.bfloat16, rank=20)
    real = pending.Pending.batches
    monkeypatch.setattr(pending.Pending, "batches", lambda waiting: alone(real(waiting)))
    apart, _ = trained(dtype=torch.bfloat16, rank=20)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert (one != other).float().mean() < 0.02 or (one.ndim == 1 and (one - other).abs().max() < 0.02)


def test_a_batch_is_no_larger_than_its_bound(monkeypatch):
    sizes = []
    real = pending.Pending.batches
    monkeypatch.setattr(
        pending.Pending, "batches", lambda waiting: sizes.append([len(one) for one in real(waiting)]) or real(waiting)
    )
    monkeypatch.setattr(pending, "_BATCH_NUMBERS", (2 * (3 + 3) * 2 * WIDTH,) * 2)
    trained(steps=1)
    assert sorted(sizes[0]) == [1, 1, 1, 1, 2, 10]  # matrices of two others' shapes, a bias, two of three, the third, and vectors


def test_another_number_of_steps_is_another_batch():
    _, opt = trained(used=(None, 2))  # the third layer takes every second step
    steps = {record.plan.name: int(opt.store.of(record)["step"]) for record in opt.records}
    assert steps["layers.0.weight"] == 4 and steps["layers.2.weight"] == steps["norms.2.bias"] == 2


def test_one_gradient_that_is_not_finite_leaves_the_step_out_whole():
    torch.manual_seed(0)
    model, tracker = Net(), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, apply="step", rank=3)
    before = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(16, 8)
    loss = tracker((model(x) - x).square().mean())
    model.layers[1].weight.register_hook(lambda gradient: gradient * torch.nan)
    loss.backward()
    with pytest.warns(gradlr.GradlrWarning, match=r"layers\.1\.weight"):
        opt.step()
    assert all(map(torch.equal, model.parameters(), before)) and opt.skipped == 1
    opt.detach()


def operations(depth):
    torch.manual_seed(0)
    model, tracker = Net(depth), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, apply="step", rank=3)
    x = torch.randn(16, 8)
    for _ in range(2):
        tracker((model(x) - x).square().mean()).backward()
        with Counter() as counter:
            opt.step()
    opt.detach()
    return counter.counts.launches


def test_a_layer_more_takes_few_operations_more():
    """A write of each of its four parameters, and copies of three vectors' moments; an update alone is some 30."""
    assert operations(9) - operations(8) <= 12
