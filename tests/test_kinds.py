"""Every kind of parameter, trained a few steps and held against a loop without gradlr: autograd and the rules by hand."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from models import Mixed, attached, mlp, regression
from reference.elementwise import AdamReference, RowwiseRMSpropReference
from reference.tracked_momentum import TrackedMomentumReference
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gradlr import ArgumentError, GradlrWarning
from gradlr.gradient import Sketched
from gradlr.params.views import checked_view
from gradlr.rules import TrackedMomentum

QUIET = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
LR, BETA = 1e-2, 0.9

# What a parameter is, written with plain indexing. A matrix is told by how to cut it into views that are m × n.
TABLE, VECTOR = "embedding", "vector"


def whole(weight):
    return [weight]


def turned(weight):
    return [weight.T]


def each(weight):
    return list(weight)


def pieces(count, cut=whole):
    """Equal shares of the first axis, each cut further."""
    return lambda weight: [piece for share in weight.chunk(count) for piece in cut(share)]


def folded(weight):
    return [weight.flatten(1)]


def folded_turned(weight):
    return [weight.flatten(1).T]


@dataclass
class Case:
    """A model, its data, and what each of its parameters is; those with one axis are vectors without being named.

    Attributes:
        make: The model, float32.
        draw: Random inputs from a generator.
        kinds: By parameter name: TABLE, VECTOR, or how a matrix is cut.
        views: As `attach` takes them.
        call: Output of the model.
    """

    make: Callable
    draw: Callable
    kinds: dict
    views: dict = field(default_factory=dict)
    call: Callable = lambda model, x: model(x)


def normal(*shape):
    return lambda generator: torch.randn(shape, dtype=torch.float64, generator=generator)


def tokens(highest, *shape):
    # Every token occurs: rows without a gradient would leave directions of the matrix undetermined.
    def draw(generator):
        return torch.cat(
            [torch.randperm(highest, generator=generator), torch.randint(highest, shape, generator=generator).flatten()]
        )

    return draw


class Fused(nn.Module):
    """Query, key and value in one weight, as most transformers have it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(3 * query, 3 * key, value)


class Experts(nn.Module):
    """(expert, out, in), every expert sees every token."""

    def __init__(self, expression="e o i"):
        super().__init__()
        sizes = {"e": 3, "o": 6, "i": 5}
        self.weight = nn.Parameter(torch.randn([sizes[name] for name in expression.split()]) / 2)
        self.equation = f"ti,{expression.replace(' ', '')}->eto"

    def forward(self, x):
        return torch.einsum(self.equation, x, self.weight)


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embedding(x))))


def first(model, x):
    return model(x)[0]


def attend(model, x):
    return model(x, x, x)[0]


def bag(model, x):
    return model(x.reshape(-1, 3))


def old_weight_norm():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(nn.Conv1d(2, 5, 3))


def recurrent_kinds(cut=whole):
    return {"weight_ih_l0": cut, "weight_hh_l0": cut}


def gpt2():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def lora_gpt2():
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers by an old name
        return peft.get_peft_model(gpt2(), config)


def logits(model, x):
    return model(input_ids=x.reshape(4, -1)).logits


