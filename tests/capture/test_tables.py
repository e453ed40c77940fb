"""Embeddings and heads: no gradient of the vocabulary's size, and the very training that hooks give."""

import copy
import pickle
from functools import partial

import pytest
import torch
from models import attached
from torch import nn

import gradlr
from gradlr.apps.bench.memory import peak_bytes
from gradlr.capture.layer_swap import SwappedLayer
from gradlr.gradient import RowSparse

pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


class Language(nn.Module):
    """Embedding, a matrix, and a head of the embedding's shape; tied by functional use where asked for."""

    def __init__(self, count=40, width=16, *, is_tied=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(count, width, **options)
        self.mix = nn.Linear(width, width)
        self.head = None if is_tied else nn.Linear(width, count, bias=False)
        self.double()

    def forward(self, tokens):
        x = torch.tanh(self.mix(self.embedding(tokens)))
        return nn.functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def tokens_of(step, count=40):
    return torch.randint(count, (3, 6), generator=torch.Generator().manual_seed(step))


def fine_tune(model, steps=4, *, parts=1, **options):
    # At full rank a sketch of several gradients loses nothing.
    full = {"rank": 16, "momentum_rank": 16, "rule": gradlr.rules.LowRankPolar(residual=0)}
    _, tracker, opt = attached(model, **full, **options)
    for step in range(steps):
        for part in tokens_of(step).chunk(parts):
            logits = model(part[:, :-1]).flatten(0, 1)
            tracker(nn.functional.cross_entropy(logits, part[:, 1:].flatten()) / parts).backward()
        opt.step()
    return [parameter.detach().clone() for parameter in model.parameters()], opt


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"kinds": {"embedding": {"rule": "adam"}}}], ids=str)
@pytest.mark.parametrize("model", [{}, {"is_tied": True}, {"padding_idx": 3}], ids=str)
@pytest.mark.parametrize(("apply", "parts"), [("backward", 1), ("step", 1), ("step", 3)])
def test_training_is_that_of_hook_capture(options, model, apply, parts):
    wanted, _ = fine_tune(Language(**model), apply=apply, parts=parts, **options)
    found, opt = fine_tune(Language(**model), apply=apply, parts=parts, capture="adaptor", **options)
    # float64; products in another order, then eigenvectors of 4 x 4 matrices in the layer between.
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    captures = {record.plan.name: record.capture for record in opt.records}
    is_by_row = "kinds" not in options
    assert captures["embedding.weight"] == ("rows" if is_by_row else "hook")
    assert "head.weight" not in captures or captures["head.weight"] == ("adaptor" if is_by_row else "hook")
    assert captures["mix.weight"] == "adaptor"


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_sparse_gradients_train_as_dense_ones(make):
    results = []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        options = {"mode": "sum"} if make is nn.EmbeddingBag else {}
        model = make(9, 4, sparse=is_sparse, **options).double()
        _, tracker, opt = attached(model, weight_decay=0.1)
        for step in range(3):
            tracker(model(torch.tensor([[1, 4, 1], [step, 1, 8]])).pow(2).sum()).backward()
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_do_more_than_look_up_keep_their_hooks(options):
    model = nn.Embedding(9, 4, **options)
    _, tracker, opt = attached(model, capture="adaptor")
    assert opt.records[0].capture == "hook" and type(model) is nn.Embedding


def test_a_head_tied_to_its_embedding_by_modules_gets_the_sum():
    results = []
    for capture in ("hook", "adaptor"):
        model = Language()
        model.head.weight = model.embedding.weight
        weights, opt = fine_tune(model, capture=capture)
        results.append(weights)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert {record.plan.name: record.capture for record in opt.records}["embedding.weight"] == "rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_narrow_table_are_rounded_without_bias(dtype):
    """Steps of a hundredth of a unit in the last place: only stochastic rounding keeps them. Padded as on CUDA, too."""
    lr, count = 1e-5, 4000
    model = nn.Embedding(3, count).to(dtype)
    nn.init.ones_(model.weight)
    _, tracker, opt = attached(model, kinds={"embedding": {"rule": "rowwise_rmsprop", "lr": lr}})
    for _ in range(100):
        tracker(1.0)
        opt.receive(model.weight, padded())
    moved = 1 - model.weight.detach().double().mean(1)
    # 100 steps of lr x 1 (a row of equal entries has root mean square 1); noise of the mean over 4,000 entries below a tenth.
    torch.testing.assert_close(moved[[0, 2]], torch.full((2,), 1e-3).double(), rtol=0.1, atol=0)
    assert moved[1] == 0


