"""The numbers of `opt.report()`: each against a dense float64 reference, at no cost and no change where nobody asks."""

import copy
import math

import pytest
import torch
from models import Mixed, attached, mlp, train
from torch import nn

import gradlr
from gradlr import ArgumentError, NonFiniteError
from gradlr.report import Observer
from gradlr.report.metrics import change_energy
from gradlr.rules import LowRankPolar, Update


class Everything(nn.Module):
    """Tables, norms, Linear, convolution, and a batch of matrices (experts)."""

    def __init__(self):
        super().__init__()
        self.mixed = Mixed()
        self.experts = nn.Parameter(torch.randn(3, 11, 6) / 3)

    def forward(self, tokens):
        return torch.einsum("b l v, e v o -> b l e o", torch.tanh(self.mixed(tokens)), self.experts)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (4, 7), generator=generator)
    target = torch.randn(4, 7, 3, 6, generator=generator, dtype=torch.float64)
    return (model(tokens) - target).square().mean()


def everything(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model, tracker = Everything().to(dtype), gradlr.LossTracker()
    options = {"lr": 1e-2, "rank": 3, "momentum_rank": 2, "rule": LowRankPolar(residual=0)} | options
    return model, tracker, gradlr.attach(model, tracker, **options)


def step(model, tracker, opt, seed, micro_batches):
    """One step; returns the dense gradients, as plain torch makes them, and the weights before."""
    twin = copy.deepcopy(model).requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for part in range(micro_batches):
        (loss_of(twin, 10 * seed + part) / micro_batches).backward()
        (tracker(loss_of(model, 10 * seed + part)) / micro_batches).backward()
    opt.step()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}, before


def viewed(opt, name, tensor):
    return next(record.plan.view.of(tensor) for record in opt.records if record.plan.name == name)


def observed_steps(opt):
    return {row.name: row.numbers["step"] for row in opt.report().rows if "step" in row.numbers}


def stable_rank(matrices):
    values = torch.linalg.svdvals(matrices.double())
    return (values.square().sum(dim=-1) / values[..., 0].square()).mean().item()


def captured(gradient, direction, rank):
    basis = torch.linalg.svd(direction, full_matrices=False).U[..., :rank]
    return ((basis.mT @ gradient).square().sum() / gradient.square().sum()).item()