CASES = {
    "linear": Case(lambda: nn.Linear(5, 7), normal(32, 5), {"weight": whole}),
    "conv1d": Case(lambda: nn.Conv1d(2, 5, 3), normal(8, 2, 9), {"weight": folded}),
    "conv2d": Case(lambda: nn.Conv2d(2, 5, 3, stride=2), normal(8, 2, 7, 7), {"weight": folded}),
    "conv3d": Case(lambda: nn.Conv3d(1, 4, 2), normal(6, 1, 4, 4, 4), {"weight": folded}),
    "conv2d, grouped": Case(lambda: nn.Conv2d(4, 6, 2, groups=2), normal(8, 4, 5, 5), {"weight": pieces(2, folded)}),
    "conv1d, depthwise": Case(lambda: nn.Conv1d(4, 4, 3, groups=4), normal(8, 4, 9), {"weight": VECTOR}),
    "conv transposed 1d": Case(lambda: nn.ConvTranspose1d(3, 4, 2), normal(8, 3, 9), {"weight": folded_turned}),
    "conv transposed 2d": Case(lambda: nn.ConvTranspose2d(3, 2, 2, 2), normal(8, 3, 5, 5), {"weight": folded_turned}),
    "conv transposed 3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2), normal(6, 2, 3, 3, 3), {"weight": folded_turned}),
    "conv transposed, grouped": Case(
        lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), normal(8, 6, 4, 4), {"weight": pieces(2, folded_turned)}
    ),
    "embedding": Case(lambda: nn.Embedding(7, 5), tokens(7, 20), {"weight": TABLE}),
    "embedding, sparse": Case(lambda: nn.Embedding(7, 5, sparse=True), tokens(7, 20), {"weight": TABLE}),
    "embedding, sparse, rows unused": Case(
        lambda: nn.Embedding(40, 5, sparse=True), lambda g: torch.randint(40, (9,), generator=g), {"weight": TABLE}
    ),
    "bag": Case(lambda: nn.EmbeddingBag(7, 5), tokens(7, 14), {"weight": TABLE}, call=bag),
    "bag, sparse": Case(lambda: nn.EmbeddingBag(7, 5, sparse=True, mode="sum"), tokens(7, 14), {"weight": TABLE}, call=bag),
    "bilinear": Case(
        lambda: nn.Bilinear(3, 4, 5), normal(40, 7), {"weight": each}, call=lambda model, x: model(x[:, :3], x[:, 3:])
    ),
    "qkv": Case(Fused, normal(4, 16, 8), {"qkv.weight": pieces(3)}, {"qkv.weight": "(three o) i -> three o i"}),
    "qkv per head": Case(
        Fused, normal(4, 16, 8), {"qkv.weight": pieces(6)}, {"*.weight": ("(three h d) i -> three h d i", {"h": 2})}
    ),
    "heads": Case(
        lambda: nn.Linear(5, 12), normal(40, 5), {"weight": pieces(4)}, {"weight": ("(heads d) i -> heads d i", {"heads": 4})}
    ),
    "blocks": Case(
        lambda: nn.Linear(8, 10),
        normal(32, 8),
        {"weight": lambda weight: [block for rows in weight.chunk(2) for block in rows.chunk(2, 1)]},
        {"weight": ("(a m) (two n) -> a two m n", {"a": 2})},
    ),
    "experts": Case(Experts, normal(32, 5), {"weight": each}),
    "experts, (in, out)": Case(
        lambda: Experts("e i o"),
        normal(32, 5),
        {"weight": lambda weight: [part.T for part in weight]},
        {"weight": "e i o -> e o i"},
    ),
    "experts last": Case(
        lambda: Experts("i o e"),
        normal(32, 5),
        {"weight": lambda weight: [part.T for part in weight.unbind(2)]},
        {"weight": "i o e -> e o i"},
    ),
    "transformers' Conv1D": Case(lambda: Conv1D(7, 5), normal(32, 5), {"weight": turned}),
    "attention": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        normal(4, 16, 8),
        {"in_proj_weight": pieces(3), "out_proj.weight": whole},
        call=attend,
    ),
    "attention, other widths": Case(
        lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=5, batch_first=True),
        normal(4, 16, 15),
        dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"), whole),
        call=lambda model, x: model(x[..., :4], x[..., 4:10], x[..., 10:])[0],
    ),
    "rnn": Case(lambda: nn.RNN(5, 4), normal(9, 8, 5), recurrent_kinds(), call=first),
    "lstm": Case(lambda: nn.LSTM(5, 4, proj_size=3), normal(9, 8, 5), recurrent_kinds() | {"weight_hr_l0": whole}, call=first),
    "lstm per gate": Case(
        lambda: nn.LSTM(5, 4), normal(9, 8, 5), recurrent_kinds(pieces(4)), {"weight_?h_l*": "(four o) i -> four o i"}, call=first
    ),
    "gru": Case(lambda: nn.GRU(5, 4), normal(9, 8, 5), recurrent_kinds(), call=first),
    "weight_norm": Case(
        lambda: parametrizations.weight_norm(nn.Linear(5, 7)),
        normal(32, 5),
        {"parametrizations.weight.original0": VECTOR, "parametrizations.weight.original1": whole},
    ),
    "weight_norm of a convolution": Case(
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 5, 3)),
        normal(8, 2, 6, 6),
        {"parametrizations.weight.original0": VECTOR, "parametrizations.weight.original1": folded},
    ),
    "weight_norm along the kernel, grouped": Case(
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2), dim=2),
        normal(8, 4, 9),
        {"parametrizations.weight.original0": VECTOR, "parametrizations.weight.original1": pieces(2, folded)},
    ),
    "weight_norm of old": Case(old_weight_norm, normal(8, 2, 9), {"weight_g": VECTOR, "weight_v": folded}),
    "weight_norm of an embedding": Case(
        lambda: parametrizations.weight_norm(nn.Embedding(7, 5)),
        tokens(7, 20),
        {"parametrizations.weight.original0": VECTOR, "parametrizations.weight.original1": TABLE},
    ),
    "spectral_norm": Case(
        lambda: parametrizations.spectral_norm(nn.Linear(5, 7)), normal(32, 5), {"parametrizations.weight.original": whole}
    ),
    "orthogonal": Case(
        lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"),
        normal(32, 6),
        {"parametrizations.weight.original": whole},
    ),
    "tied": Case(TiedModel, tokens(9, 30), {"embedding.weight": TABLE, "mix.weight": whole}),
    "lora": Case(lora_gpt2, tokens(11, 25), defaultdict(lambda: whole), call=logits),
}


