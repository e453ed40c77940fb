"""GradLR in real loops: what is updated when, the two apply modes, schedulers, precision."""

import pytest
import torch
from models import Mixed, attached, loss_of, mlp, regression, train, weights
from torch import nn

import gradlr
from gradlr.gradient import Dense
from gradlr.rules import LowRankPolar

pytestmark = pytest.mark.also_asynchronous


def test_after_backward_every_weight_is_updated_and_no_gradient_is_left():
    model, tracker, opt = attached(Mixed())
    before = weights(model)
    tokens = torch.arange(22).reshape(2, 11) % 11
    tracker(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    after = weights(model)
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(old, new) for old, new in zip(after, model.parameters(), strict=True))


@pytest.mark.sampled
@pytest.mark.parametrize("rule", ["low_rank_polar", "factor_moments", "adam"])
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_training_lowers_the_loss(rule, apply):
    model, tracker, opt = attached(rule=rule, apply=apply, lr=3e-3)
    losses = train(model, opt, tracker, 60)
    # A quarter of the start is far more than the spread over the four batches.
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_backward_leaves_only_sketches_until_step():
    model, tracker, opt = attached(mlp(64, 2), apply="step")
    before = weights(model)
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    sketch = next(opt.pending.gradients.get(record.index) for record in opt.records if record.plan.name == "0.weight")
    numbers = sum(part.numel() for part in (sketch.right, sketch.right_sketch, sketch.left, sketch.left_sketch))
    assert numbers == (2 * 4 + 2) * (64 + 64)  # (2r + k)(m + n): bases and products on both sides
    opt.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(record.index not in opt.pending.gradients for record in opt.records)


def test_both_modes_agree_where_one_backward_makes_the_step():
    """Without the residual, which needs the gradient itself, the sketch loses nothing of its first gradient."""
    results = []
    for apply in ("backward", "step"):
        model, tracker, opt = attached(mlp(64, 3, dtype=torch.float64), apply=apply, rule=LowRankPolar(residual=0))
        train(model, opt, tracker, 10)
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # float64, ten steps of eigenvectors of r x r matrices


@pytest.mark.parametrize("is_accumulating", [False, True])
def test_where_a_sketch_would_be_larger_the_gradient_itself_waits(is_accumulating):
    """Then both modes agree with the residual as well, and micro-batches add up exactly at any rank."""
    x, y = regression(16, count=32, dtype=torch.float64)
    results = []
    for apply in ("backward", "step"):
        model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), apply=apply, rank=6)
        for _ in range(4):
            parts = 2 if is_accumulating and apply == "step" else 1
            for rows in torch.arange(32).chunk(parts):
                tracker(nn.functional.mse_loss(model(x[rows]), y[rows]) / parts).backward()
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # float64, four steps of eigenvectors


def test_a_loss_shown_while_a_sketch_waits_changes_no_rank():
    results = []
    for is_shown in (False, True):
        model, tracker, opt = attached(mlp(64, 2, dtype=torch.float64), apply="step", rank=gradlr.ByLoss(12))
        tracker(model(torch.ones(8, 64, dtype=torch.float64)).square().mean()).backward()
        if is_shown:
            tracker(1e-3)
        opt.step()
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
def test_accumulated_gradients_make_one_step(capture):
    """At full rank a sketch holds everything, so micro-batches must add up to the whole batch."""
    x, y = regression(8, count=32, dtype=torch.float64)
    results = []
    for parts in (1, 4):
        options = {"apply": "step", "capture": capture, "rank": 8, "momentum_rank": 8}
        model, tracker, opt = attached(mlp(8, 2, dtype=torch.float64), **options)
        for _ in range(3):
            for rows in torch.arange(32).chunk(parts):
                tracker(nn.functional.mse_loss(model(x[rows]), y[rows]) / parts).backward()
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_zero_grad_drops_what_is_pending():
    model, tracker, opt = attached(apply="step")
    before = weights(model)
    tracker(loss_of(model)).backward()
    opt.zero_grad()
    opt.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_step_count_of_an_unused_parameter_stands_still():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    _, tracker, opt = attached(model)
    before = model[1].weight.detach().clone()
    tracker(model[0](torch.randn(4, 8)).square().mean()).backward()
    assert torch.equal(before, model[1].weight)
    assert [int(opt.state[layer.weight]["step"]) for layer in model] == [1, 0]


def test_tied_weights_are_updated_once_per_backward():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    _, tracker, opt = attached(model)
    tracker(model(torch.randn(4, 8)).square().mean()).backward()
    assert int(opt.state[model[0].weight]["step"]) == 1


