"""Several losses over one graph: whose backward brings a gradient, and what is told where it is not this model's."""

import pytest
import torch
from models import attached, is_unchanged, loss_of, mlp, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradlr
from gradlr import BackwardError, GradlrWarning, LossError

pytestmark = pytest.mark.also_asynchronous


def pair(apply):
    """(G, its tracker, its optimizer), (D, ...): what G makes goes through D."""
    return attached(mlp(), apply=apply), attached(mlp(seed=1), apply=apply)


def batch():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_number", [False, True])
def test_the_backward_of_another_trackers_loss_is_named_where_backward_updates(is_number):
    """The second half of a GAN's step, as torch's tutorial has it: the generator's loss flows through the discriminator."""
    (g, tracker_g, _), (d, tracker_d, opt_d) = pair("backward")
    tracker_d(loss_of(d)).backward()
    if is_number:
        tracker_d(0.5)
    before = weights(g), weights(d)
    loss = tracker_g(d(g(batch())).square().mean())
    with pytest.raises(BackwardError) as raised:
        loss.backward()
    said = str(raised.value)
    assert "loss number 1 of another tracker, which trains a Sequential (6 parameters, '0.weight' first)" in said
    assert 'apply="step"' in said and "requires_grad_(False)" in said and "show the loss to both trackers" in said
    assert is_unchanged(g, before[0]) and is_unchanged(d, before[1])
    tracker_d(loss_of(d)).backward()
    opt_d.step()


@pytest.mark.parametrize("way", ["frozen", "both"])
def test_the_ways_out_of_it(way):
    (g, tracker_g, _), (d, tracker_d, opt_d) = pair("backward")
    before = weights(d)
    d.requires_grad_(way == "both")
    loss = tracker_g(d(g(batch())).square().mean())
    (tracker_d(loss) if way == "both" else loss).backward()
    opt_d.step() if way == "both" else None
    assert is_unchanged(d, before) == (way == "frozen")
    d.requires_grad_(True)
    tracker_d(loss_of(d)).backward()
    opt_d.step()


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_loss_shown_to_another_models_tracker(apply):
    """Trackers mixed up."""
    (_, tracker_g, _), (d, _, _) = pair(apply)
    before = weights(d)
    with pytest.raises(LossError, match="in the backward of loss number 1 of another tracker.*show it.*as well"):
        tracker_g(loss_of(d)).backward()
    assert is_unchanged(d, before)


def test_gradients_of_another_trackers_loss_that_step_writes_are_told_once():
    """Actor and critic: the actor's loss flows through the critic, and nobody drops what it leaves there."""
    (actor, tracker_a, opt_a), (critic, tracker_c, opt_c) = pair("step")
    for step in range(2):
        tracker_a(critic(actor(batch())).square().mean()).backward() if step else None
        tracker_c(loss_of(critic)).backward()
        if step:
            with pytest.warns(GradlrWarning, match="in the backward of loss number 1 of another tracker.*zero_grad"):
                opt_c.step()
            opt_a.step()
        else:
            opt_c.step()
    tracker_a(critic(actor(batch())).square().mean()).backward()
    opt_a.step()
    opt_c.step()


def test_setting_grad_to_none_by_hand_drops_nothing_and_is_told():
    (g, tracker_g, opt_g), (d, tracker_d, opt_d) = pair("step")
    tracker_d(loss_of(d)).backward()
    opt_d.step()
    tracker_g(d(g(batch())).square().mean()).backward()
    for parameter in d.parameters():
        parameter.grad = None
    tracker_d(loss_of(d)).backward()
    with pytest.warns(GradlrWarning, match="of another tracker"):
        opt_d.step()


@pytest.mark.parametrize("order", [1, -1])
def test_losses_of_two_trackers_in_one_backward_are_both_their_own(order):
    """Whichever term autograd reaches first."""
    (g, tracker_g, opt_g), (d, tracker_d, opt_d) = pair("step")
    of_d = tracker_d(loss_of(d)) if order > 0 else None
    of_g = tracker_g(d(g(batch())).square().mean())
    of_d = tracker_d(loss_of(d)) if of_d is None else of_d
    (of_d + of_g).backward()
    opt_g.step()
    opt_d.step()