class ByHand:
    """Trains a model by autograd and the naive rules, each matrix by itself, with momentum of full rank.

    Args:
        model: float64.
        kinds: As in `Case`.
    """

    def __init__(self, model, kinds):
        self.names, self.parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
        self.kinds = [kinds[name] if p.ndim > 1 else VECTOR for name, p in zip(self.names, self.parameters, strict=True)]
        self.rules = [self._rules(p, kind) for p, kind in zip(self.parameters, self.kinds, strict=True)]

    def step(self, loss):
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient, kind, rules in zip(self.parameters, gradients, self.kinds, self.rules, strict=True):
            if gradient is None:
                continue
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            for piece, part, rule in zip(self._cut(parameter, kind), self._cut(gradient, kind), rules, strict=True):
                columns = piece.shape[-1:] * 2
                more = () if isinstance(kind, str) else (np.random.default_rng(0).normal(size=columns)[:, : min(piece.shape)],)
                rule.step(part.numpy(), *more)
                piece.copy_(torch.from_numpy(rule.weight))

    def _rules(self, parameter, kind):
        pieces = self._cut(parameter, kind)
        assert all(piece.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr() for piece in pieces)
        if kind == VECTOR:
            return [AdamReference(pieces[0].numpy(), LR, BETA)]
        if kind == TABLE:
            return [RowwiseRMSpropReference(pieces[0].numpy(), LR)]
        ranks = [min(piece.shape) for piece in pieces]
        return [
            TrackedMomentumReference(piece.numpy(), rank=rank, momentum_rank=rank, lr=LR, beta=BETA, residual=0.0)
            for piece, rank in zip(pieces, ranks, strict=True)
        ]

    @staticmethod
    def _cut(tensor, kind):
        return whole(tensor.detach()) if isinstance(kind, str) else kind(tensor.detach())


FULL = {"lr": LR, "kinds": {"vector": {"lr": LR}, "embedding": {"lr": LR}}, "beta": BETA, "rank": 1.0, "momentum_rank": 1.0}


def build(case):
    torch.manual_seed(0)
    return case.make().double()


def loss_of(case, model, step):
    generator = torch.Generator().manual_seed(step)
    output = case.call(model, case.draw(generator))
    return (output - torch.randn(output.shape, dtype=torch.float64, generator=generator)).square().mean()


@QUIET
@pytest.mark.parametrize(("apply", "capture"), [("backward", "hook"), ("step", "hook"), ("backward", "adaptor")])
@pytest.mark.parametrize("name", list(CASES))
def test_training_is_that_of_the_rules_by_hand_on_gradients_of_autograd(name, apply, capture):
    case = CASES[name]
    model, wanted = build(case), build(case)
    by_hand = ByHand(wanted, case.kinds)
    _, tracker, opt = attached(model, apply=apply, capture=capture, views=case.views, **FULL)
    kinds = {record.plan.name: record.plan.kind for record in opt.records}
    assert kinds == {
        name: kind if isinstance(kind, str) else "matrix" for name, kind in zip(by_hand.names, by_hand.kinds, strict=True)
    }
    before = [parameter.detach().clone() for parameter in by_hand.parameters]
    for step in range(4):
        tracker(loss_of(case, model, step)).backward()
        opt.step()
        by_hand.step(loss_of(case, wanted, step))
    for parameter, old in zip(by_hand.parameters, before, strict=True):
        assert (parameter - old).abs().max() > LR / 4  # four steps have not gone in circles
    for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
        # float64; directions a thousandth as strong as the strongest lose three digits, and four steps some more.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# -- sketches of batches, and weights that are narrow ----------------------------------------------------------------------


