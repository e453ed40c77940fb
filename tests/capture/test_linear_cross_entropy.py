"""gradlr.linear_cross_entropy: loss and gradients of a head without logits, against torch's own of the logits."""

import pytest
import torch
from models import attached
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from torch.utils.flop_counter import FlopCounterMode

import gradlr
from gradlr import ArgumentError, LossTracker, NonFiniteError, ShapeError, linear_cross_entropy
from gradlr.apps.bench.memory import peak_bytes
from gradlr.gradient import head as head_module
from gradlr.gradient.head import HeadGradient, Logits, RowsOnDemand

VOCABULARY, WIDTH = 31, 6

pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    """So that a small vocabulary has many blocks, and a last one of one row."""
    monkeypatch.setattr(head_module, "_BLOCK_NUMBERS", 2 * 12)


def problem(dtype=torch.float64, *, bias=True):
    """Hidden states, a head, labels of which some are masked, and the ordinary loss."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(3, 4, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (3, 4))
    labels[0, 1:3] = -100
    return hidden, head, labels


def gradients(loss, *tensors):
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_logits(dtype, bias, reduction):
    """float64 and float32 to their rounding; bfloat16 to its own, 2^-8 of the largest entry and as much again for the logits."""
    hidden, head, labels = problem(dtype, bias=bias)
    logits = head(hidden).flatten(0, 1)
    wide = logits if dtype == torch.float64 else logits.float()
    ordinary = gradients(F.cross_entropy(wide, labels.flatten(), reduction=reduction), hidden, *head.parameters())
    found = gradients(linear_cross_entropy(hidden, head, labels, reduction=reduction), hidden, *head.parameters())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert [one.dtype for one in found] == [one.dtype for one in ordinary]
    for one, other in zip(found, ordinary, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_a_weight_alone_autocast_and_no_gradient():
    hidden, head, labels = problem(torch.float32, bias=False)
    assert linear_cross_entropy(hidden, head, labels) == linear_cross_entropy(hidden, head.weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.cross_entropy(head(hidden).flatten(0, 1).float(), labels.flatten())
        loss, *found = gradients(linear_cross_entropy(hidden, head, labels), hidden, head.weight)
    assert [one.dtype for one in found] == [torch.float32] * 2
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    head.requires_grad_(False)
    linear_cross_entropy(hidden, head, labels).backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_all_tokens_masked_is_what_torch_makes_of_it():
    hidden, head, labels = problem()
    masked = torch.full_like(labels, -100)
    assert linear_cross_entropy(hidden, head, masked).isnan()
    assert linear_cross_entropy(hidden, head, masked, reduction="sum") == 0


def test_the_operator_against_its_matrix():
    """Every product of G, without G; in float64 to rounding."""
    hidden, head, labels = problem()
    x, labels = hidden.detach().flatten(0, 1), labels.flatten()
    logits = Logits(x, head.weight.detach(), head.bias.detach())
    log_sums, _ = logits.log_sums(labels)
    scale = torch.rand(len(x), dtype=x.dtype) * (labels >= 0)
    gradient = HeadGradient(logits, labels, log_sums, scale)
    delta = torch.softmax(F.linear(x, head.weight, head.bias), -1) - F.one_hot(labels.clamp(min=0), VOCABULARY)
    matrix = (delta * scale.unsqueeze(1)).mT.detach() @ x
    right, left = torch.randn(WIDTH, 3, dtype=x.dtype), torch.randn(VOCABULARY, 2, dtype=x.dtype)
    rows = torch.rand(VOCABULARY, 1, dtype=x.dtype)
    update = gradlr.rules.Update(**gradient.scaled_rows(rows))
    part = (..., slice(3, 7), slice(None))
    made, bound = gradient.rows_on_demand()
    assert matrix.square().sum(1).max() <= bound < torch.inf
    for found, expected in [
        (gradient.matrix, matrix), (gradient.formed().matrix, matrix), (gradient @ right, matrix @ right),
        (gradient.mT @ left, matrix.mT @ left), (gradient.row_energies(), matrix.square().sum(1, keepdim=True)),
        (gradient.squared_norm(), matrix.square().sum()), (gradient.scaled(torch.tensor(3.0)).matrix, 3 * matrix),
        (update.direction(), rows * matrix), (made[part], matrix[3:7]), (update.block(part).direction(), (rows * matrix)[3:7]),
    ]:  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert isinstance(update.left, RowsOnDemand) and gradient.is_finite()
    spoilt = HeadGradient(logits, labels, log_sums, scale / 0)
    assert not spoilt.is_finite() and not spoilt.rows_on_demand()[1].isfinite()


class Tokens(nn.Module):
    """Embedding, one layer, a head: tied or of its own."""

    def __init__(self, *, tied, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.mix = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, is_chunked):
        hidden, labels = torch.tanh(self.mix(self.embedding(tokens)))[:, :-1], tokens[:, 1:]
        if is_chunked:
            return linear_cross_entropy(hidden, self.head, labels)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def ends(is_chunked, *, tied=False, micro_batches=1, dtype=torch.float64, **options):
    """All weights after three steps."""
    model, tracker = Tokens(tied=tied, dtype=dtype), LossTracker()
    opt = gradlr.attach(model, tracker, lr=1e-2, rank=2, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for _ in range(micro_batches):
            tokens = torch.randint(VOCABULARY, (3, 5), generator=generator)
            (tracker(model(tokens, is_chunked)) / micro_batches).backward()
        opt.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


MATRIX = {"groups": [{"match": "head.weight", "kind": "matrix"}]}
AS_HEAD = {"groups": [{"match": "weight", "kind": "embedding"}]}
PLAIN = {"rule": gradlr.rules.LowRankPolar(residual=0)}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"tied": True}, {"capture": "adaptor"}, {"capture": "adaptor", "tied": True}, {"capture": "one_sided"},
        {"capture": "adaptor", **MATRIX}, {"capture": "adaptor", **MATRIX, **PLAIN},
        {"capture": "adaptor", "apply": "step", "micro_batches": 2}, {"capture": "adaptor", "apply": "step", **MATRIX},
        {"apply": "step", "micro_batches": 2, "tied": True, "max_grad_norm": 0.1},
        {"capture": "adaptor", "apply": "step", "max_grad_norm": 0.1}, {"capture": "adaptor", "weight_decay": 0.1},
    ],
)  # fmt: skip
@pytest.mark.also_asynchronous
def test_trained_by_blocks_the_weights_are_the_same(options):
    """Whatever captures the head, and however its gradient is used: in float64, to rounding over three steps."""
    torch.testing.assert_close(ends(True, **options), ends(False, **options), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_bfloat16_heads_are_trained(capture):
    before = torch.cat([parameter.detach().flatten() for parameter in Tokens(tied=False, dtype=torch.bfloat16).parameters()])
    after = ends(True, capture=capture, dtype=torch.bfloat16)
    assert after.isfinite().all() and (after != before).float().mean() > 0.5


def test_an_adapted_head_never_has_a_gradient_of_its_size(monkeypatch):
    def forbidden(*_):
        raise AssertionError("formed")

    monkeypatch.setattr(HeadGradient, "matrix", property(forbidden))
    ends(True, capture="adaptor")
    with pytest.raises(AssertionError, match="formed"):
        ends(True, capture="adaptor", apply="step")


@pytest.mark.also_asynchronous
def test_a_gradient_that_is_not_finite_changes_nothing():
    model, tracker, _opt = attached(nn.Linear(WIDTH, VOCABULARY, bias=False), capture="adaptor", kinds={}, **AS_HEAD)
    before = model.weight.detach().clone()
    loss = linear_cross_entropy(torch.randn(4, WIDTH), model, torch.arange(4))
    loss.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError):  # where the device runs behind the host, at the next loss
        [tracker(loss * 1).backward(), tracker(loss.detach())]
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("chunked", "products"), [(False, 2), (True, 4)])
def test_a_heads_gradient_is_computed_once(chunked, products):
    """Its logits a second time in backward and a third as it is written, where there are none; and the input's gradient."""
    hidden, model, labels = torch.randn(12, WIDTH, requires_grad=True), nn.Linear(WIDTH, VOCABULARY), torch.arange(12)
    _, tracker, _opt = attached(model, capture="adaptor", kinds={}, **AS_HEAD)
    loss = linear_cross_entropy(hidden, model, labels) if chunked else F.cross_entropy(model(hidden), labels)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    ) as counter:
        tracker(loss).backward()
    assert counter.get_total_flops() == products * 2 * 12 * WIDTH * VOCABULARY


