"""What an update of few directions cannot keep: masks of single weights. Told, and kept by the rules that are named."""

import pytest
import torch
from models import attached, loss_of, mlp, regression, train
from torch import nn
from torch.nn.utils import parametrize, prune

import gradlr
from gradlr import GradlrWarning
from gradlr.engine.masks import mixes_entries

pytestmark = pytest.mark.also_asynchronous
KEEPING = ["multi_normalized", "adam"]


def half():
    """Every other entry of a 16 × 16 matrix, at random."""
    return (torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def masked(**options):
    """The last layer starts masked, and a hook masks its gradient: by itself, nothing else keeps the zeros."""
    model, mask = mlp(), half()
    with torch.no_grad():
        model[4].weight.mul_(mask)
    handle = model[4].weight.register_hook(lambda gradient: gradient * mask)
    return (*attached(model, **options), mask, handle)


@pytest.mark.parametrize("options", [{}, {"apply": "step"}, {"capture": "adaptor"}, {"rule": "polar"}])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_mask_in_a_hook_is_told_once(options):
    model, tracker, opt, mask, _ = masked(**options)
    loss = tracker(loss_of(model))
    zeros = int((mask == 0).sum())
    with pytest.warns(GradlrWarning, match=f"'4.weight' has a hook.*{zeros} zeros.*multi_normalized.*adam"):
        loss.backward()
    opt.step()
    assert (model[4].weight * (1 - mask)).any()  # as told
    train(model, opt, tracker, 2)


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("rule", KEEPING)
def test_the_rules_that_are_named_keep_the_mask(rule, apply):
    model, tracker, opt, mask, _ = masked(groups=[{"match": "4.weight", "rule": rule}], apply=apply)
    before = model[4].weight.detach().clone()
    train(model, opt, tracker, 4)
    assert not (model[4].weight * (1 - mask)).any() and (model[4].weight - before).any()


def test_which_rules_mix_entries():
    mixing = {name for name, rule in gradlr.rules.BUILT_IN.items() if mixes_entries(rule())}
    assert mixing == {"low_rank_polar", "polar", "factor_moments"}


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_that_are_masked_as_a_whole_stay_and_say_nothing(axis):
    model = mlp()
    still = torch.arange(0, 16, 3)
    model[2].weight.register_hook(lambda gradient: gradient.index_fill(axis, still, 0.0))
    _, tracker, opt = attached(model)
    before = model[2].weight.detach().index_select(axis, still)
    train(model, opt, tracker, 3)
    torch.testing.assert_close(model[2].weight.index_select(axis, still), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hook", [lambda grad: None, lambda grad: 2 * grad, lambda grad: grad.clamp(-1e-3, 1e-3)])
def test_hooks_that_do_something_else_say_nothing(hook):
    model = mlp()
    model[2].weight.register_hook(hook)
    _, tracker, opt = attached(model)
    train(model, opt, tracker, 2)


def test_a_mask_in_a_post_accumulate_hook_of_before_attaching():
    model, mask = mlp(), half()

    def cut(parameter):
        parameter.grad.mul_(mask)

    model[2].weight.register_post_accumulate_grad_hook(cut)
    _, tracker, _ = attached(model)
    loss = tracker(loss_of(model))
    with pytest.warns(GradlrWarning, match="'2.weight' has a hook"):
        loss.backward()


def test_a_post_accumulate_hook_of_after_attaching_finds_no_gradient_and_that_is_told_once():
    model, tracker, opt = attached()
    found = []
    model[2].weight.register_post_accumulate_grad_hook(lambda parameter: found.append(parameter.grad))
    with pytest.warns(GradlrWarning, match=r"1 parameters \('2.weight' first\) have post-accumulate hooks.*find .grad None"):
        tracker(loss_of(model)).backward()
    assert found == [None]
    opt.step()
    train(model, opt, tracker, 2)


def pruned(model=None):
    model = mlp() if model is None else model
    prune.random_unstructured(model[2], "weight", 0.75)
    return model


@pytest.mark.parametrize("is_late", [False, True])
def test_pruning_is_told_once_and_keeps_what_it_masks(is_late):
    model = mlp() if is_late else pruned()
    _, tracker, opt = attached(model)
    if is_late:
        train(model, opt, tracker, 1)
        pruned(model)
    with pytest.warns(GradlrWarning, match=r"'2.weight_orig' is pruned: 64 of its 256 entries.*about 2 times.*multi_normalized"):
        tracker(loss_of(model)).backward()
    opt.step()
    train(model, opt, tracker, 3)
    assert not (model[2].weight * (1 - model[2].weight_mask)).any()
    prune.remove(model[2], "weight")
    assert int(model[2].weight.count_nonzero()) == 64


def test_pruned_entries_move_further_than_the_rate_says():
    """The figure of the message: the whole matrix's norm on a quarter of its entries."""
    model = pruned()
    _, tracker, opt = attached(model, lr=1e-3, momentum_rank=0)
    before, mask = model[2].weight.detach().clone(), model[2].weight_mask.bool()
    with pytest.warns(GradlrWarning, match="about 2 times"):
        tracker(loss_of(model)).backward()
    model(regression(16)[0])  # the pruned weight is made in forward
    moved = (model[2].weight.detach() - before)[mask].square().mean().sqrt().item()
    assert moved == pytest.approx(2 * 2e-3, rel=0.2)  # some of it falls on masked entries


@pytest.mark.parametrize("rule", KEEPING)
def test_pruned_weights_under_a_rule_that_keeps_zeros_say_nothing(rule):
    model = pruned()
    _, tracker, opt = attached(model, groups=[{"match": "*_orig", "rule": rule}])
    before = model[2].weight_orig.detach().clone()
    train(model, opt, tracker, 3)
    moved = model[2].weight_orig - before
    assert moved.any() and not (moved * (1 - model[2].weight_mask)).any()


class Mask(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", half())

    def forward(self, weight):
        return weight * self.mask


def test_a_mask_by_parametrization_keeps_what_it_masks():
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", Mask())
    _, tracker, opt = attached(model)
    train(model, opt, tracker, 3)
    assert not (model[2].weight * (1 - half())).any()