def test_a_tied_weight_gets_the_whole_gradient():
    """The gradient handed over is the sum over both uses: compared with plain autograd on a copy."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 6, bias=False, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(torch.tanh(layer(x))).square().mean(), [layer.weight])
    before = layer.weight.detach().clone()
    _, tracker, opt = attached(layer, rule="adam", lr=1e-3)
    tracker(layer(torch.tanh(layer(x))).square().mean()).backward()
    # Adam's first step is lr · sign(G), up to eps / |G|.
    torch.testing.assert_close(before - layer.weight, 1e-3 * expected.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_weights(use_reentrant, apply, capture):
    results = []
    for is_checkpointed in (False, True):
        model, tracker, opt = attached(mlp(16, 3, dtype=torch.float64), apply=apply, capture=capture)
        x, y = regression(16, count=16, dtype=torch.float64)
        x.requires_grad_(True)  # what reentrant checkpointing asks for
        for _ in range(3):
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant) if is_checkpointed else model(x)
            tracker(nn.functional.mse_loss(out, y)).backward()
            opt.step()
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_training_is_bitwise_repeatable():
    def run():
        model, tracker, opt = attached(seed=3)
        train(model, opt, tracker, 6)
        return weights(model)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_the_seed_changes_the_random_directions():
    def run(seed):
        model, tracker, opt = attached(seed=seed, rank=2)
        train(model, opt, tracker, 2)
        return model[0].weight.detach()

    assert not torch.equal(run(0), run(1))


def test_the_global_random_state_is_not_touched():
    model, tracker, opt = attached(rule="factor_moments")
    state = torch.get_rng_state()
    train(model, opt, tracker, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_rank_follows_the_loss():
    model, tracker, opt = attached(rank=gradlr.ByLoss(16))
    record = opt.records[0]
    ranks = []
    for loss in (4.0, 2.0, 1.0, float("nan"), 4.0):
        tracker(loss)
        ranks.append(record.rank)
    assert ranks == [16, 8, 4, 4, 16]


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_any_scheduler_moves_the_rate_that_the_hooks_use(apply):
    model, tracker, opt = attached(apply=apply)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step else 1.0)
    train(model, opt, tracker, 1)
    scheduler.step()
    before = weights(model)
    train(model, opt, tracker, 1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_step_takes_a_closure():
    model, tracker, opt = attached(apply="step")
    before = weights(model)

    def closure():
        opt.zero_grad()
        loss = tracker(loss_of(model))
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    assert not torch.equal(before[0], model[0].weight)


def test_weight_decay_is_decoupled_and_spares_vectors():
    model, tracker, opt = attached(nn.Linear(6, 6), lr=0.1, kinds={"vector": {"lr": 0.1}}, weight_decay=0.5)
    weight, bias = weights(model)
    tracker((model(torch.zeros(2, 6)) * 0).sum()).backward()  # every gradient is zero
    torch.testing.assert_close(model.weight, weight * 0.95)
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_small_updates(dtype):
    """A hundred steps far below half an ulp: rounding to nearest would leave the weight where it was."""
    model = nn.Linear(16, 16, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    _, tracker, opt = attached(model, rule="adam", lr=1e-4 if dtype == torch.bfloat16 else 2e-5)
    lr = opt.param_groups[0]["lr"]
    for _ in range(100):
        tracker((model.weight * 1.0).sum().float()).backward()
    assert model.weight.dtype == dtype
    # 256 weights, each the sum of 100 unbiased roundings to an ulp of 2^-8 (2^-11) below 1: five standard errors.
    ulp = 2**-8 if dtype == torch.bfloat16 else 2**-11
    error = 5 * (100 * lr * ulp) ** 0.5 / 16
    assert abs((1 - model.weight.float()).mean().item() - 100 * lr) < error
    assert all(value.dtype != dtype for value in opt.state[model.weight].values())


def test_rounding_depends_on_seed_parameter_and_step_alone():
    """The same gradient rounds the same way, whether other parameters take part in the step or not."""
    results = []
    for is_alone in (False, True):
        model, tracker, opt = attached(mlp(8, 2, dtype=torch.bfloat16), apply="step")
        tracker(1.0)
        for record in opt.records:
            if not is_alone or record.plan.name == "0.weight":
                opt.receive(record.plan.parameter, Dense(torch.ones_like(record.plan.parameter)))
        opt.step()
        results.append(model[0].weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_autocast_does_not_reach_the_update(apply):
    results = []
    x, y = regression(16, count=16)
    for is_inside in (False, True):
        model, tracker, opt = attached(apply=apply)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x), y)
            if is_inside:
                tracker(loss).backward()
                opt.step()
        if not is_inside:
            tracker(loss).backward()
            opt.step()
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_convolution_and_batched_views_are_written_back():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3), "attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    _, tracker, opt = attached(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    x = torch.randn(2, 5, 8)
    loss = model["conv"](torch.randn(2, 3, 6, 6)).square().mean() + model["attention"](x, x, x)[0].square().mean()
    tracker(loss).backward()
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"} <= changed


def test_a_weight_with_permuted_memory_is_written_too():
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    _, tracker, opt = attached(model)
    before = model.weight.detach().clone()
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    tracker(model(x).square().mean()).backward()
    assert not torch.equal(before, model.weight)


def test_under_the_context_manager_hooks_go_at_the_end():
    model = mlp()
    with gradlr.attach(model, gradlr.LossTracker()) as opt:
        assert len(opt.records) == 6
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.synchronous("a compiled forward knows nothing of the mode")
@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
def test_compiled_blocks_are_updated_as_well(capture):
    results = []
    for is_compiled in (False, True):
        model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), capture=capture)
        forward = torch.compile(model, backend="aot_eager") if is_compiled else model
        x, y = regression(16, count=16, dtype=torch.float64)
        for _ in range(2):
            tracker(nn.functional.mse_loss(forward(x), y)).backward()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_scheduler_needs_no_step_where_backward_has_updated():
    model, tracker, opt = attached()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    tracker(loss_of(model)).backward()
    scheduler.step()  # torch would warn, and warnings are errors here
    assert opt.param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_rank_below_the_momentum_rank_is_kept(apply):
    rule = LowRankPolar(residual=0)
    model, tracker, opt = attached(nn.Linear(12, 12, bias=False), rank=2, momentum_rank=4, rule=rule, apply=apply)
    for _ in range(3):
        before = model.weight.detach().clone()
        tracker(model(torch.randn(16, 12)).square().mean()).backward()
        opt.step()
        assert torch.linalg.matrix_rank(before - model.weight, rtol=1e-4) == 2


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_rank_far_above_that_of_the_gradient_trains(rows):
    model, tracker, opt = attached(nn.Linear(128, 384), rank=64, momentum_rank=4, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(rows, 128, generator=generator)
        tracker(model(x).square().mean()).backward()
        opt.step()
    assert all(weight.isfinite().all() for weight in model.parameters())