def test_changed_between_forward_and_backward_is_an_error():
    hidden, head, labels = problem()
    loss = linear_cross_entropy(hidden, head, labels)
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(gradlr.BackwardError, match="changed between"):
        loss.backward()


def test_a_second_derivative_is_refused():
    hidden, head, labels = problem()
    with pytest.raises(gradlr.BackwardError, match="differentiated again"):
        torch.autograd.grad(linear_cross_entropy(hidden, head, labels), hidden, create_graph=True)


def test_bad_input_is_told():
    hidden, head, labels = problem()
    with pytest.raises(ShapeError, match=r"\(3, 4, 6\), \(31, 6\), \(3, 3\)"):
        linear_cross_entropy(hidden, head, labels[:, 1:])
    with pytest.raises(ArgumentError, match="label 31 is no row of a head with 31 rows"):
        linear_cross_entropy(hidden, head, labels.clamp(min=VOCABULARY))
    with pytest.raises(ArgumentError, match=r"labels\.long"):
        linear_cross_entropy(hidden, head, labels.int())
    with pytest.raises(ArgumentError, match="'none'"):
        linear_cross_entropy(hidden, head, labels, reduction="none")
    with pytest.raises(ArgumentError, match="Conv1d"):
        linear_cross_entropy(hidden, nn.Conv1d(WIDTH, VOCABULARY, 1), labels)


def test_a_label_beyond_the_head_shows_where_nobody_may_wait_for_the_device():
    hidden, head, labels = problem()
    _, own = Logits(hidden.detach().flatten(0, 1), head.weight, None).log_sums(labels.flatten() + VOCABULARY)
    assert own.isnan()[labels.flatten() >= 0].all()


def test_peak_memory_is_a_tenth_at_most(monkeypatch):
    """2,048 tokens and 8,192 rows, a quarter of the 32k of the docs and of its blocks: 1/20 there; above weights and input."""
    monkeypatch.setattr(head_module, "_BLOCK_NUMBERS", 2**19)
    torch.manual_seed(0)
    model, x, labels = nn.Linear(64, 2**13, bias=False), torch.randn(2048, 64), torch.randint(2**13, (2048,))
    tracker, hidden = LossTracker(), x.requires_grad_()
    opt = gradlr.attach(model, tracker, capture="adaptor", **AS_HEAD)

    def step(loss):
        tracker(loss()).backward()
        hidden.grad = None

    def chunked():
        return linear_cross_entropy(hidden, model, labels)

    step(chunked)  # state and buffers of the first step
    peaks = [peak_bytes(lambda: step(lambda: F.cross_entropy(model(hidden), labels))), peak_bytes(lambda: step(chunked))]
    assert 0 < 10 * peaks[1] <= peaks[0]
    opt.detach()