def test_one_tracker_for_two_models_is_everybodys():
    tracker, g, d = gradlr.LossTracker(), mlp(), mlp(seed=1)
    with gradlr.attach(g, tracker, rank=4) as one, gradlr.attach(d, tracker, rank=4) as other:
        tracker(d(g(batch())).square().mean()).backward()
        one.step()
        other.step()


def test_a_nested_backward_is_that_of_the_loss_around_it():
    """Reentrant checkpointing."""
    model, tracker, opt = attached(apply="step")
    x = batch().requires_grad_(True)
    tracker(checkpoint(model, x, use_reentrant=True).square().mean()).backward()
    opt.step()


class Heads(nn.Module):
    """Two losses over one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.other = mlp(), mlp(depth=1), mlp(depth=1, seed=2)

    def forward(self, x):
        hidden = self.trunk(x)
        return self.one(hidden).square().mean(), (self.other(hidden) - 1).square().mean()


def test_a_kept_graph_is_told_before_torch_says_that_a_weight_has_changed():
    model, tracker, _ = attached(Heads())
    one, other = model(batch())
    with pytest.warns(GradlrWarning, match=r"loss number 1 keeps its graph.*an inplace operation.*on their sum.*apply=\"step\""):
        tracker(one).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tracker(other).backward()


def test_a_state_carried_over_without_detach_is_told():
    """Truncated backpropagation through time that keeps the graph of all steps before."""
    cell = nn.RNNCell(16, 16)
    _, tracker, _ = attached(cell)
    state = cell(batch(), torch.zeros(4, 16, requires_grad=True))
    with pytest.warns(GradlrWarning, match="loss number 1 keeps its graph"):
        tracker(state.square().mean()).backward(retain_graph=True)
    state = cell(batch(), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tracker(state.square().mean()).backward()


def test_both_ways_out_of_two_losses_over_one_trunk():
    model, tracker, opt = attached(Heads())
    tracker(sum(model(batch()))).backward()
    opt.step()
    model, tracker, opt = attached(Heads(), apply="step")
    one, other = model(batch())
    tracker(one).backward(retain_graph=True)
    tracker(other).backward()
    opt.step()


def test_gradients_asked_for_of_a_kept_graph_change_no_weight():
    """`torch.autograd.grad` fires no hook: the backward after it is an ordinary one."""
    model, tracker, opt = attached(Heads())
    one, other = model(batch())
    loss = tracker(one + other)
    torch.autograd.grad(one, list(model.one.parameters()), retain_graph=True)
    torch.autograd.grad(loss, list(model.other.parameters()), retain_graph=True)
    loss.backward()
    opt.step()


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_gradient_penalty_keeps_no_graph(apply):
    """WGAN-GP: the penalty's own gradient is asked for with create_graph, inside the loss."""
    results = []
    for is_explicit in (False, True):
        critic, tracker, opt = attached(mlp(dtype=torch.float64), apply=apply)
        for _ in range(2):
            x = batch().double().requires_grad_()
            score = critic(x).sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            loss = score + (slope.norm(dim=1) - 1).square().mean()
            if is_explicit:
                gradients = torch.autograd.grad(loss, list(critic.parameters()))
                pairs = zip(critic.parameters(), gradients, strict=True)
                loss = sum((parameter * gradient).sum() for parameter, gradient in pairs)
            tracker(loss).backward()
            opt.step()
        results.append(weights(critic))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_next_loss_is_no_old_one():
    model, tracker, opt = attached()
    for _ in range(2):
        tracker(loss_of(model)).backward()
        opt.step()
        tracker(loss_of(model).detach())  # a number, of an evaluation
    tracker(torch.zeros((), requires_grad=True))  # a leaf has no node


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_step_without_any_backward(apply):
    model, tracker, opt = attached(apply=apply)
    tracker(loss_of(model))
    with pytest.warns(GradlrWarning, match="nothing to do.*none of the 6.*Was backward called"):
        opt.step()
    tracker(loss_of(model)).backward()
    opt.step()
