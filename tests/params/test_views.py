"""Views: what they match, what they must be, and that weights are written through them."""

import math

import pytest
import torch
from models import Mixed, attached
from torch import nn

from gradlr import ArgumentError
from gradlr.gradient import Sketched
from gradlr.params.views import checked_view
from gradlr.rules import LowRankPolar

QUIET = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


BATCHED = {
    "qkv": (lambda: nn.Linear(8, 24), (32, 8), {"weight": "(three o) i -> three o i"}),
    "blocks": (lambda: nn.Linear(16, 20), (32, 16), {"weight": ("(a m) (two n) -> a two m n", {"a": 2})}),
    "grouped": (lambda: nn.Conv2d(16, 16, 2, groups=2), (4, 16, 5, 5), {}),
    "transposed": (lambda: nn.ConvTranspose2d(16, 8, 2, groups=2), (4, 16, 5, 5), {}),
}


def build(make):
    torch.manual_seed(0)
    return make().double()


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(BATCHED))
def test_a_sketch_of_a_batch_of_matrices_gives_what_its_gradient_gives(name):
    make, shape, views = BATCHED[name]
    results = []
    for apply in ("backward", "step"):
        options = {"views": views, "rank": 1, "momentum_rank": 1, "rule": LowRankPolar(residual=0)}
        model, tracker, opt = attached(build(make), apply=apply, **options)
        for step in range(3):
            output = model(normal(shape, seed=2 * step))
            tracker((output - normal(output.shape, seed=2 * step + 1)).square().mean()).backward()
            record = next(record for record in opt.records if record.plan.name == "weight")
            assert isinstance(opt.pending.gradients.get(record.index), Sketched) == (apply == "step")
            opt.step()
        results.append(model.weight.detach())
    # A sketch loses nothing of one gradient; float64 products in another order.
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", list(BATCHED))
def test_a_bfloat16_weight_is_written_through_its_view(name):
    make, shape, views = BATCHED[name]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        model = build(make).to(torch.bfloat16).to(dtype)
        before = model.weight.detach().double().clone()
        model, tracker, opt = attached(model, views=views, lr=0.1, rank=1.0, momentum_rank=1.0)
        output = model(normal(shape, seed=0).to(torch.bfloat16).to(dtype))
        tracker(output.double().square().mean()).backward()
        results.append(model.weight.detach().double() - before)
    # Weights below 0.3 are rounded to 2^-10 (stochastically), a fiftieth of the change; gradients are rounded as well.
    assert results[1].abs().amax() > 0.02
    assert (results[0] - results[1]).norm() < 0.05 * results[1].norm()


def plans(model, **options):
    return {record.plan.name: record.plan for record in attached(model, **options)[2].records}


def test_the_first_matching_view_wins_and_makes_a_matrix_unless_a_group_says_otherwise():
    found = plans(
        Mixed(),
        views={"mix.weight": "(two m) n -> two m n", "[emh]*.weight": "v d -> d v"},
        groups=[{"match": "head.weight", "kind": "table"}],
    )
    shapes = {name: (plan.kind, tuple(plan.shape)) for name, plan in found.items() if plan.view.pattern}
    assert shapes == {
        "embedding.weight": ("matrix", (8, 11)),
        "conv.weight": ("matrix", (12, 24)),  # its own
        "mix.weight": ("matrix", (2, 4, 12)),
        "head.weight": ("embedding", (8, 11)),
    }


def test_a_flat_parameter_may_be_a_matrix():
    model = nn.Module()
    model.flat = nn.Parameter(torch.randn(24))
    assert tuple(plans(model, views={"flat": ("(m n) -> m n", {"m": 4})})["flat"].shape) == (4, 6)
    assert (
        plans(model, views={"flat": ["(m n) -> m n", {"n": 4}]}, groups=[{"match": "*", "kind": "matrix"}])["flat"].kind
        == "matrix"
    )


@pytest.mark.parametrize(
    ("expression", "sizes", "shape", "seen"),
    [
        ("(three o) i -> three o i", {}, (6, 5), (3, 2, 5)),
        ("(two four o) i -> (two four) o i", {}, (16, 5), (8, 2, 5)),
        ("(a b) (c d) -> (a c) (b d)", {"a": 2, "d": 3}, (6, 12), (8, 9)),  # b and c stand in composed axes on both sides
        ("1 (h d) i -> h d i", {"h": 2}, (1, 6, 5), (2, 3, 5)),
        ("a b m n -> a b m n", {}, (2, 3, 4, 5), (6, 4, 5)),  # one batch axis always
        ("(three o) i->three o i", {"three": 2}, (6, 5), (2, 3, 5)),  # sizes that are given come first
        ("m -> m 1", {}, (4,), (4, 1)),
    ],
)
def test_back_undoes_a_view(expression, sizes, shape, seen):
    view = checked_view(expression, sizes, "w", shape)
    weight = torch.arange(math.prod(shape)).reshape(shape)
    assert tuple(view.of(weight).shape) == seen
    assert torch.equal(view.back(view.of(weight), weight.shape), weight)


