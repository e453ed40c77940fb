"""Every kind of parameter, trained a few steps and held against a loop without gradlr: autograd and the rules by hand."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from models import attached, lora_gpt2
from reference.elementwise import AdamReference, RowwiseRMSpropReference
from reference.low_rank_polar import LowRankPolarReference
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.also_asynchronous

QUIET = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


LR, BETA = 1e-3, 0.9


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv1d(2, 5, 3))


def recurrent_kinds(cut=whole):
    return {"weight_ih_l0": cut, "weight_hh_l0": cut}


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
            LowRankPolarReference(piece.numpy(), rank=rank, momentum_rank=rank, lr=LR, beta=BETA, residual=0.0)
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
