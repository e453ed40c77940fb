"""An optimizer that is dropped or detached gives back ordinary parameters, and all of its memory."""

import copy
import gc
import weakref

import pytest
import torch
from models import attached, is_unchanged, loss_of, train, weights
from torch import nn

import gradlr
from gradlr import AttachError, BackwardError

pytestmark = pytest.mark.also_asynchronous


def test_a_lost_optimizer_is_told_in_the_next_backward():
    model, tracker, opt = attached()
    del opt
    gc.collect()
    with pytest.raises(AttachError, match="Keep it in a variable"):
        tracker(loss_of(model)).backward()
    model.zero_grad()
    gradlr.attach(model, tracker).detach()  # attaching anew is allowed


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("has_scheduler", [False, True])
def test_a_dropped_optimizer_frees_its_state_and_does_not_block_a_new_one(has_scheduler, capture):
    model, tracker, opt = attached(capture=capture)
    if has_scheduler:  # makes the optimizer part of a reference cycle, in some versions of torch
        opt.itself = opt
        scheduler = torch.optim.lr_scheduler.ConstantLR(opt)
        train(model, opt, tracker, 1)
        scheduler.step()
        del scheduler
    else:
        train(model, opt, tracker, 1)
    state = weakref.ref(opt.state[model[0].weight]["P"])
    del opt
    _, tracker, opt = attached(model, capture=capture)
    assert state() is None
    train(model, opt, tracker, 1)


def test_a_dropped_model_frees_everything():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    references = [weakref.ref(thing) for thing in (model, model[0].weight, opt, opt.state[model[0].weight]["P"])]
    del model, opt
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_detach_gives_back_ordinary_parameters():
    model, tracker, opt = attached()
    opt.detach()
    opt.detach()
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert opt.state[model[0].weight]["P"].shape == (16, 2)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_graph_from_before_detach_gives_ordinary_gradients(apply, again):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    plain, ids = copy.deepcopy(model), torch.randint(0, 9, (4, 3))
    plain(ids).square().mean().backward()
    _, tracker, opt = attached(model, capture="adaptor", apply=apply, rule=gradlr.rules.LowRankPolar(residual=0))
    before, loss = weights(model), tracker(model(ids).square().mean())
    opt.detach()
    if again:
        _, other_tracker, other = attached(model, apply="step")
        other_tracker(1.0)
    loss.backward()
    assert is_unchanged(model, before) and opt.pending.gradients.get(1) is None
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if again:
            (mine,) = (other.pending.gradients[record.index].matrix for record in other.records if record.plan.parameter is mine)
        torch.testing.assert_close(mine if again else mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_one_sided_graph_from_before_detach_has_no_gradient_to_give():
    model, tracker, opt = attached(capture="one_sided")
    loss = tracker(loss_of(model))
    opt.detach()
    with pytest.raises(BackwardError, match=r"opt.detach\(\) since the forward.*capture=\"adaptor\""):
        loss.backward()


def test_an_optimizer_is_not_copied_but_a_tracker_is():
    model, tracker, opt = attached()
    train(model, opt, tracker, 2)
    with pytest.raises(AttachError, match="state_dict"):
        copy.deepcopy(opt)
    assert copy.deepcopy(tracker).history == tracker.history