QKV = r"weight '0.weight' \(16, 8\): view "


BAD_VIEWS = [
    (
        "(three o) i -> three o i",
        QKV + r"'\(three o\) i -> three o i' does not fit. .*can't divide axis of length 16 in chunks of 3.*narrow the glob",
    ),
    (("(h d) i -> h d i", {"h": 5}), QKV + r".* with {'h': 5} .*length 16 in chunks of 5.*give sizes"),
    (("(h d) i -> h d i", {"h": 2, "d": 4}), r"16 != 8"),
    ("(h d) i -> h d i", r"Could not infer sizes for .*give sizes that are open"),
    ("1 i -> 1 i", "16 != 1"),
    ("o i k -> o (i k)", "expected 3 dims. Received 2-dim"),
    ("o -> o 1", "expected 1 dims. Received 2-dim"),
    ("o i -> (o i)", "right side has 1 axis: it must end in two"),
    ("o i -> o", "only on one side .*'i'"),
    ("o i -> o i j", "only on one side .*'j'"),
    ("o o -> o o", 'duplicate dimension "o"'),
    ("o i -> o i i", 'duplicate dimension "i"'),
    (("o i -> o i", {"heads": 2}), "Axis heads is not used"),
    ("o i", "has 0 arrows"),
    ("o -> i -> o", "has 2 arrows"),
    ("((a b) c) i -> a b c i", "brackets inside brackets"),
    ("o i) -> o i", "not balanced"),
    ("(o i -> o i", "Imbalanced parentheses"),
    ("o ... -> o ...", "ellipsis: name each one"),
    ("out in -> out in", "keywords: in"),
    ("o 3 -> o 3", "anonymous axes"),
    ("o_ i -> o_ i", "Invalid axis identifier: o_"),
    ("o, i -> o i", "Unknown character ','"),
    (3, r"views\['0.weight'\] is 3; give an expression"),
    (("o i -> o i",), "give an expression"),
    (("o i -> o i", {"o": 0}), "positive ints"),
    (("o i -> o i", {"o": 2.0}), "positive ints"),
    (("o i -> o i", ["o"]), "pair with sizes"),
]


@pytest.mark.parametrize(("view", "message"), BAD_VIEWS, ids=[str(view) for view, _ in BAD_VIEWS])
def test_views_that_do_not_fit_leave_the_model_unattached(view, message):
    model = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(ArgumentError, match=message):
        attached(model, views={"0.weight": view})
    attached(model)[2].detach()  # a left-over hook would make this fail


def test_views_that_match_nothing_are_refused():
    for views in ({"encoder.*": "o i -> o i"}, {"*.weight": "o i -> i o", "0.weight": "o i -> o i"}):
        with pytest.raises(ArgumentError, match=r"matches no trainable parameter that an earlier view left; .*'0.weight'"):
            attached(views=views)
    with pytest.raises(ArgumentError, match="expected 2 dims. Received 1-dim"):
        attached(views={"*": "o i -> i o"})
    with pytest.raises(ArgumentError, match="give a dict"):
        attached(views=["o i -> i o"])
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(ArgumentError, match="is empty"):
        attached(model, views={"empty": "m n -> n m"})


@QUIET
def test_a_view_of_the_users_own_is_captured_by_hooks():
    model = nn.ModuleDict(
        {"mix": nn.Linear(8, 12), "conv": nn.Conv1d(4, 6, 3), "other": nn.Linear(8, 8), "words": nn.Embedding(9, 6)}
    )
    views = {
        "mix.weight": "(three o) i -> three o i",
        "conv.weight": "o i  h -> o (i h)",  # the layer's own
        "words.weight": "v d -> d v",
    }
    for table in ([], [{"match": "words.*", "kind": "table"}]):
        _, _, opt = attached(model, capture="adaptor", views=views, groups=table)
        captures = {record.plan.name: record.capture for record in opt.records}
        opt.detach()
        assert (captures["mix.weight"], captures["conv.weight"], captures["other.weight"]) == ("hook", "adaptor", "adaptor")
        assert captures["words.weight"] == "hook"
