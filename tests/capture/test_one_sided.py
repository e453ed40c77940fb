"""One-sided capture: forward keeps x X instead of x, and the rule sees the projected gradient."""

import copy
import functools

import pytest
import torch
from models import attached, mlp, regression, train
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gradlr
from gradlr.apps.bench.memory import peak_bytes
from gradlr.capture.layer_swap import SwappedLayer
from gradlr.gradient import Sketched
from gradlr.rules import FactorMoments, LowRankPolar

pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")

PLAIN = {"rule": LowRankPolar(residual=0)}


class Recorder(LowRankPolar):
    """The default rule, keeping the gradients that it was handed."""

    def __init__(self):
        super().__init__(residual=0)
        self.seen = []

    def update(self, gradient, state, settings):
        self.seen.append(gradient)
        return super().update(gradient, state, settings)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_the_rule_sees_the_projection_on_the_basis_that_forward_used(apply):
    layer, x = nn.Linear(12, 9, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(x).pow(3).sum(), layer.weight)
    rule = Recorder()
    _, tracker, opt = attached(layer, rule=rule, capture="one_sided", apply=apply)
    loss = layer(x).pow(3).sum()
    basis = opt.bases.held(opt.records[0])
    tracker(loss).backward()
    opt.step()
    (gradient,) = rule.seen
    assert type(gradient) is Sketched and gradient.left is None and gradient.right is basis
    torch.testing.assert_close(gradient.matrix, expected @ basis @ basis.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    layer(x)
    assert opt.bases.held(opt.records[0]) is not basis  # a new one after the update


def test_at_full_rank_the_projection_is_the_gradient():
    results = []
    for capture in ("hook", "one_sided"):
        model = mlp(8, 3, dtype=torch.float64)
        model, tracker, opt = attached(model, capture=capture, rank=8, momentum_rank=8, **PLAIN)
        results.append((train(model, opt, tracker, 10), weights(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=0)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rule", [LowRankPolar(), FactorMoments()])
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_training_lowers_the_loss(rule, apply):
    model, tracker, opt = attached(mlp(16, 3), capture="one_sided", rule=rule, rank=8, apply=apply)
    losses = train(model, opt, tracker, 30)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("is_one_backward", [False, True])
def test_micro_batches_share_a_basis_and_add(is_one_backward):
    """What waits is the projection of the summed gradient, on the basis that the first micro-batch made."""
    x, y = regression(16, count=32, dtype=torch.float64)
    model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), capture="one_sided", apply="step", **PLAIN)
    train(model, opt, tracker, 2)
    plain = copy.deepcopy(model)
    nn.functional.mse_loss(plain(x), y).backward()
    losses = [nn.functional.mse_loss(model(x[rows]), y[rows]) / 4 for rows in torch.arange(32).chunk(4)]
    for loss in [torch.stack(losses).sum()] if is_one_backward else losses:
        tracker(loss).backward()
    for record, layer in ((opt.records[0], plain[0]), (opt.records[1], plain[2])):
        expected = layer.weight.grad @ opt.bases.held(record) @ opt.bases.held(record).mT
        torch.testing.assert_close(opt.pending.gradients.get(record.index).matrix, expected, rtol=0, atol=1e-12)


def test_a_shared_layer_adds_up_in_step_mode():
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    x = torch.randn(8, 16, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(torch.tanh(layer(x))).square().mean(), layer.weight)
    _, tracker, opt = attached(layer, capture="one_sided", apply="step", **PLAIN)
    tracker(layer(torch.tanh(layer(x))).square().mean()).backward()
    pending = opt.pending.gradients.get(0)
    torch.testing.assert_close(pending.matrix, expected @ pending.right @ pending.right.mT, rtol=0, atol=1e-12)


def test_a_shared_layer_has_one_basis_also_after_a_backward_that_failed():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError

    layer, x = nn.Linear(16, 16, bias=False, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    _, tracker, opt = attached(layer, capture="one_sided", apply="step", **PLAIN)
    loss = tracker(Failing.apply(layer(x)).square().mean())
    with pytest.raises(MemoryError):
        loss.backward()
    failed = opt.bases.held(opt.records[0])  # the graph of `loss` still holds it
    other = layer(torch.tanh(layer(x))).square().mean()
    basis = opt.bases.held(opt.records[0])
    assert basis is not failed
    with pytest.warns(gradlr.GradlrWarning, match="did not come to its end"):
        tracker(other)
    other.backward()
    assert opt.pending.gradients.get(0).right is basis
    plain = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    plain(torch.tanh(plain(x))).square().mean().backward()
    torch.testing.assert_close(opt.pending.gradients.get(0).matrix, plain.weight.grad @ basis @ basis.mT, rtol=0, atol=1e-12)


def test_the_rank_follows_the_loss_one_step_late():
    """The basis is wanted in forward, before its loss is known."""
    layer = nn.Linear(16, 16)
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(layer, tracker, rank=gradlr.ByLoss(8), momentum_rank=2, capture="one_sided")
    x = torch.randn(4, 16)
    ranks = []
    for scale in (1.0, 0.5, 0.25, 0.25):
        loss = layer(x).square().mean()
        ranks.append(opt.bases.held(opt.records[0]).shape[1])
        tracker(loss * (scale / loss.detach())).backward()
        assert opt.records[0].rank == ranks[-1]
    assert ranks == [8, 8, 4, 2]


def test_the_basis_spans_the_inputs():
    """Inputs of rank 3 fit into a basis of rank 4: the projected gradient is the whole one."""
    layer = nn.Linear(12, 9, dtype=torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(x).pow(3).sum(), layer.weight)
    _, tracker, opt = attached(layer, capture="one_sided", apply="step")
    tracker(layer(x).pow(3).sum()).backward()
    torch.testing.assert_close(opt.pending.gradients.get(0).matrix, expected, rtol=0, atol=1e-9)


def test_evaluations_and_loaded_checkpoints_leave_the_run_as_it_is():
    def run(is_disturbed):
        model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), capture="one_sided")
        losses = train(model, opt, tracker, 2)
        if is_disturbed:
            with torch.no_grad():
                model(torch.randn(3, 16, dtype=torch.float64))
            model(torch.randn(3, 16, dtype=torch.float64))  # leaves a basis of other inputs behind, which loading drops
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        return losses + train(model, opt, tracker, 2, start=2)

    assert run(False) == run(True)


