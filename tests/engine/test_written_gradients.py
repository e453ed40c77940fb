"""Gradients that somebody writes into `.grad` by hand, in the loops that do so, beside the same gradients through backward."""

import copy

import pytest
import torch
from models import Mixed, attached, is_unchanged, loss_of, mlp, regression, train, weights
from torch import nn

from gradlr import BackwardError, GradlrWarning, LossError

pytestmark = pytest.mark.also_asynchronous
WIDTH = 64  # wide enough for sketches of rank 4 to wait instead of gradients


def wide(seed=0):
    return mlp(WIDTH, 2, dtype=torch.float64, seed=seed)


def batch(seed):
    return torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def task(model, seed, target=0.0):
    return (model(batch(seed)) - target).square().mean()


def write(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def through_backward(model, gradients, show=lambda loss: loss):
    """A backward that brings these gradients."""
    show(sum((parameter * gradient).sum() for parameter, gradient in zip(model.parameters(), gradients, strict=True))).backward()


def gradients_of(loss, model, **options):
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def reptile(model, seed):
    """First-order meta-learning: from the weights to where a copy has trained to."""
    fast = copy.deepcopy(model)
    inner = torch.optim.SGD(fast.parameters(), lr=0.1)
    for number in range(3):
        inner.zero_grad()
        loss = task(fast, 10 * seed + number)
        loss.backward()
        inner.step()
    pairs = zip(model.parameters(), fast.parameters(), strict=True)
    return loss.item(), [(slow - quick).detach() for slow, quick in pairs]


def gradient_surgery(model, seed):
    """PCGrad: of two tasks' gradients that point against each other, each loses what it has along the other."""
    losses = [task(model, seed, 1.0), task(model, seed, -1.0)]
    flat = [nn.utils.parameters_to_vector(gradients_of(loss, model)) for loss in losses]
    dot = flat[0] @ flat[1]
    assert dot < 0
    total = flat[0] - dot / flat[1].square().sum() * flat[1] + flat[1] - dot / flat[0].square().sum() * flat[0]
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = zip(total.split(sizes), model.parameters(), strict=True)
    return sum(losses).item(), [part.view_as(parameter) for part, parameter in parts]


def sharpness_aware(model, seed):
    """SAM: the gradient where the loss is largest nearby, applied where the weights are."""
    ascent = gradients_of(task(model, seed), model)
    move(model, ascent, 0.05)
    loss = task(model, seed)
    gradients = gradients_of(loss, model)
    move(model, ascent, -0.05)
    return loss.item(), gradients


@torch.no_grad()
def move(model, gradients, distance):
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.add_(distance * gradient / norm)


LOOPS = pytest.mark.parametrize("loop", [reptile, gradient_surgery, sharpness_aware])


@LOOPS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-3}, {"capture": "adaptor", "momentum_rank": 0}])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_what_step_finds_in_grad_is_a_gradient_as_any_other(loop, options):
    results = []
    for bring in (write, through_backward):
        model, tracker, opt = attached(wide(), apply="step", weight_decay=0.1, **options)
        for seed in range(3):
            loss, gradients = loop(model, seed)
            tracker(loss)
            bring(model, gradients)
            opt.step()
            assert all(parameter.grad is None for parameter in model.parameters())
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert opt.grad_norm == pytest.approx(norm.item(), rel=1e-9)
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)  # the norm is summed in another order


@LOOPS
def test_where_backward_updates_step_tells_that_nothing_would_take_them(loop):
    model, tracker, opt = attached(wide())
    before = weights(model)
    loss, gradients = loop(model, 0)
    assert is_unchanged(model, before) or loop is sharpness_aware  # which comes back but for a rounding error
    before = weights(model)
    tracker(loss)
    write(model, gradients)
    with pytest.raises(BackwardError, match=r"4 parameters hold gradients \('0.weight' first\).*apply=\"step\".*zero_grad"):
        opt.step()
    assert is_unchanged(model, before)
    tracker(task(model, 1)).backward()  # and the next loss goes on
    opt.step()


@pytest.mark.parametrize("when", ["before the loss", "before backward"])
def test_where_backward_updates_a_left_over_joins_no_update(when):
    model, tracker, opt = attached()
    before, loss = weights(model), loss_of(model)
    shown = None if when == "before the loss" else tracker(loss)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    with pytest.raises(BackwardError, match=r"1 parameter holds a gradient \('2.weight' first\)"):
        tracker(loss) if shown is None else shown.backward()
    assert is_unchanged(model, before)
    opt.zero_grad()
    train(model, opt, tracker, 2)


