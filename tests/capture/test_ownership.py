"""A gradient is overwritten only where nobody else holds it; forms that no capture takes are refused."""

import pytest
import torch
from models import attached, is_unchanged, weights
from torch import nn

from gradlr import BackwardError
from gradlr.gradient import Dense

pytestmark = pytest.mark.also_asynchronous


class SparseEntries(torch.autograd.Function):
    """The identity, whose gradient is sparse by entries."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_sparse(2)


def test_gradients_that_are_sparse_by_entries_are_refused():
    model = nn.Linear(8, 4, bias=False)
    _, tracker, _ = attached(model)
    before = weights(model)
    with pytest.raises(BackwardError, match="sparse_coo.*by rows"):
        tracker(SparseEntries.apply(model.weight).sum()).backward()
    assert is_unchanged(model, before)


def test_a_dense_gradient_is_consumed_only_where_it_is_owned():
    gradient = torch.randn(6, 6)
    kept = gradient.clone()
    model, tracker, opt = attached(nn.Linear(6, 6, bias=False), rank=2)
    tracker(1.0)
    opt.receive(model.weight, Dense(gradient))
    assert torch.equal(gradient, kept)


def test_a_gradient_that_another_hook_has_kept_is_not_overwritten():
    model, kept = nn.Linear(16, 16, bias=False), []
    model.weight.register_post_accumulate_grad_hook(lambda p: kept.append((p.grad, p.grad.clone())))
    _, tracker, opt = attached(model)
    tracker(model(torch.randn(4, 16)).square().mean()).backward()
    ((gradient, copied),) = kept
    assert torch.equal(gradient, copied)


def test_a_gradient_that_other_nodes_still_need_is_not_overwritten():
    """A sum hands the same buffer to both of its terms; the layer below must get its gradient whole."""
    torch.manual_seed(0)
    patch, position, head = nn.Linear(12, 16), nn.Embedding(9, 16), nn.Linear(16, 4)
    model = nn.ModuleList([patch, position, head])
    _, tracker, opt = attached(model, rank=2, momentum_rank=1)
    hidden = patch(torch.randn(1, 9, 12))
    loss = (head(torch.tanh(hidden + position.weight.unsqueeze(0))) ** 2).sum()
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    found = []
    hidden.register_hook(lambda gradient: found.append(gradient.clone()))
    tracker(loss).backward()
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("rules", [("low_rank_polar", "adam"), ("adam", "low_rank_polar")])
def test_gradients_that_share_a_buffer_wait_apart(rules):
    results = []
    for is_shared in (False, True):
        torch.manual_seed(0)
        model = nn.ParameterDict({"a": torch.randn(8, 8, dtype=torch.float64), "b": torch.randn(8, 8, dtype=torch.float64)})
        groups = [{"match": name, "rule": rule} for name, rule in zip("ab", rules, strict=True)]
        _, tracker, opt = attached(model, apply="step", groups=groups, max_grad_norm=0.5)
        total = model["a"].view(-1) + model["b"].view(-1) if is_shared else (model["a"] * 1 + model["b"] * 1).view(-1)
        tracker(total.square().sum()).backward()
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
