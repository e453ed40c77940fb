"""`apply="step"`: whatever adds up in torch adds up here, compared with the explicit gradients of a copy."""

import copy

import pytest
import torch
from models import attached, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradlr.apps.bench.memory import peak_bytes
from gradlr.rules import LowRankPolar
from gradlr.tensors import is_async

pytestmark = [pytest.mark.also_asynchronous, pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")]
CAPTURES = pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
WIDTH = 64  # wide enough for sketches of rank 4 to wait instead of gradients


class Shared(nn.Module):
    """One layer used twice, one once, and a weight that is also read without its layer: everything a loop may do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.once = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.double()

    def forward(self, x):
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def batch(seed=0):
    return torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    return model(batch(seed)).square().mean()


def several_backwards(model, show):
    for seed in range(3):
        show(loss_of(model, seed)).backward()


def forwards_then_backwards(model, show):
    for loss in [loss_of(model, seed) for seed in range(3)]:
        show(loss).backward()


def retained_graph(model, show):
    loss = show(loss_of(model))
    loss.backward(retain_graph=True)
    loss.backward()


def scaled_and_summed(model, show):
    show(sum(loss_of(model, seed) / 4 for seed in range(2))).backward()
    (show(loss_of(model, 2)) / 4).backward()


def with_a_penalty(model, show):
    """The weights themselves are in the loss: their hooks bring a second gradient beside the layer's own."""
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    show(loss_of(model) + 1e-3 * penalty).backward()


def checkpointed(use_reentrant):
    def run(model, show):
        x = batch().requires_grad_(True)
        hidden = checkpoint(lambda x: torch.tanh(model.twice(x)), x, use_reentrant=use_reentrant)
        hidden = checkpoint(lambda x: torch.tanh(model.twice(x)), hidden, use_reentrant=use_reentrant)  # shared by both
        show(checkpoint(model.once, hidden, use_reentrant=use_reentrant).square().mean()).backward()
        show(loss_of(model, 1)).backward()

    return run


LOOPS = {
    "several_backwards": several_backwards,
    "forwards_then_backwards": forwards_then_backwards,
    "retained_graph": retained_graph,
    "scaled_and_summed": scaled_and_summed,
    "with_a_penalty": with_a_penalty,
    "checkpointed": checkpointed(False),
    "checkpointed_reentrant": checkpointed(True),
}


@CAPTURES
@pytest.mark.parametrize("name", list(LOOPS))
def test_what_waits_is_the_sketch_of_the_summed_gradient(name, capture):
    model = Shared()
    plain = copy.deepcopy(model)
    LOOPS[name](plain, lambda loss: loss)
    _, tracker, opt = attached(model, capture=capture, apply="step", rule=LowRankPolar(residual=0))
    LOOPS[name](model, tracker)
    for record in opt.records:
        expected = dict(plain.named_parameters())[record.plan.name].grad
        pending = opt.pending.gradients.get(record.index)
        if record.plan.kind == "matrix":
            left, right = getattr(pending, "left", None), pending.right
            outside = torch.zeros_like(expected) if left is None else left @ left.mT @ (expected - expected @ right @ right.mT)
            expected = expected @ right @ right.mT + outside
        # float64 sums in another order.
        torch.testing.assert_close(pending.matrix, expected, rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


@CAPTURES
@pytest.mark.parametrize("name", list(LOOPS))
def test_at_full_rank_the_step_is_that_of_the_summed_gradient(name, capture):
    """One sketch of full rank loses nothing, so the step equals the one that a single gradient makes."""
    full = {"rank": WIDTH, "momentum_rank": WIDTH, "apply": "step", "rule": LowRankPolar(residual=0)}
    model, other = Shared(), Shared()
    plain = copy.deepcopy(model)
    LOOPS[name](plain, lambda loss: loss)
    _, tracker, opt = attached(model, capture=capture, **full)
    LOOPS[name](model, tracker)
    opt.step()
    _, tracker, other_opt = attached(other, **full)
    # A loss whose gradient is known: the inner product of the weights with it.
    pairs = zip(other.parameters(), plain.parameters(), strict=True)
    tracker(sum((mine * theirs.grad).sum() for mine, theirs in pairs)).backward()
    other_opt.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        # Directions of nearly no gradient decide over the polar factor of a full-rank matrix: 1e-12 grows by their condition.
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    _, tracker, opt = attached(model, apply="step", capture="adaptor")
    x = torch.randn(4, 256)

    def accumulate(count):
        for _ in range(count):
            tracker(model(x).square().mean()).backward()
        opt.step()

    accumulate(1)
    few, many = (peak_bytes(lambda count=count: accumulate(count)) for count in (2, 12))
    # Two bases and two products of rank 4 (+ k = 2) for each matrix, two activations' worth of work; never a gradient.
    assert many <= few + 1024  # a few numbers of statistics
    assert many < 4 * 256 * 256 * 4 / 4


def test_tied_weights_add_in_both_modes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.embedding.weight
            self.double()

        def forward(self, tokens):
            return self.head(torch.tanh(self.embedding(tokens)))

    tokens = torch.arange(12).view(3, 4)
    results = []
    for apply in ("backward", "step"):
        for capture in ("hook", "adaptor"):
            model = Tied()
            _, tracker, opt = attached(model, apply=apply, capture=capture)
            for _ in range(3):
                tracker(model(tokens).square().mean()).backward()
                opt.step()
            results.append(model.embedding.weight.detach().clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)


def test_tables_wait_by_the_rows_that_were_touched():
    model = nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 8))
    _, tracker, opt = attached(model, apply="step", capture="adaptor")
    for step in range(3):
        tracker(model(torch.tensor([step, 7, 4000])).square().mean()).backward()
    pending = opt.pending.gradients[[record.plan.name for record in opt.records].index("0.weight")]
    assert sorted(set(pending.rows.tolist())) == [0, 1, 2, 7, 4000]
    # How many of the nine differ, an asynchronous device is not asked.
    assert len(pending.rows) == (9 if is_async(pending.rows) else 5)
    before = model[0].weight.detach().clone()
    opt.step()
    is_changed = (model[0].weight != before).any(dim=1)
    assert is_changed.nonzero().flatten().tolist() == [0, 1, 2, 7, 4000]


@pytest.mark.parametrize(("blank", "capture"), [(blank, capture) for blank in ("no rows", "zero inputs", "zero loss")
                                                for capture in ("hook", "adaptor", "one_sided")][:-1])  # fmt: skip
def test_a_micro_batch_without_any_gradient_makes_no_bases(blank, capture):
    """What comes after it is sketched as if it had come first; but inputs are inputs, also where their loss is zero."""
    found = []
    for is_preceded in (False, True):
        model, tracker, opt = attached(mlp(WIDTH, 2, dtype=torch.float64), capture=capture, apply="step")
        nn.init.zeros_(model[0].bias)  # zeros stay zeros
        if is_preceded:
            x = batch()[:0] if blank == "no rows" else batch() * (blank != "zero inputs")
            loss = model(x).square().sum() * (blank == "no rows")
            for _ in range(2):
                tracker(1.0)  # a loss of 0 would set the rank
                loss.backward(retain_graph=True)
            assert all(record.index in opt.pending.gradients for record in opt.records)
            del loss
        tracker(loss_of(model, 1)).backward()
        found.append([opt.pending.gradients.get(record.index).matrix for record in opt.records])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