def test_step_sums_what_was_there_before_backward_as_torch_does():
    results = []
    for is_written in (True, False):
        model, tracker, opt = attached(wide(), apply="step")
        extra = gradients_of(task(model, 5), model)
        loss = tracker(task(model, 0))
        if is_written:
            write(model, extra)
            loss.backward()
        else:
            whole = [one + other for one, other in zip(gradients_of(loss, model), extra, strict=True)]
            through_backward(model, whole)
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)  # summed in another order


@pytest.mark.parametrize("is_scaled", [True, False])
def test_some_parameters_by_hand_and_others_by_backward_clipped_and_scaled_together(is_scaled):
    """Torch's own tools see both over the optimizer's parameters: the gradients themselves, and the norm of what waits."""
    results = []
    for is_split in (True, False):
        model, tracker, opt = attached(wide(), apply="step", momentum_rank=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(2):
            opt.zero_grad()
            loss = scaler.scale(tracker(task(model, seed)))
            if is_split:
                by_hand = gradients_of(loss, model[0], retain_graph=True)
                loss.backward(inputs=list(model[2].parameters()))
                write(model[0], by_hand) if is_scaled else None
            else:
                loss.backward()
            scaler.unscale_(opt)
            if is_split and not is_scaled:  # what is written after unscaling is taken as it is
                write(model[0], [gradient / 1024.0 for gradient in by_hand])
            held = [parameter for group in opt.param_groups for parameter in group["params"]]
            norm = nn.utils.clip_grad_norm_(held, 1e-3)
            assert norm > 2e-3
            scaler.step(opt)
            scaler.update()
        assert opt.grad_norm == pytest.approx(1e-3, rel=1e-2)
        results.append([*weights(model), *(value for state in opt.state.values() for value in state.values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_written_gradient_that_overflows_leaves_the_step_out():
    model, tracker, opt = attached(wide(), apply="step")
    before = weights(model)
    tracker(1.0)
    write(model, [torch.full_like(parameter, torch.inf) for parameter in model.parameters()])
    with pytest.warns(GradlrWarning, match="left out whole"):
        step_and_show(opt, tracker)
    assert is_unchanged(model, before) and opt.skipped == 1


def step_and_show(opt, tracker):
    opt.step()
    tracker(1.0)  # a device that runs behind the host tells it here


def test_what_was_written_is_not_overwritten():
    model, tracker, opt = attached(wide(), apply="step", max_grad_norm=1e-3)
    gradients = gradients_of(task(model, 0), model)
    copies = [gradient.clone() for gradient in gradients]
    tracker(1.0)
    write(model, gradients)
    opt.step()
    assert all(torch.equal(one, other) for one, other in zip(gradients, copies, strict=True))


def test_every_kind_of_parameter_takes_a_written_gradient():
    results = []
    for bring in (write, through_backward):
        torch.manual_seed(0)
        model, tracker, opt = attached(Mixed().double(), apply="step")
        loss = tracker(model(torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))).square().mean())
        bring(model, gradients_of(loss, model))
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_gradient_by_hand_beside_one_that_waits_is_told():
    """Gradient surgery by `.grad`: each backward's gradient is read, found to be None, and zeros are written in its place."""
    model, tracker, opt = attached(wide(), apply="step")
    before = weights(model)
    tracker(task(model, 0)).backward()
    write(model, [torch.zeros_like(parameter) for parameter in model.parameters()])
    with pytest.raises(BackwardError, match=r"'0.weight' has a gradient that waits.*4 parameters.*torch.autograd.grad\(loss"):
        opt.step()
    assert is_unchanged(model, before)
    train_one(model, tracker, opt)


def test_a_gradient_by_hand_between_two_backwards_is_told():
    """In torch it would have taken the place of what the first one brought."""
    model, tracker, opt = attached(wide(), apply="step")
    before = weights(model)
    tracker(task(model, 0)).backward()
    loss = tracker(task(model, 1))
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    with pytest.raises(BackwardError, match="'2.weight' has a gradient that waits.*1 parameters"):
        loss.backward()
    opt.zero_grad()
    assert is_unchanged(model, before)
    train_one(model, tracker, opt)


def train_one(model, tracker, opt):
    before = weights(model)
    tracker(task(model, 1)).backward()
    opt.step()
    assert not is_unchanged(model, before)


def test_a_written_gradient_needs_a_loss():
    model, tracker, opt = attached(wide(), apply="step")
    before = weights(model)
    write(model, gradients_of(task(model, 0), model))
    with pytest.raises(LossError, match=r"'0.weight' holds a gradient.*never shown a loss.*a number will do"):
        opt.step()
    assert is_unchanged(model, before)
    write(model, gradients_of(task(model, 0), model))
    tracker(1.0)
    opt.step()
    assert not is_unchanged(model, before)


def test_zero_grad_drops_what_was_written():
    model, tracker, opt = attached(wide(), apply="step")
    before = weights(model)
    tracker(1.0)
    write(model, gradients_of(task(model, 0), model))
    opt.zero_grad()
    with pytest.warns(GradlrWarning, match="nothing to do"):
        opt.step()
    assert is_unchanged(model, before)


@pytest.mark.parametrize("chunks", [1, 4])
def test_cached_representations_train_as_the_whole_batch(chunks):
    """GradCache: the loss of all representations at once, then each chunk's forward anew with its share of the gradient."""
    results = []
    for is_cached in (True, False):
        model, tracker, opt = attached(wide(), apply="step", rank=WIDTH, rule="low_rank_polar")
        for seed in range(2):
            x = batch(seed)
            if is_cached:
                with torch.no_grad():
                    kept = model(x)
                kept.requires_grad_()
                tracker(contrast(kept)).backward()
                for rows, gradient in zip(x.chunk(chunks), kept.grad.chunk(chunks), strict=True):
                    (model(rows) * gradient).sum().backward()
            else:
                tracker(contrast(model(x))).backward()
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # summed in another order


def contrast(found):
    """Each representation against all others, as in contrastive learning."""
    return nn.functional.cross_entropy(found @ found.mT, torch.arange(len(found)))


@pytest.mark.synchronous("the second chunk's error is the same")
def test_cached_representations_where_backward_updates():
    model, tracker, opt = attached(wide())
    kept = model(batch(0)).detach().requires_grad_()
    tracker(contrast(kept)).backward()
    first, second = zip(batch(0).chunk(2), kept.grad.chunk(2), strict=True)
    (model(first[0]) * first[1]).sum().backward()
    share = (model(second[0]) * second[1]).sum()
    with pytest.raises(BackwardError, match='second gradient.*apply="step"'):
        share.backward()


def test_one_chunk_of_cached_representations_where_backward_updates():
    results = []
    for is_cached in (True, False):
        model, tracker, opt = attached(wide())
        for seed in range(2):
            if is_cached:
                kept = model(batch(seed)).detach().requires_grad_()
                tracker(contrast(kept)).backward()
                (model(batch(seed)) * kept.grad).sum().backward()
            else:
                tracker(contrast(model(batch(seed)))).backward()
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # summed in another order


def test_sharpness_aware_steps_where_backward_updates():
    """The ascent is taken back after the update: the same, but for rounding, as the update of the weights where they were."""
    results = []
    for is_by_hand in (True, False):
        model, tracker, opt = attached(wide())
        for seed in range(2):
            if is_by_hand:
                ascent = gradients_of(task(model, seed), model)
                move(model, ascent, 0.05)
                tracker(task(model, seed)).backward()
                move(model, ascent, -0.05)
            else:
                through_backward(model, sharpness_aware(model, seed)[1], tracker)
            opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


class Lookahead:
    """Every k steps, go a part of the way from the slow weights to the fast ones (Zhang et al. 2019, its authors' code)."""

    def __init__(self, optimizer, k=2, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.slow = {one: one.detach().clone() for group in optimizer.param_groups for one in group["params"]}

    def step(self):
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for fast, slow in self.slow.items():
                slow += self.alpha * (fast.data - slow)
                fast.data.copy_(slow)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_lookahead_around_the_optimizer(apply):
    x, y = regression(16)
    model, tracker, opt = attached(mlp(), apply=apply)
    train(model, Lookahead(opt), tracker, 2, x=x, y=y)
    plain, plain_tracker, plain_opt = attached(mlp(), apply=apply)
    start = weights(plain)
    train(plain, plain_opt, plain_tracker, 2, x=x, y=y)
    for parameter, fast, slow in zip(model.parameters(), plain.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, slow + 0.5 * (fast - slow), rtol=0, atol=0)
