"""`apply="step"`: clipping, scaling and skipping act on the whole step, exactly, in ordinary loops with stock tools."""

import copy

import pytest
import torch
from models import Mixed, attached, mlp, regression, train, weights
from torch import nn

import gradlr
from gradlr import ArgumentError, GradlrWarning
from gradlr.rules import LowRankPolar

pytestmark = [pytest.mark.also_asynchronous, pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")]
LATE = pytest.mark.synchronous("told one loss late there: test_asynchronous.py")

PLAIN = {"rule": LowRankPolar(residual=0), "apply": "step"}
CAPTURES = pytest.mark.parametrize("capture", ["hook", "adaptor"])


def loss_of(model, factor=1.0):
    x, y = regression(64, count=16, dtype=torch.float64)
    return factor * nn.functional.mse_loss(model(x), y)


def wide(depth=2):
    """Layers whose gradients wait as sketches."""
    return mlp(64, depth, dtype=torch.float64)


def assert_same(one, other, atol):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def true_norm(model, factor=1.0):
    gradients = torch.autograd.grad(loss_of(model, factor), list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


# -- clipping ----------------------------------------------------------------------------------------------------------


@CAPTURES
def test_the_norm_is_that_of_all_gradients_in_full(capture):
    model = wide()
    expected = true_norm(model)
    _, tracker, opt = attached(model, capture=capture, max_grad_norm=1e9, **PLAIN)
    assert opt.grad_norm is None
    tracker(loss_of(model)).backward()
    opt.step()
    assert opt.grad_norm == pytest.approx(expected, rel=1e-12)


@CAPTURES
def test_clipping_is_a_smaller_gradient(capture):
    """Steps whose norm is above the limit equal steps of a loss scaled down beforehand; those below it are untouched."""
    results = []
    for is_clipped in (True, False):
        model = wide()
        limit = {"max_grad_norm": 1e-3} if is_clipped else {}
        _, tracker, opt = attached(model, capture=capture, **limit, **PLAIN)
        for factor in (1.0, 1e-6, 3.0):
            norm = true_norm(model, factor)
            loss = loss_of(model, factor * (1 if is_clipped else min(1.0, 1e-3 / (norm + 1e-6))))
            tracker(loss).backward()
            opt.step()
        results.append(weights(model))
    assert_same(*results, atol=1e-9)


def test_vectors_and_tables_are_clipped_as_well():
    tokens = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for is_clipped in (True, False):
        torch.manual_seed(0)
        model = Mixed().double()
        loss = model(tokens).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        _, tracker, opt = attached(model, **({"max_grad_norm": norm / 2} if is_clipped else {}), **PLAIN)
        tracker(loss).backward()
        opt.step()
        moments = [value for state in opt.state.values() for key, value in state.items() if key in ("mean", "square")]
        results.append([moment.clone() for moment in moments])
    for clipped, full in zip(*results, strict=True):
        share = clipped.sum() / full.sum()
        assert share == pytest.approx(0.5, rel=1e-5) or share == pytest.approx(0.25, rel=1e-5)  # of a mean, of a square


@CAPTURES
def test_torchs_own_clipping_works_on_the_optimizers_parameters(capture):
    results = []
    for is_stock in (True, False):
        model = wide()
        _, tracker, opt = attached(model, capture=capture, max_grad_norm=1e9 if is_stock else 1e-3, **PLAIN)
        for _ in range(3):
            tracker(loss_of(model)).backward()
            if is_stock:
                held = [parameter for group in opt.param_groups for parameter in group["params"]]
                norm = nn.utils.clip_grad_norm_(held, 1e-3)
                assert norm.item() == pytest.approx(true_norm(model), rel=1e-12)
            opt.step()
        results.append(weights(model))
    assert_same(*results, atol=1e-9)


def held_by(opt):
    return [parameter for group in opt.param_groups for parameter in group["params"]]


def test_clipping_between_micro_batches_scales_what_has_come_so_far():
    """As in torch, where what comes later is added to the clipped gradient. Of this size gradients wait as they are."""
    model = mlp(16, 2, dtype=torch.float64)
    plain = copy.deepcopy(model)
    _, tracker, opt = attached(model, apply="step")
    x, y = regression(16, count=32, dtype=torch.float64)
    norms = []
    for rows in torch.arange(32).chunk(4):
        tracker(nn.functional.mse_loss(model(x[rows]), y[rows])).backward()
        nn.functional.mse_loss(plain(x[rows]), y[rows]).backward()
        norms.append([nn.utils.clip_grad_norm_(held, 1e-2).item() for held in (held_by(opt), plain.parameters())])
    for mine, theirs in norms:
        assert mine == pytest.approx(theirs, rel=1e-12)
    opt.pending.scale(opt.pending.norm_proxy.factor())
    for record in opt.records:
        expected = dict(plain.named_parameters())[record.plan.name].grad
        torch.testing.assert_close(opt.pending.gradients.get(record.index).matrix, expected, rtol=1e-12, atol=0)


@LATE
@pytest.mark.parametrize("is_between", [False, True])
def test_clipping_by_value_is_refused_whole(is_between):
    model = wide()
    before = weights(model)
    _, tracker, opt = attached(model, **PLAIN)
    tracker(loss_of(model)).backward()
    nn.utils.clip_grad_value_(held_by(opt), 1e3)  # cuts nothing
    tracker(loss_of(model)).backward()
    nn.utils.clip_grad_value_(held_by(opt), 1e-6)
    go_on = tracker(loss_of(model)).backward if is_between else opt.step
    with pytest.raises(gradlr.ArgumentError, match="by value.*clip_grad_norm_, or max_grad_norm=.*dropped"):
        go_on()
    assert_same(before, weights(model), atol=0)
    assert opt.skipped == 0
    tracker(loss_of(model)).backward()
    opt.step()
    assert not torch.equal(before[0], model[0].weight)


def test_under_accumulation_the_norm_is_that_of_the_sketched_sum():
    model = wide(1)
    _, tracker, opt = attached(model, max_grad_norm=1e9, **PLAIN)
    x, y = regression(64, count=32, dtype=torch.float64)
    for rows in torch.arange(32).chunk(4):
        tracker(nn.functional.mse_loss(model(x[rows]), y[rows]) / 4).backward()
    pending = [opt.pending.gradients.get(record.index).matrix for record in opt.records]
    expected = torch.stack([matrix.norm() for matrix in pending]).norm().item()
    opt.step()
    assert opt.grad_norm == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_a_layer_used_twice_in_one_backward_enters_with_its_sketch_where_its_uses_come_apart(capture):
    """A hook sees the sum of its uses; an adaptor each by itself, and the norm of a sum does not follow from theirs."""
    layer, x = nn.Linear(64, 64, bias=False, dtype=torch.float64), regression(64, count=16, dtype=torch.float64)[0]
    (gradient,) = torch.autograd.grad(layer(torch.tanh(layer(x))).square().mean(), layer.weight)
    _, tracker, opt = attached(layer, capture=capture, max_grad_norm=1e9, **PLAIN)
    tracker(layer(torch.tanh(layer(x))).square().mean()).backward()
    known = gradient if capture == "hook" else opt.pending.gradients.get(0).matrix
    opt.step()
    assert opt.grad_norm == pytest.approx(known.norm().item(), rel=1e-12)
    assert (opt.grad_norm < 0.99 * gradient.norm().item()) is (capture == "adaptor")


def test_a_limit_needs_step():
    with pytest.raises(ArgumentError, match='apply="step"'):
        attached(max_grad_norm=2.0)
    with pytest.raises(ArgumentError, match="max_grad_norm"):
        attached(max_grad_norm=0.0, apply="step")


# -- skipping ----------------------------------------------------------------------------------------------------------


def spoiled(model, name, bad=float("nan")):
    """Spoil the gradient of one parameter until the handle is removed."""
    return dict(model.named_parameters())[name].register_hook(lambda gradient: gradient * bad)


@LATE
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_gradient_that_is_not_finite_leaves_the_whole_step_out(name, bad):
    model = wide()
    _, tracker, opt = attached(model, **PLAIN)
    undisturbed = copy.deepcopy(model)
    tracker(loss_of(model)).backward()
    opt.step()
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    handle = spoiled(model, name, bad)
    tracker(loss_of(model)).backward()
    handle.remove()
    tracker(loss_of(model)).backward()  # another micro-batch of the same step, and a good one
    with pytest.warns(GradlrWarning, match=f"left out whole: the gradient of '{name}' holds NaN"):
        opt.step()
    assert_same(before, weights(model), atol=0)
    torch.testing.assert_close(state, opt.state_dict()["state"], rtol=0, atol=0)
    assert opt.skipped == 1
    tracker(loss_of(model)).backward()
    opt.step()

    _, tracker, other = attached(undisturbed, **PLAIN)
    for _ in range(2):
        tracker(loss_of(undisturbed)).backward()
        other.step()
    assert_same(weights(undisturbed), weights(model), atol=0)  # no generator has moved either


@LATE
def test_a_norm_that_is_not_finite_leaves_the_step_out():
    model = mlp(16, 1)
    _, tracker, opt = attached(model, apply="step", max_grad_norm=1.0)
    before = weights(model)
    tracker((model(torch.ones(2, 16)) * 1e30).sum()).backward()  # finite gradients, whose squares are not
    with pytest.warns(GradlrWarning, match="norm of all gradients is not finite"):
        opt.step()
    assert_same(before, weights(model), atol=0)


# -- GradScaler --------------------------------------------------------------------------------------------------------


def scaler(scale=2.0**10, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000, **options)


@CAPTURES
@pytest.mark.parametrize("is_unscaled_first", [False, True])
def test_the_stock_scaler_changes_nothing_but_the_scale(capture, is_unscaled_first):
    results = []
    for is_scaled in (False, True):
        model = wide()
        _, tracker, opt = attached(model, capture=capture, max_grad_norm=1e-3, **PLAIN)
        grad_scaler = scaler(enabled=is_scaled)
        for _ in range(4):
            opt.zero_grad()
            grad_scaler.scale(tracker(loss_of(model))).backward()
            if is_unscaled_first:
                grad_scaler.unscale_(opt)
            grad_scaler.step(opt)
            grad_scaler.update()
        results.append((weights(model), opt.grad_norm, opt.state[model[0].weight]["R"].clone()))
    assert_same(results[0][0], results[1][0], atol=1e-12)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-9, atol=1e-15)


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    model = wide()
    _, tracker, opt = attached(model, **PLAIN)
    grad_scaler = scaler()
    train_once(model, tracker, opt, grad_scaler)
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    handle = spoiled(model, "0.weight", float("inf"))
    train_once(model, tracker, opt, grad_scaler)  # without a word: a scaler expects it
    handle.remove()
    opt.zero_grad()
    assert_same(before, weights(model), atol=0)
    torch.testing.assert_close(state, opt.state_dict()["state"], rtol=0, atol=0)
    assert opt.skipped == 1 and grad_scaler.get_scale() == 2.0**9
    train_once(model, tracker, opt, grad_scaler)
    assert not torch.equal(before[0], model[0].weight)


def train_once(model, tracker, opt, grad_scaler):
    opt.zero_grad()
    grad_scaler.scale(tracker(loss_of(model))).backward()
    grad_scaler.step(opt)
    grad_scaler.update()


def test_float16_autocast_with_the_stock_loop_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    _, tracker, opt = attached(model, capture="adaptor", max_grad_norm=1.0, apply="step")
    grad_scaler, losses = scaler(2.0**30), []  # far too large: the first steps overflow
    x, y = regression(64, count=16)
    for _ in range(40):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        grad_scaler.scale(tracker(loss)).backward()
        grad_scaler.step(opt)
        grad_scaler.update()
        losses.append(loss.item())
    assert 0 < opt.skipped < 30
    assert losses[-1] < 0.7 * losses[0]
    assert all(value.dtype == torch.float32 for value in opt.state[model[0].weight].values() if value.ndim)


def test_a_schedulers_groups_and_checkpoints_do_not_see_the_gauge():
    model = wide()
    _, tracker, opt = attached(model, **PLAIN)
    torch.optim.lr_scheduler.LambdaLR(opt, [lambda epoch: 1.0] * len(opt.param_groups))
    saved = opt.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [2, 2]
    _, _, other = attached(copy.deepcopy(model), rule=LowRankPolar(residual=0))
    other.load_state_dict(saved)  # and goes on with updates in backward
    opt.load_state_dict(other.state_dict())


# -- state in bfloat16 -------------------------------------------------------------------------------------------------


def test_state_in_bfloat16_is_half_as_large_trains_and_resumes_bit_for_bit():
    options = {"state_dtype": torch.bfloat16, "rank": 8, "momentum_rank": 4}
    model, tracker, opt = attached(mlp(16, 3), **options)
    _, _, wide_opt = attached(mlp(16, 3), rank=8, momentum_rank=4)
    assert opt.state_bytes() == wide_opt.state_bytes() / 2
    losses = train(model, opt, tracker, 40)
    assert losses[-1] < 0.7 * losses[0]
    saved, saved_weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    train(model, opt, tracker, 3, start=40)
    other, other_tracker, other_opt = attached(mlp(16, 3, seed=4), **options)
    other.load_state_dict(saved_weights)
    other_opt.load_state_dict(saved)
    train(other, other_opt, other_tracker, 3, start=40)
    assert_same(weights(model), weights(other), atol=0)


def test_another_state_dtype_on_load_is_kept():
    model, tracker, opt = attached(state_dtype=torch.bfloat16)
    train(model, opt, tracker, 3)
    _, _, other = attached(mlp(seed=3))
    other.load_state_dict(opt.state_dict())
    assert {value.dtype for value in other.state[other.records[0].plan.parameter].values()} == {torch.float32, torch.int64}
    with pytest.raises(ArgumentError, match="state_dtype"):
        attached(state_dtype=torch.float16)


def test_gradlr_exports_what_the_loop_needs():
    assert {"skipped", "grad_norm", "interrupted"} <= set(dir(gradlr.GradLR))
