"""Models whose weights are int8 codes: made, trained, saved, and made ordinary again."""

import copy

import pytest
import torch
from models import llama_like
from torch import nn

import gradlr
from gradlr import ArgumentError, AttachError, GradlrWarning, LossTracker, linear_cross_entropy
from gradlr.apps.bench.memory import peak_bytes
from gradlr.engine.apply_update import apply_update
from gradlr.layers import View
from gradlr.linalg.int8 import Int8Weight
from gradlr.rules import Update

pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")

VOCABULARY, WIDTH = 30, 24


class Tokens(nn.Module):
    """Embedding, norm, two layers with bias, a head: tied or of its own."""

    def __init__(self, *, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.mix = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, is_chunked=False):
        hidden, labels = torch.tanh(self.mix(self.norm(self.embedding(tokens))))[:, :-1], tokens[:, 1:]
        if is_chunked:
            return linear_cross_entropy(hidden, self.head, labels)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), labels.flatten())


def tokens_of(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.arange(9) * torch.randint(1, 4, (6, 1), generator=generator)) % VOCABULARY


def train(model, steps=3, *, is_chunked=False, micro_batches=1, lr=2e-3, **options):
    """(losses, optimizer) of some steps."""
    tracker, losses = LossTracker(), []
    opt = gradlr.attach(model, tracker, lr=lr, rank=4, **options)
    for step in range(steps):
        for part in range(micro_batches):
            loss = model(tokens_of(micro_batches * step + part), is_chunked)
            (tracker(loss) / micro_batches if micro_batches > 1 else tracker(loss)).backward()
        opt.step()
        losses.append(loss.item())
    return losses, opt


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_dict_holds_codes_and_scales_and_loads(tied, dtype):
    model = gradlr.quantize_(Tokens(tied=tied, dtype=dtype), group=8)
    state = model.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert state["head.weight.codes"].dtype == torch.int8 and "head.weight" not in state
    assert (model.head.weight is model.embedding.weight) == tied
    assert isinstance(model.norm.weight, nn.Parameter) and not isinstance(model.norm.weight, Int8Weight)
    other = Tokens(tied=tied, dtype=dtype)
    with torch.no_grad():
        other.mix[0].weight.mul_(2)
    gradlr.quantize_(other, group=8).load_state_dict(state)
    assert torch.equal(other(tokens_of(0)), model(tokens_of(0)))
    other.load_state_dict(gradlr.float_state_dict(model))  # ordinary weights are rounded
    torch.testing.assert_close(other(tokens_of(0)), model(tokens_of(0)), rtol=2e-2, atol=0)
    wrong = copy.deepcopy(state)
    del wrong["head.weight.codes"]
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("tied", [False, True])
def test_dequantized_it_is_the_ordinary_model(tied):
    """Entry by entry, in the file's and the model's eyes; a copy of it too."""
    model = gradlr.quantize_(Tokens(tied=tied))
    expected, state = model(tokens_of(0)), gradlr.float_state_dict(model)
    plain = gradlr.dequantize_(copy.deepcopy(model))
    assert (plain.head.weight is plain.embedding.weight) == tied and type(plain.head.weight) is nn.Parameter
    torch.testing.assert_close(plain(tokens_of(0)), expected, rtol=1e-6, atol=1e-7)
    found = plain.state_dict()
    assert list(found) == list(Tokens(tied=tied).state_dict()) and set(found) == set(state)
    assert all(torch.equal(found[key], state[key]) for key in found)
    assert {value.dtype for value in gradlr.dequantize_(model, torch.bfloat16).mix.state_dict().values()} == {
        torch.bfloat16, torch.float32,
    }  # fmt: skip  # of biases too, which were never int8
    train(plain)


