"""What only a GPU can tell: kernels for real, no wait of the host, training beside float64. On a CPU the same, as far as it goes.

`python -m gradlr bench gpu` runs these first. In bfloat16 and float32 the plain way on the same device is the reference.
"""

import pytest
import torch
from torch import nn

import gradlr
from gradlr.linalg import kernels
from gradlr.linalg.normalize import frobenius_norm, spread_scales

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SIZES = (300, 200) if HAS_GPU else (33, 20)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="asks a GPU")
pytest.importorskip("triton")

FORMS = {
    "hook": {},
    "no_residual": {"rule": gradlr.rules.LowRankPolar(residual=0)},
    "adaptor": {"capture": "adaptor"},
    "adaptor_no_residual": {"capture": "adaptor", "rule": gradlr.rules.LowRankPolar(residual=0)},
    "step": {"apply": "step"},
    "step_clipped": {"apply": "step", "max_grad_norm": 1.0},
    "momentum": {"momentum_rank": 4},
    "multi_normalized": {"rule": "multi_normalized"},
    "polar": {"rule": "polar"},
}


def made(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


class Net(nn.Module):
    """An embedding, matrices, vectors and a head."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, width), nn.LayerNorm(width)
        self.first, self.second, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 50)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.second(torch.tanh(self.first(self.norm(x)))))


def trained(device, dtype, steps=6, **options):
    """Losses of a few steps from the same weights, on the same tokens."""
    torch.manual_seed(0)
    model, tokens = Net().to(device, dtype), torch.randint(50, (steps, 4, 16))
    tracker = gradlr.LossTracker()
    opt, losses = gradlr.attach(model, tracker, lr=2e-3, rank=8, **options), []
    for batch in tokens.to(device):
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.detach().double())
        tracker(loss).backward()
        opt.step()
    opt.detach()
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-2), (torch.bfloat16, 5e-2)], ids=str)
def test_a_training_run_is_that_of_a_cpu_in_float64(form, dtype, error):
    """Random columns are others on a GPU and in float64, so that losses agree as those of two seeds do: nats, of a fall of 1.

    Half precision adds its own rounding, of 2⁻⁹ of each activation.
    """
    expected, found = trained("cpu", torch.float64, **FORMS[form]), trained(DEVICE, dtype, **FORMS[form])
    assert (found - expected).abs().max() < error + 0.1 * (expected[0] - expected.min())


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_makes_the_host_wait(form):
    torch.manual_seed(0)
    model, tracker = Net().to(DEVICE, torch.bfloat16), gradlr.LossTracker()
    opt, tokens = gradlr.attach(model, tracker, lr=1e-3, rank=8, **FORMS[form]), torch.randint(50, (4, 16), device=DEVICE)
    for step in range(4):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            tracker(loss).backward()
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    opt.detach()


@needs_gpu
def test_a_compiled_update_is_the_eager_one_on_a_gpu():
    eager, compiled = (trained(DEVICE, torch.float32, compile=one) for one in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)  # float32 in another order, over six steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_the_residual_are_the_plain_way(dtype, monkeypatch):
    x = made(2, *SIZES, dtype=dtype)
    norm = frobenius_norm(x)
    plain = spread_scales(x.double(), norm.double(), 3.0, 1e-9)
    first, partial = kernels.normalize_pass(x, norm.flatten(), None)
    for _ in range(2):
        rows, partial = kernels.normalize_pass(x, norm.flatten(), partial.sum(1))
    found = kernels.scales(first, rows, partial.sum(1), norm.flatten(), 3.0, 1e-9)
    for one, other in zip(found, (plain[0].flatten(1), plain[1].flatten(1)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0)  # float32 sums of 300 squares


def test_the_kernel_that_writes_rounds_without_bias():
    """Of 400 writes of an eighth of a step, an eighth rounds up: the mean is right to four of its standard errors."""
    m, n = SIZES
    step, tries, total = 2.0**-7, 400 if HAS_GPU else 20, torch.zeros(m, n, device=DEVICE, dtype=torch.float64)
    change = torch.full((1, m, n), step / 8, device=DEVICE)
    for seed in range(tries):
        weight = torch.ones(1, m, n, device=DEVICE, dtype=torch.bfloat16)
        kernels.subtract_(weight, None, None, None, change, None, None, None, 1.0, -1.0, seed)
        total += weight[0].double() - 1
    error = step * (1 / 8 * 7 / 8 / (tries * m * n)) ** 0.5
    assert abs(total.mean().item() / tries - step / 8) < 4 * error


def test_the_kernel_that_writes_takes_every_part():
    m, n = SIZES
    weight, dense = made(1, m, n), made(1, m, n, seed=1)
    left, right = made(1, m, 5, seed=2), made(1, n, 5, seed=3)
    rows, columns = made(1, m, seed=4), made(1, n, seed=5)
    wide = [one.double() for one in (weight, left, right, rows, dense, columns)]
    expected = 0.9 * wide[0] - 0.1 * (
        wide[3][..., None] * (wide[1] @ wide[2].mT) + wide[3][..., None] * wide[4] * wide[5][:, None]
    )
    check = torch.ones((), device=DEVICE)
    kept = weight.clone()
    kernels.subtract_(weight, left, right, rows, dense, rows, columns, check, 0.9, 0.1, 0)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)
    kernels.subtract_(kept, left, right, rows, dense, rows, columns, check / 0, 0.9, 0.1, 0)
    assert not kept.equal(weight)  # an update that is not finite writes nothing