BATCHED = {
    "qkv": (lambda: nn.Linear(8, 24), normal(32, 8), {"weight": "(three o) i -> three o i"}),
    "blocks": (lambda: nn.Linear(16, 20), normal(32, 16), {"weight": ("(a m) (two n) -> a two m n", {"a": 2})}),
    "grouped": (lambda: nn.Conv2d(16, 16, 2, groups=2), normal(4, 16, 5, 5), {}),
    "transposed": (lambda: nn.ConvTranspose2d(16, 8, 2, groups=2), normal(4, 16, 5, 5), {}),
}


@pytest.mark.parametrize("name", list(BATCHED))
def test_a_sketch_of_a_batch_of_matrices_gives_what_its_gradient_gives(name):
    make, draw, views = BATCHED[name]
    case, results = Case(make, draw, {}), []
    for apply in ("backward", "step"):
        model, tracker, opt = attached(
            build(case), apply=apply, views=views, rank=1, momentum_rank=1, rule=TrackedMomentum(residual=0)
        )
        for step in range(3):
            tracker(loss_of(case, model, step)).backward()
            record = next(record for record in opt.records if record.plan.name == "weight")
            assert isinstance(opt.pending.gradients.get(record.index), Sketched) == (apply == "step")
            opt.step()
        results.append(model.weight.detach())
    # A sketch loses nothing of one gradient; float64 products in another order.
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", list(BATCHED))
def test_a_bfloat16_weight_is_written_through_its_view(name):
    make, draw, views = BATCHED[name]
    case, results = Case(make, draw, {}), []
    for dtype in (torch.bfloat16, torch.float64):
        model = build(case).to(torch.bfloat16).to(dtype)
        before = model.weight.detach().double().clone()
        model, tracker, opt = attached(model, views=views, lr=0.1, rank=1.0, momentum_rank=1.0)
        output = model(draw(torch.Generator().manual_seed(0)).to(torch.bfloat16).to(dtype))
        tracker(output.double().square().mean()).backward()
        results.append(model.weight.detach().double() - before)
    # Weights below 0.3 are rounded to 2^-10 (stochastically), a fiftieth of the change; gradients are rounded as well.
    assert results[1].abs().amax() > 0.02
    assert (results[0] - results[1]).norm() < 0.05 * results[1].norm()


# -- views: what they match, what they must be -------------------------------------------------------------------------------


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


def test_a_vector_of_many_axes_becomes_one_batch_of_matrices_where_a_group_says_so():
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    assert plans(depthwise)["weight"].kind == "vector"
    found = plans(depthwise, groups=[{"match": "weight", "kind": "matrix"}])["weight"]
    assert tuple(found.shape) == (6, 1, 9)  # its layer's own view: a filter per group


# -- parameters that could be anything ---------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, *shape, name="weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class RotaryEmbedding(Odd):
    """Not torch's, and maybe a table."""


GUESSES = {
    "four axes": (
        lambda: Odd(2, 3, 4, 5),
        r"'weight' \(2, 3, 4, 5\).*taken as 6 matrices of 4 x 5.*\"kind\": \"embedding\".*views=",
    ),
    "one in front": (lambda: Odd(1, 6, 8, name="extra"), r"'extra' \(1, 6, 8\).*taken as a 6 x 8 matrix"),
    "name": (lambda: Odd(6, 8, name="position_weight"), "taken as a 6 x 8 matrix"),
    "class": (lambda: RotaryEmbedding(6, 8), "'weight'"),
    "several": (lambda: nn.Sequential(Odd(2, 3, 4, 5), Odd(1, 3, 4)), r"'0.weight' \(2, 3, 4, 5\) \(and 1 more\)"),
    "list": (lambda: nn.ParameterList([torch.randn(2, 2, 3, 3)]), "'0'"),
}