CAPTURES = ["hook", "adaptor", "one_sided"]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.also_asynchronous
def test_it_learns_as_the_ordinary_model_does(capture, apply, tied):
    """Every capture, both modes, tied or not: after 30 steps within 0.1 nats, of more than half a nat that was learned."""
    plain, _ = train(Tokens(tied=tied), 30, capture=capture, apply=apply)
    codes, opt = train(gradlr.quantize_(Tokens(tied=tied)), 30, capture=capture, apply=apply)
    assert plain[-1] < plain[0] - 0.5 and codes[-1] == pytest.approx(plain[-1], abs=0.1)
    assert "head.weight" in repr(opt) or tied


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1}, {"is_chunked": True}, {"is_chunked": True, "capture": "adaptor"}, {"rule": "adam"},
        {"capture": "adaptor", "rule": "multi_normalized"}, {"apply": "step", "micro_batches": 2, "max_grad_norm": 1.0},
        {"state_dtype": torch.bfloat16, "momentum_rank": 2}, {"groups": [{"match": "head.weight", "kind": "matrix"}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_under_every_option(options, dtype):
    model = gradlr.quantize_(Tokens(dtype=dtype), group=16)
    losses, opt = train(model, 12, **options)
    assert losses[-1] < losses[0] - 0.2
    with opt.observe("*"):
        opt.tracker(model(tokens_of(0))).backward()
        opt.step()
    assert opt.report()


def test_the_direction_is_that_of_the_first_input_and_stays():
    """The leading right singular vector of what the layer is given first, of other layers' weights nothing; saved and loaded."""
    torch.manual_seed(1)
    layer = gradlr.quantize_(nn.Linear(24, 8).double(), group=8)
    x = torch.randn(5, 3, 24, dtype=torch.float64) + 4 * torch.randn(24, dtype=torch.float64)
    assert not layer.weight.direction.any()
    random, before = torch.get_rng_state(), layer(x * torch.nan).isnan().all()
    assert before and not layer.weight.direction.any() and torch.equal(torch.get_rng_state(), random)
    layer = gradlr.quantize_(gradlr.dequantize_(layer), group=8)
    expected = layer.weight.dequantized()
    layer(x)
    leading = torch.linalg.svd(x.flatten(0, 1)).Vh[0]
    assert (layer.weight.direction[:, 0] @ leading).abs() > 1 - 1e-6
    assert torch.equal(layer.weight.dequantized(), expected)
    known = layer.weight.direction.clone()
    layer(torch.randn_like(x))
    other = gradlr.quantize_(nn.Linear(24, 8).double(), group=8)
    other.load_state_dict(layer.state_dict())
    other(torch.randn_like(x))
    assert torch.equal(layer.weight.direction, known) and torch.equal(other.weight.direction, known)


@pytest.mark.parametrize("is_of_rows", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_rounding_error_stays_along_the_direction(is_of_rows, weight_decay):
    """Fifty updates beside their exact sum: the same along the direction, elsewhere not; products and lookups know of it."""
    torch.manual_seed(0)
    weight = Int8Weight.of(torch.randn(9, 24, dtype=torch.float64), 8)
    exact, v = weight.dequantized(), nn.functional.normalize(torch.randn(24, 1, dtype=torch.float64), dim=0)
    weight.direction.copy_(v)
    for step in range(50):
        change, rows = torch.randn(4 if is_of_rows else 9, 24, dtype=torch.float64) / 100, torch.randperm(9)[:4]
        update = Update(dense=change.clone(), rows=rows) if is_of_rows else Update(dense=change.clone())
        options = {"lr": 0.5, "weight_decay": weight_decay, "generator": torch.Generator().manual_seed(step)}
        apply_update(weight, View(), update, is_mirrored=step % 2 == 1, **options)
        exact = exact * (1 - 0.5 * weight_decay)
        exact = exact.index_add(0, rows, change, alpha=-0.5) if is_of_rows else exact - 0.5 * change
    error = weight.dequantized() - exact
    assert (error @ v).abs().max() < 1e-12 and error.abs().max() > 1e-3
    x, y, ids = (*(torch.randn(5, size, dtype=torch.float64) for size in (24, 9)), torch.tensor([[1, 4]]))
    plain = weight.dequantized()
    for found, wanted in (
        (nn.functional.linear(x, weight), x @ plain.mT), (weight.t() @ y.mT, plain.mT @ y.mT), (y @ weight, y @ plain),
        (weight[2:5] + 0, plain[2:5]), (nn.functional.linear(x, weight[2:5]), x @ plain[2:5].mT),
        (nn.functional.embedding(ids, weight), plain[ids]), (weight.to(torch.float32).double(), plain),
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_only_rows_that_were_looked_up_are_written():
    model = gradlr.quantize_(Tokens(), group=8)
    before = model.embedding.weight.codes.clone()
    tokens, tracker = torch.tensor([[3, 3, 5, 8]]), LossTracker()
    _opt = gradlr.attach(model, tracker, lr=0.5, capture="adaptor", rank=4)
    tracker(model(tokens)).backward()
    assert (model.embedding.weight.codes != before).any(1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_resumed_bit_for_bit(apply, tmp_path):
    """Codes, scales, and the random numbers that they are rounded with."""
    whole = gradlr.quantize_(Tokens())
    tracker = LossTracker()
    opt = gradlr.attach(whole, tracker, rank=4, lr=2e-3, apply=apply)

    def go_on(model, tracker, opt, steps):
        for step in steps:
            tracker(model(tokens_of(step))).backward()
            opt.step()

    go_on(whole, tracker, opt, range(3))
    gradlr.save(tmp_path / "run.pt", model=whole, optimizer=opt)
    go_on(whole, tracker, opt, range(3, 6))
    resumed, tracker = gradlr.quantize_(Tokens()), LossTracker()
    opt = gradlr.attach(resumed, tracker, rank=4, lr=2e-3, apply=apply)
    gradlr.load(tmp_path / "run.pt", model=resumed, optimizer=opt)
    go_on(resumed, tracker, opt, range(3, 6))
    ends = [model.state_dict() for model in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_weight_that_changed_since_the_forward_is_torchs_own_error():
    model, tracker = gradlr.quantize_(Tokens()), LossTracker()
    _opt = gradlr.attach(model, tracker, rank=4)
    losses = [model(tokens_of(0)), model(tokens_of(1))]
    tracker(losses[0]).backward()
    with pytest.warns(GradlrWarning, match="was computed before the backward of the loss before it"):
        tracker(losses[1])
    with pytest.raises(RuntimeError, match="inplace|changed"):
        losses[1].backward()


def test_it_saves_as_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = gradlr.quantize_(llama_like())
    model.save_pretrained(tmp_path, state_dict=gradlr.float_state_dict(model))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    gradlr.dequantize_(model).save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(one, other) for one, other in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = Tokens()
    opt = train(model)[1]
    with pytest.raises(AttachError, match="detach"):
        gradlr.quantize_(model)
    assert type(model.mix[0].weight) is nn.Parameter
    opt.detach()
    with pytest.raises(ArgumentError, match="int4"):
        gradlr.quantize_(model, "int4")
    with pytest.raises(ArgumentError, match="group=0"):
        gradlr.quantize_(model, group=0)
    with pytest.raises(ArgumentError, match="no Linear"):
        gradlr.quantize_(nn.Conv1d(3, 3, 1))
    with pytest.raises(ArgumentError, match="meta"):
        gradlr.quantize_(Tokens().to("meta"))
    gradlr.quantize_(model)
    opt = train(model)[1]
    with pytest.raises(AttachError, match="detach"):
        gradlr.dequantize_(model)
    opt.detach()
    assert torch.is_floating_point(gradlr.dequantize_(model).head.weight)


def test_peak_of_training_is_codes_activations_and_little_else():
    """A stack of 12 MiB in bfloat16, 64 tokens: codes and scales, each layer's input, and below 2.5 MiB besides.

    Of 100 MiB, that is 60: `python -m gradlr bench memory --int8`.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(6)]
    model = gradlr.quantize_(nn.Sequential(*layers))
    x, tracker = torch.randn(64, 1024, dtype=torch.bfloat16), LossTracker()
    opt = gradlr.attach(model, tracker, rank=16, capture="adaptor")

    def step():
        tracker(model(x).float().square().mean()).backward()

    step()
    activations = 6 * 64 * 1024 * 2
    assert peak_bytes(step) < activations + 2.5 * 2**20
    held = sum(part.nbytes for weight in model.parameters() for part in weight.parts())
    assert held == 6 * (1024**2 * (1 + 2 / 64) + 2 * 1024 * 2)
    opt.detach()


def test_detached_moved_and_attached_again_they_are_trained():
    model = gradlr.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)))
    gradlr.attach(model, gradlr.LossTracker()).detach()
    model.to("cpu")  # torch exchanges tensors of such a class even where they stay
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, lr=0.1)
    before = [layer.weight.codes.clone() for layer in model]
    tracker(model(torch.randn(6, 8)).square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(layer.weight.codes, codes) for layer, codes in zip(model, before, strict=True))
    opt.detach()