def test_a_kept_evaluation_does_not_decide_the_basis():
    x, other = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    found = []
    for is_evaluated in (False, True):
        model, tracker, opt = attached(mlp(16, 2, dtype=torch.float64), capture="one_sided", apply="step")
        kept = model.eval()(other) if is_evaluated else None
        tracker(model.train()(x).square().mean()).backward()
        found.append([opt.pending.gradients.get(record.index).matrix for record in opt.records])
        evaluated = model.eval()(other).grad_fn is not None  # and takes the basis that is there
        assert evaluated and all(
            opt.bases.held(record) is opt.pending.gradients.get(record.index).right
            for record in opt.records
            if record.capture == "one_sided"
        )
        del kept
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_input_is_not_kept():
    """25 Linears in a row: what forward leaves behind is r numbers a token and layer, not n."""
    model, x = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(25))), torch.randn(512, 128)
    _, tracker, opt = attached(model, capture="one_sided", rank=4)
    tracker(model(x).square().mean()).backward()
    peak = peak_bytes(lambda: tracker(model(x).square().mean()).backward())
    kept, activation = 25 * 512 * 4 * 4, 512 * 128 * 4
    assert peak < kept + 6 * activation + 25 * 128 * 4 * 4  # projections, a few activations in flight, the bases
    assert peak < 25 * activation / 2


def test_the_gradient_itself_cannot_be_had():
    layer = nn.Linear(16, 16)
    _, tracker, opt = attached(layer, capture="one_sided")
    x = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(gradlr.BackwardError, match='keeps only the projection.*capture="adaptor"'):
        torch.autograd.grad(layer(x).sum(), layer.weight)
    (slope,) = torch.autograd.grad(layer(x).sum(), x)  # the input's gradient can
    torch.testing.assert_close(slope, layer.weight.sum(0).expand(4, 16))


def test_half_precision_and_autocast_keep_the_projection_wide():
    layer, x = nn.Linear(16, 16), torch.randn(8, 16)
    rule = Recorder()
    _, tracker, opt = attached(layer, rule=rule, capture="one_sided")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).float().square().mean()
    tracker(loss).backward()
    narrow = nn.Linear(16, 16, dtype=torch.bfloat16)
    _, tracker, opt = attached(narrow, rule=rule, capture="one_sided")
    tracker(narrow(x.bfloat16()).float().square().mean()).backward()
    assert [gradient.right_sketch.dtype for gradient in rule.seen] == [torch.float32] * 2


def test_nothing_is_projected_where_nothing_is_trained():
    layer = nn.Linear(16, 16, bias=False)
    _, tracker, opt = attached(layer, capture="one_sided")
    with torch.no_grad():
        layer(torch.randn(4, 16))
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 16, requires_grad=True)).sum().backward()
    assert opt.bases.held(opt.records[0]) is None
    opt.detach()
    assert type(layer) is nn.Linear and not isinstance(layer, SwappedLayer)


@pytest.mark.parametrize("has_backward", [True, False])
def test_one_bad_batch_spoils_no_other(has_backward):
    """Its loss, and so its basis, is still held when the next batch comes."""
    model, tracker, opt = attached(mlp(16, 2), capture="one_sided", apply="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(5):
        x = torch.randn(8, 16)
        if step == 1:
            x[0, 0] = float("nan")
        opt.zero_grad()
        loss = model(x).square().mean()
        if has_backward or loss.isfinite():
            scaler.scale(tracker(loss)).backward()
            scaler.step(opt)
            scaler.update()
    assert opt.skipped == (1 if has_backward else 0)
    assert int(opt.state[model[0].weight]["step"]) == 4


def _save_products(context, operation, *arguments, **options):
    is_product = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def _save_all(context, operation, *arguments, **options):
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("policy", [_save_products, _save_all])
@pytest.mark.parametrize("capture", ["one_sided", "adaptor"])
def test_selective_checkpointing_changes_nothing(capture, policy):
    """It hands out in recomputation what it has stored in forward, by count: making a basis must not be counted."""
    results = []
    for is_checkpointed in (False, True):
        model, tracker, opt = attached(mlp(16, 4, dtype=torch.float64), capture=capture, **PLAIN)
        x, y = regression(16, count=16, dtype=torch.float64)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        for _ in range(4):
            out = checkpoint(model, x, use_reentrant=False, context_fn=contexts) if is_checkpointed else model(x)
            tracker(nn.functional.mse_loss(out, y)).backward()
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