STRATEGIES = [
    ("backward", "hook", 1), ("backward", "adaptor", 1), ("step", "hook", 1), ("step", "hook", 3), ("step", "adaptor", 1),
    ("step", "adaptor", 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")  # the layers are so small that hooks would be faster
@pytest.mark.parametrize(("apply", "capture", "micro_batches"), STRATEGIES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_numbers_are_those_of_the_dense_gradient_and_of_the_change(apply, capture, micro_batches, weight_decay):
    model, tracker, opt = everything(apply=apply, capture=capture, weight_decay=weight_decay)
    step(model, tracker, opt, 0, micro_batches)
    with opt.observe():
        gradients, before = step(model, tracker, opt, 1, micro_batches)
    report = opt.report()
    known = {row.name: row.numbers for row in report.rows}
    rates = {record.plan.name: opt.param_groups[record.group_index] for record in opt.records}
    assert {row.kind for row in report.rows} == {"matrix", "embedding", "vector"}
    for row in report.rows:
        gradient, weight = viewed(opt, row.name, gradients[row.name]), viewed(opt, row.name, before[row.name])
        after = viewed(opt, row.name, model.get_parameter(row.name).detach())
        change, numbers = after - weight, known[row.name]
        # float64 throughout: what is left is rounding, and that of the weights themselves in their change.
        assert numbers["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-10), row.name
        assert numbers["update_norm"] == pytest.approx(change.norm().item(), rel=1e-10), row.name
        assert numbers["weight_norm"] == pytest.approx(after.norm().item(), rel=1e-12)
        assert numbers["step"] == numbers["steps"] == 2 and not row.is_projected
        expected = (change.norm() / weight.norm()).item() if weight.any() else None
        assert numbers.get("relative_update") == pytest.approx(expected, rel=1e-10)
        if row.kind == "vector":
            assert not {"stable_rank", "energy", "rank"} & numbers.keys()
            continue
        assert numbers["stable_rank"] == pytest.approx(stable_rank(gradient), rel=1e-9), row.name
        if row.kind == "matrix":
            direction = change + rates[row.name]["lr"] * rates[row.name]["weight_decay"] * weight
            share = captured(gradient, direction, numbers["rank"])
            assert numbers["energy"] == pytest.approx(share, rel=1e-9) and 0.2 < share < 0.9999, row.name
        else:
            assert not {"energy", "rank"} & numbers.keys()
    matrices = [row.numbers for row in report.rows if row.kind == "matrix"]
    whole = sum(one["gradient_norm"] ** 2 for one in matrices)
    assert report.totals["energy"] == pytest.approx(sum(one["energy"] * one["gradient_norm"] ** 2 for one in matrices) / whole)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert report.totals["gradient_norm"] == pytest.approx(norm, rel=1e-9)


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_one_sided_capture_tells_the_norm_of_the_projection_and_no_share(apply):
    model, tracker, opt = everything(apply=apply, capture="one_sided")
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    before = model.mixed.mix.weight.detach().clone()
    record = next(record for record in opt.records if record.plan.name == "mixed.mix.weight")
    with opt.observe():
        loss = tracker(loss_of(model, 0))
        basis = opt.bases.held(record)
        loss.backward()
        opt.step()
    row = next(row for row in opt.report().rows if row.name == record.plan.name)
    projection = twin.mixed.mix.weight.grad @ basis @ basis.mT
    assert row.is_projected and "energy" not in row.numbers
    assert row.numbers["gradient_norm"] == pytest.approx(projection.norm().item(), rel=1e-9)
    assert row.numbers["stable_rank"] == pytest.approx(stable_rank(projection), rel=1e-9)
    assert row.numbers["update_norm"] == pytest.approx((model.mixed.mix.weight - before).norm().item(), rel=1e-9)
    assert "(p)" in str(opt.report()) and "of a projection" in str(opt.report())


def test_accumulated_gradients_are_scaled_with_the_step():
    model, tracker, opt = everything(apply="step", max_grad_norm=1e-3)
    with opt.observe():
        step(model, tracker, opt, 0, 2)
    assert opt.report().totals["gradient_norm"] == pytest.approx(1e-3, rel=0.2)  # the limit is on the norm of the sketches
    assert opt.grad_norm > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_update_with_residual_is_measured_before_it_is_rounded(dtype, weight_decay, monkeypatch):
    model, tracker, opt = attached(mlp(dtype=dtype), weight_decay=weight_decay, lr=0.1)
    changes = []

    def spy(parameter, view, update, *, lr, weight_decay, **_):
        changes.append((lr * (update.direction().double() + weight_decay * parameter.detach().double())).norm().item())

    monkeypatch.setattr(opt.committer, "writer", spy)
    with opt.observe():
        tracker(model(torch.ones(8, 16, dtype=dtype)).square().mean()).backward()
    rows = [row.numbers["update_norm"] for row in opt.report().rows]
    assert len(changes) == len(opt.records)
    # float32 products.
    assert sorted(rows) == pytest.approx(sorted(changes), rel=1e-5)


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")
@pytest.mark.parametrize(
    ("apply", "capture", "micro_batches"), [*STRATEGIES, ("backward", "one_sided", 1), ("step", "one_sided", 2)]
)
def test_observing_changes_no_bit(apply, capture, micro_batches):
    ends = []
    for is_observed in (False, True):
        options = {"apply": apply, "capture": capture, "rule": "low_rank_polar", "weight_decay": 0.1}
        model, tracker, opt = everything(torch.float32, **options)
        torch.manual_seed(5)
        if is_observed:
            opt.observe()
        for seed in range(4):
            for part in range(micro_batches):
                tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(10 * seed + part))
                (tracker(model(tokens).square().mean()) / micro_batches).backward()
            opt.step()
            if is_observed:
                opt.report()
        ends.append([*model.state_dict().values(), *(v for s in opt.state.values() for v in s.values()), torch.get_rng_state()])
        assert bool(observed_steps(opt)) == is_observed
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_nothing_is_done_where_nobody_asks(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("observed")

    for name in ("keep", "measure_gradient", "measure_update"):
        monkeypatch.setattr(Observer, name, refuse)
    model, tracker, opt = attached(mlp(64), apply="step")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    sketches = [opt.pending.gradients.get(record.index) for record in opt.records if record.plan.kind == "matrix"]
    assert all(isinstance(one, gradlr.gradient.Sketched) and one.whole is None for one in sketches)
    opt.step()
    assert not observed_steps(opt) and "with opt.observe()" in str(opt.report())
    opt.observe("0.weight")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    with pytest.raises(AssertionError, match="observed"):
        opt.step()


def test_whole_gradients_are_dropped_with_the_step():
    model, tracker, opt = attached(mlp(64), apply="step")
    with opt.observe("0.weight"):
        tracker(model(torch.randn(8, 64)).square().mean()).backward()
        assert [
            record.plan.name
            for record in opt.records
            if getattr(opt.pending.gradients.get(record.index), "whole", None) is not None
        ] == ["0.weight"]
        opt.step()
    assert all(record.index not in opt.pending.gradients for record in opt.records)
    assert all(value.ndim == 0 for value in vars(opt.records[0].metrics).values() if isinstance(value, torch.Tensor))


def test_a_window_that_has_begun_unobserved_tells_no_share():
    model, tracker, opt = attached(mlp(64), apply="step")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    with opt.observe():
        opt.step()
    rows = [row for row in opt.report().rows if row.kind == "matrix"]
    assert all(row.is_projected and "energy" not in row.numbers and row.numbers["update_norm"] > 0 for row in rows)


def test_which_parameters_are_observed_and_until_when():
    model, tracker, opt = attached()
    with pytest.raises(ArgumentError, match=r"observe\('encoder\.\*'\) matches no attached parameter.*'0\.weight'"):
        opt.observe("0.*", "encoder.*")
    assert not any(record.observer for record in opt.records)
    outer = opt.observe("0.*")
    with opt.observe("*.bias"):
        train(model, opt, tracker, 1)
    train(model, opt, tracker, 1)
    outer.stop()
    outer.stop()
    train(model, opt, tracker, 1)
    assert observed_steps(opt) == {"0.weight": 2, "0.bias": 2, "2.bias": 1, "4.bias": 1}
    assert {row.numbers["steps"] for row in opt.report().rows} == {3}
    opt.load_state_dict(opt.state_dict())
    assert not observed_steps(opt)
    first, second = opt.observe("0.*"), opt.observe("0.weight")
    first.stop()
    train(model, opt, tracker, 1)
    assert list(observed_steps(opt)) == ["0.weight"]
    second.stop()
    assert not any(record.observer for record in opt.records)


class Overflowing(LowRankPolar):
    """A rule whose update is not finite."""

    def update(self, gradient, state, settings):
        update, state = super().update(gradient, state, settings)
        return Update(left=update.left * torch.inf, right=update.right), state


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_what_was_not_written_is_not_reported(apply):
    model, tracker, opt = attached(apply=apply, rule=Overflowing())
    opt.observe("*.weight")
    if apply == "backward":
        with pytest.raises(NonFiniteError):
            train(model, opt, tracker, 1)
    else:
        with pytest.warns(gradlr.GradlrWarning):
            train(model, opt, tracker, 1)
    assert not observed_steps(opt)


def test_a_zero_gradient_has_no_share_and_no_infinite_scalar():
    model, tracker, opt = attached()
    with opt.observe():
        tracker(0 * model(torch.randn(8, 16)).sum()).backward()
    report = opt.report()
    matrices = [row.numbers for row in report.rows if row.kind == "matrix"]
    assert all("energy" not in one and one["stable_rank"] == one["gradient_norm"] == 0 for one in matrices)
    assert "energy" not in report.totals and not any("energy" in name for name in report.scalars())
    assert all(math.isfinite(value) for value in report.scalars().values())


def test_stable_rank_of_the_momentum():
    model, tracker, opt = everything(momentum_rank=3)
    assert not any("momentum_stable_rank" in row.numbers for row in opt.report().rows)
    for seed in range(3):
        step(model, tracker, opt, seed, 1)
    rows = {row.name: row for row in opt.report().rows}
    for record in opt.records:
        state, found = opt.state[record.plan.parameter], rows[record.plan.name].numbers.get("momentum_stable_rank")
        if record.plan.kind == "matrix":
            assert found == pytest.approx(stable_rank(state["P"] @ state["R"].mT), rel=1e-9) and 1 <= found <= 3
        else:
            assert found is None


def test_a_momentum_that_is_not_finite_has_no_stable_rank():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    for state in opt.state.values():
        for value in state.values():
            if value.is_floating_point():
                value.fill_(torch.nan)
    report = opt.report()
    assert not any("momentum_stable_rank" in name for name in report.scalars())


def test_bytes_are_those_of_the_tensors_and_of_torchs_adamw():
    model, tracker, opt = attached(Mixed(), groups=[{"match": "conv.weight", "rank": 2}])
    report = opt.report()
    states = [{key: value for key, value in opt.state[s.plan.parameter].items() if key != "step"} for s in opt.records]
    assert [row.numbers["state_bytes"] for row in report.rows] == [
        sum(v.numel() * v.element_size() for v in s.values()) for s in states
    ]
    assert report.totals["state_bytes"] == opt.state_bytes()
    adamw = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    adamw_bytes = sum(s[key].nbytes for s in adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert report.totals["state_share"] == opt.state_bytes() / adamw_bytes
    assert report.totals["rank_mean"] == (2 + 4) / 2
    assert repr(opt).splitlines()[-1].strip() in str(report)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_norm_of_a_change_is_that_of_all_its_parts(decay, monkeypatch):
    monkeypatch.setattr("gradlr.report.metrics._BLOCK_NUMBERS", 30)  # three rows at a time
    torch.manual_seed(0)
    left, right = torch.randn(7, 40, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    scale, dense, weight = (torch.randn(7, n, dtype=torch.float64) for n in (1, 9, 9))
    update = Update(left=left, right=right, row_scale=scale, dense=dense)
    expected = (scale * (left @ right.mT) + dense + decay * weight).square().sum()
    torch.testing.assert_close(change_energy(weight, update, decay), expected, rtol=1e-12, atol=0)
    assert change_energy(weight, Update(), 0.0) == 0
    rows = torch.tensor([5, 1, 5])  # the first may come again, with zeros
    dense = dense[:3] * torch.tensor([[1.0], [1.0], [0.0]])
    expected = (torch.zeros_like(weight).index_add(0, rows, dense) + decay * weight).square().sum()
    torch.testing.assert_close(change_energy(weight, Update(dense=dense, rows=rows), decay), expected, rtol=1e-12, atol=0)