def padded(count=4000):
    values = torch.ones(3, count)
    values[2] = 0
    return RowSparse(torch.tensor([0, 2, 0]), values, 3)


def test_no_gradient_of_the_vocabularys_size_exists(monkeypatch):
    monkeypatch.setattr("gradlr.gradient.factors._BLOCK_NUMBERS", 2**14)  # a sixteenth of the table
    monkeypatch.setattr("gradlr.engine.apply_update._BLOCK_NUMBERS", 2**14)
    count, width = 4096, 64
    model = nn.ModuleDict({"embedding": nn.Embedding(count, width), "head": nn.Linear(width, count, bias=False)})
    x = torch.randint(count, (4,))

    def step(tracker):
        tracker(model["head"](model["embedding"](x)).square().mean()).backward()

    peaks = {}
    for capture in ("hook", "adaptor"):
        _, tracker, opt = attached(model, capture=capture)
        step(tracker)
        peaks[capture] = peak_bytes(partial(step, tracker))
        opt.detach()
    table = 4 * count * width
    assert peaks["hook"] > table
    # Logits and their gradients (4 tokens x vocabulary), row statistics of two tables: about a fifth of the table.
    assert peaks["adaptor"] < table / 2


def test_a_heads_rows_are_made_in_blocks(monkeypatch):
    wanted, _ = fine_tune(Language(), capture="adaptor")
    monkeypatch.setattr("gradlr.gradient.factors._BLOCK_NUMBERS", 100)
    monkeypatch.setattr("gradlr.engine.apply_update._BLOCK_NUMBERS", 100)
    found, _ = fine_tune(Language(), capture="adaptor")
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_detached_embeddings_are_ordinary_ones(copy_of):
    model = nn.Embedding(9, 4)
    _, tracker, opt = attached(model, capture="adaptor")
    assert isinstance(model, SwappedLayer) and isinstance(model, nn.Embedding)
    copied = copy_of(model)
    opt.detach()
    for plain in (copied, model):
        assert type(plain) is nn.Embedding
        plain(torch.tensor([1, 2, 1])).sum().backward()
        assert plain.weight.grad.layout == torch.strided


def test_gradients_that_are_asked_for_are_dense_and_differentiable():
    model = nn.Embedding(9, 4, padding_idx=2).double()
    ids = torch.tensor([1, 2, 1, 5])
    expected = torch.autograd.grad(model(ids).pow(3).sum(), model.weight)[0]
    _, tracker, opt = attached(model, capture="adaptor")
    (found,) = torch.autograd.grad(model(ids).pow(3).sum(), model.weight, create_graph=True)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([], dtype=torch.int64), torch.tensor([[2, 2], [8, 2]])], ids=str)
def test_any_number_of_ids_will_do(dtype, ids):
    results = []
    for capture in ("hook", "adaptor"):
        torch.manual_seed(0)
        model = nn.Embedding(9, 4, dtype=dtype)
        _, tracker, opt = attached(model, capture=capture, lr=0.5)
        for _ in range(3):
            tracker(model(ids).float().square().sum()).backward()
        results.append(model.weight.detach().float())
    # bfloat16 rounds at random, by one unit in the last place at each of three steps, for each way in its own manner.
    torch.testing.assert_close(*results, rtol=0, atol=1e-6 if dtype == torch.float32 else 3 * 2**-7)


def test_what_is_not_finite_at_padding_is_masked():
    results = []
    for capture in ("hook", "adaptor"):
        torch.manual_seed(0)
        model = nn.Embedding(9, 4, padding_idx=2).double()
        _, tracker, opt = attached(model, capture=capture)
        out = model(torch.tensor([1, 2, 5]))
        out.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), float("nan")))
        tracker(out.square().sum()).backward()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