@pytest.mark.parametrize("name", list(GUESSES))
def test_what_could_be_anything_is_told_once_with_the_way_to_overrule_it(name):
    make, message = GUESSES[name]
    model = make()
    with pytest.warns(GradlrWarning, match=message) as told:
        attached(model)[2].detach()
    assert len(told) == 1 and told[0].filename.endswith("models.py")  # where attach is called
    for kind in ("matrix", "embedding", "vector"):
        attached(model, groups=[{"match": "*", "kind": kind}])[2].detach()


def test_a_view_is_no_guess_and_the_advice_holds():
    with pytest.warns(GradlrWarning) as told:
        attached(Odd(2, 3, 4, 5))[2].detach()
    view = str(told[0].message).split("views={'weight': '")[1].split("'")[0]
    assert tuple(plans(Odd(2, 3, 4, 5), views={"weight": view})["weight"].shape) == (2, 60)


def vision_transformer():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


def test_the_positions_of_a_vision_transformer_are_a_guess():
    with pytest.warns(GradlrWarning, match=r"'embeddings.position_embeddings' \(1, 5, 16\) belongs"):
        attached(vision_transformer())


def mixture(name):
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    extra = {
        "Mixtral": {"num_local_experts": 2},
        "Qwen2Moe": {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        "GptOss": {"num_local_experts": 2, "head_dim": 8, "layer_types": ["full_attention"]},
    }[name]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **extra, vocab_size=20))


KNOWN = {
    "transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "recurrent": lambda: nn.ModuleList([nn.RNNCell(3, 4), nn.LSTMCell(3, 4), nn.GRU(3, 4, 2, bidirectional=True)]),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "experts": lambda: Odd(3, 4, 5),
    "plain": lambda: Odd(4, 5),
    "norm of one's own": lambda: Odd(4),
    "gpt2": gpt2,
    "lora": lora_gpt2,
    "Mixtral": lambda: mixture("Mixtral"),
    "Qwen2Moe": lambda: mixture("Qwen2Moe"),
    "GptOss": lambda: mixture("GptOss"),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_layers_and_shapes_tell_is_no_guess(name):
    model = KNOWN[name]()
    found = plans(model)  # warnings are errors
    assert all(plan.kind == "vector" for name, plan in found.items() if name.endswith("bias"))
    assert all(plan.kind == "matrix" for plan in found.values() if "experts" in plan.name and not plan.name.endswith("bias"))


def test_attaching_does_not_run_a_parametrization():
    model = nn.Sequential(nn.Embedding(9, 6), parametrizations.spectral_norm(nn.Linear(6, 6)))
    before = model[1].parametrizations.weight[0]._u.clone()
    found = plans(model, capture="auto")
    assert torch.equal(before, model[1].parametrizations.weight[0]._u)
    assert found["1.parametrizations.weight.original"].kind == "matrix"


# -- frozen, unfrozen, unused ------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_unfrozen_ones_are_told():
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    _, tracker, opt = attached(model)
    x, y = regression()
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    with pytest.warns(GradlrWarning, match="not attached.*0.weight"):
        loss = tracker(nn.functional.mse_loss(model(x), y))
    loss.backward()
    assert torch.equal(model[0].weight, frozen)
    assert "0.weight" not in {record.plan.name for record in opt.records}


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_parameters_unused_in_a_step_stand_still(apply):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]).double()
    _, tracker, opt = attached(model, apply=apply)
    x = torch.randn(8, 5, dtype=torch.float64)

    def snapshot(layer):
        states = [{**opt.state[parameter], "parameter": parameter.detach()} for parameter in layer.parameters()]
        return [{key: value.clone() for key, value in state.items()} for state in states]

    for used in (0, 1, 0, 0):
        moving, still = snapshot(model[used]), snapshot(model[1 - used])
        tracker((model[used](x) - 1).square().mean()).backward()
        opt.step()
        for old, new in zip(still, snapshot(model[1 - used]), strict=True):
            assert all(torch.equal(old[key], new[key]) for key in old)
        for old, new in zip(moving, snapshot(model[used]), strict=True):
            assert not any(torch.equal(old[key], new[key]) for key in old)
    assert [int(opt.state[layer.weight]["step"]) for layer in model] == [3, 1]
