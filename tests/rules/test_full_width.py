"""Rules that look at the whole gradient: no state, no rank, the same update however the gradient is captured."""

import copy

import pytest
import torch
from models import attached, mlp
from torch import nn

from gradlr.gradient import Dense, OuterProduct
from gradlr.rules import LowRankPolar, MultiNormalized, Polar

from .driving import context

QUIET = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
RULES = pytest.mark.parametrize("rule", [LowRankPolar(), MultiNormalized(), Polar()], ids=lambda rule: rule.name)


@RULES
@pytest.mark.parametrize("count", [3, 24, 96])
def test_an_update_is_the_same_whether_the_gradient_is_formed_or_not(rule, count):
    delta, x = torch.randn(count, 120, dtype=torch.float64) * 1e-3, torch.randn(count, 200, dtype=torch.float64)
    one, _ = rule.update(OuterProduct(delta, x), {}, context(16, 0))
    other, _ = rule.update(Dense(delta.mT @ x), {}, context(16, 0))
    # 1e-16 of rounding, times the condition of the Gram matrices and of five steps that multiply small values by 3.44 each.
    torch.testing.assert_close(one.direction(), other.direction(), rtol=0, atol=1e-5)


def test_with_few_tokens_nothing_of_the_weights_size_is_made():
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(
                part.numel() for part in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(part)
            )
            return result

    delta, x = torch.randn(16, 300), torch.randn(16, 400)
    for rule in (LowRankPolar(), MultiNormalized(), Polar()):
        with Sizes():
            update, _ = rule.update(OuterProduct(delta, x), {}, context(8, 0))
        assert update.dense is None
    # The largest are products of all tokens and of r columns with one side.
    assert max(made) < 300 * 400 / 4


@QUIET
@RULES
def test_training_with_adaptors_is_training_with_hooks(rule):
    model = mlp(48, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    x = torch.randn(6, 8, 48, dtype=torch.float64)
    for one, capture in ((model, "hook"), (twin, "adaptor")):
        _, tracker, _opt = attached(one, rule=rule, capture=capture, momentum_rank=0, lr=1e-3)
        for batch in x:
            tracker(one(batch).square().mean()).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        # Updates agree to 1e-5 at worst, above, times six steps of 1e-3.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["multi_normalized", "polar"])
def test_micro_batches_of_a_step_make_the_update_of_the_whole_batch(rule):
    model = mlp(16, 2, dtype=torch.float64)
    twin = copy.deepcopy(model)
    _, tracker, opt = attached(model, rule=rule, apply="step", lr=1e-3)
    _, twin_tracker, twin_opt = attached(twin, rule=rule, apply="step", lr=1e-3)
    x = torch.randn(12, 16, dtype=torch.float64)
    for part in x.chunk(3):
        (tracker(model(part).square().mean()) / 3).backward()
    opt.step()
    twin_tracker(twin(x).square().mean()).backward()
    twin_opt.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)  # sums in another order, times the condition of a polar factor


@pytest.mark.parametrize("rule", ["multi_normalized", "polar"])
def test_they_keep_nothing_and_show_no_rank(rule):
    _, tracker, opt = attached(nn.Sequential(nn.Linear(8, 8, bias=False)), rule=rule)
    assert all(state.keys() == {"step"} for state in opt.state.values())
    assert "4/4" not in repr(opt)


def test_multi_normalized_moves_every_column_by_lr():
    (update,) = {id(rule): rule.update(Dense(torch.randn(12, 9)), {}, context())[0] for rule in [MultiNormalized()]}.values()
    # A few roundings in float32.
    torch.testing.assert_close(update.dense.square().mean(dim=0), torch.ones(9), rtol=1e-5, atol=0)


@QUIET
@RULES
def test_a_batch_without_tokens_changes_nothing(rule):
    model = mlp(16, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _, tracker, _opt = attached(model, rule=rule, capture="adaptor", momentum_rank=0)
    tracker(model(torch.zeros(0, 16)).sum()).backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
