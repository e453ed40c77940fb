"""`attach(..., compile=True)`: every rule in one graph, the same numbers, and no other graph when rank, rate or step move."""

import pytest
import torch
from torch import nn

import gradlr
from gradlr import rules
from gradlr.engine.compiled_updates import CompiledUpdates

# Each is about one update of float64 numbers, whose order of summing may differ.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

RULES = {
    "low_rank_polar": {},
    "momentum": {"momentum_rank": 3},
    "no_residual": {"rule": rules.LowRankPolar(residual=0)},
    "multi_normalized": {"rule": "multi_normalized"},
    "polar": {"rule": "polar"},
    "adam": {"rule": "adam"},
    "rowwise_rmsprop": {"rule": "rowwise_rmsprop"},
    "factor_moments": {"rule": rules.FactorMoments(newton_schulz_dtype=torch.float64), "rank": 4},
    "adjusted": {"rule": rules.FactorMoments(newton_schulz_dtype=torch.float64, is_adjusted=True), "rank": 4},
}
WAYS = {"hook": {}, "adaptor": {"capture": "adaptor"}, "step": {"apply": "step"}}


class Backend:
    """Runs graphs as they are, counts them, and keeps them."""

    def __init__(self):
        self.graphs = []

    @property
    def count(self):
        return len(self.graphs)

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def trained(updates, steps=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 28), nn.Tanh(), nn.Linear(28, 16, bias=False)).double()
    tracker = gradlr.LossTracker()
    options = {"lr": 2e-2, "rank": gradlr.ByLoss(12), "weight_decay": 0.1, **options}
    opt = gradlr.attach(model, tracker, **options)
    opt.committer.compiled = updates
    x = torch.randn(32, 20, dtype=torch.float64)
    ranks = set()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-2 / (step + 1)
        tracker((model(x) - 1).square().mean()).backward()
        opt.step()
        ranks.add(opt.records[0].rank)
    opt.detach()
    return [parameter.detach() for parameter in model.parameters()], ranks


# What a CUDA graph cannot hold: random numbers of a generator that the host seeds, and numbers that the host reads.
NOT_CAPTURED = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "normal", "normal_", "uniform_", "bernoulli", "manual_seed"),
    *("item", "tolist", "cpu", "numpy", "bool", "nonzero", "masked_select"),
}


def require_capturable(graph):
    """It draws nothing, asks the device for nothing, and gets rank, step and random columns as tensors."""
    inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(one, torch.Tensor) for one in inputs)
    called = [node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    names = {getattr(target, "__name__", target) for target in called}
    assert len(names) > 3 and not names & NOT_CAPTURED


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_every_rule_is_one_graph_and_gives_what_it_gives_eagerly(options):
    backend = Backend()
    found, _ = trained(CompiledUpdates(backend), **options)
    expected, _ = trained(None, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert backend.count == 3  # two matrices and a vector
    for graph in backend.graphs:
        require_capturable(graph)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_no_graph_is_made_when_the_rank_the_rate_and_the_step_move(way):
    backend = Backend()
    found, ranks = trained(CompiledUpdates(backend), steps=8, **way)
    expected, _ = trained(None, steps=8, **way)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(ranks) > 1 and backend.count == 3


@pytest.mark.parametrize("form", [float, torch.tensor], ids=["float", "tensor"])
def test_a_rate_that_a_scheduler_changes_is_the_next_steps_and_makes_no_other_graph(form):
    def moved(updates, rates):
        torch.manual_seed(0)
        model, tracker, x, found = nn.Linear(12, 10, bias=False), gradlr.LossTracker(), torch.randn(16, 12), []
        opt = gradlr.attach(model, tracker, lr=form(rates[0]), rank=4)
        opt.committer.compiled = updates
        for rate in rates:
            opt.param_groups[0]["lr"] = form(rate)
            before = model.weight.detach().clone()
            tracker(model(x).square().mean()).backward()
            found.append(float((model.weight.detach() - before).norm()))
        return found

    backend, rates = Backend(), (1e-2, 1e-3, 4e-2, 0.0)
    found = moved(CompiledUpdates(backend), rates)
    assert backend.count == 1 and found[-1] == 0
    # Updates of float32 numbers that are added to weights about a hundred times as large.
    assert found == pytest.approx(moved(None, rates), rel=1e-3)
    assert found[1] < found[0] / 5 and found[2] > 20 * found[1]


@pytest.mark.slow
def test_more_shapes_than_the_compiler_recompiles_of_one_function():
    backend, updates = Backend(), None
    updates = CompiledUpdates(backend)
    model, tracker = nn.ModuleList(nn.Linear(4, 3 + size, bias=False) for size in range(12)), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, rank=2)
    opt.committer.compiled = updates
    for _ in range(2):
        x = torch.randn(8, 4)
        tracker(torch.stack([layer(x).square().mean() for layer in model]).sum()).backward()
    assert backend.count == updates.count == 12


def test_it_survives_a_compiler_that_functionalizes():
    found, _ = trained(CompiledUpdates("aot_eager"))
    expected, _ = trained(None)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_convolutions_without_gradient_stay_eager():
    backend, tracker = Backend(), gradlr.LossTracker()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 4, bias=False))
    opt = gradlr.attach(model, tracker, rank=2, capture="adaptor")
    opt.committer.compiled = CompiledUpdates(backend)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tracker(model(torch.randn(4, 3, 8, 8)).square().mean()).backward()
    assert backend.count == 1
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_attach_takes_the_argument():
    model, tracker = nn.Linear(4, 3), gradlr.LossTracker()
    assert isinstance(gradlr.attach(model, tracker, compile=True).committer.compiled, CompiledUpdates)
    with pytest.raises(gradlr.ArgumentError, match="compile='yes': use True or False"):
        gradlr.attach(nn.Linear(4, 3), tracker, compile="yes")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_machine_code_gives_the_same():
    """The whole way, through C++: a minute."""
    found, _ = trained(CompiledUpdates())
    expected, _ = trained(None)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
