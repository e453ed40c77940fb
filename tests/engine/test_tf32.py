"""Rules compute in float32 where the user has allowed TF32 for the model: what TF32 would do is emulated on the CPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradlr
from gradlr import tensors
from gradlr.gradient import Dense
from gradlr.linalg import orthonormalize
from gradlr.rules import LowRankPolar, UpdateContext

MATMUL = torch.backends.cuda.matmul
# What a product multiplies, by its place among the arguments.
FACTORS = {
    **dict.fromkeys(("mm", "bmm", "matmul", "linalg_solve_triangular"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), (1, 2)),
}


class Tf32(TorchDispatchMode):
    """Rounds the factors of float32 products to ten bits, as TF32 does, where it is allowed; counts those products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args = list(args)
        for place in FACTORS.get(function._overloadpacket.__name__, ()):
            if args[place].dtype == torch.float32 and tensors.allows_tf32():
                bits = args[place].contiguous().view(torch.int32)
                args[place], self.count = ((bits + 2**12) & -(2**13)).view(torch.float32), self.count + 1
        return function(*args, **(kwargs or {}))


def switches():
    """What each of torch's switches says; the older and the newer may not be read in turn."""

    def said(read):
        try:
            return read()
        except (AttributeError, RuntimeError) as error:
            return type(error)

    return list(map(said, (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision, lambda: MATMUL.fp32_precision)))


WAYS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older": lambda: setattr(MATMUL, "allow_tf32", True),
    "newer": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def forbid():
    """As it is in a new process."""
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        torch.backends.fp32_precision = MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(params=WAYS)
def tf32(request, monkeypatch):
    """TF32 is allowed, in one of the ways to say so, and the CPU is a device that has it."""
    if request.param in ("newer", "all") and not hasattr(MATMUL, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    monkeypatch.setattr(tensors, "TF32_DEVICES", {"cpu"})
    WAYS[request.param]()
    assert tensors.allows_tf32()
    yield
    forbid()


class Watched(LowRankPolar):
    def update(self, gradient, state, context):
        self.allowed = tensors.allows_tf32()
        if context.step == 2:
            raise RuntimeError("the rule is broken")
        return super().update(gradient, state, context)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_tf32_is_off_in_an_update_and_as_before_after_it_and_after_an_error(tf32, apply):
    model, tracker, rule, before = nn.Linear(12, 9, bias=False), gradlr.LossTracker(), Watched(), switches()
    opt = gradlr.attach(model, tracker, rule=rule, rank=2, apply=apply)

    def step():
        tracker(model(torch.randn(4, 12)).square().mean()).backward()
        opt.step()

    step()
    assert rule.allowed is False and switches() == before
    rule.allowed = None
    with pytest.raises(RuntimeError, match="broken"):
        step()
    assert rule.allowed is False and switches() == before and tensors.allows_tf32()


@pytest.mark.parametrize("kind", ["matrix", "embedding"])
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_no_product_of_an_update_is_made_in_tf32(tf32, capture, kind):
    """Those of the model's own forward and backward are, and so is a gradient that is formed in their place."""

    def trained(mode):
        torch.manual_seed(0)
        model, tracker = nn.Linear(40, 30, bias=False), gradlr.LossTracker()
        opt = gradlr.attach(model, tracker, rank=4, capture=capture, groups=[{"match": "*", "kind": kind}])
        with mode:
            loss = tracker(model(torch.randn(8, 40)).square().mean())
            forward = mode.count
            loss.backward()
        opt.detach()
        return forward, mode.count

    forward, all_of_them = trained(Tf32())
    assert forward > 0 and all_of_them == 2 * forward  # forward multiplies two factors, and so does the weight's gradient


def directions(gradient, *, residual, dtype=torch.float32, mode=None, rank=64):
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(gradient.shape[1], rank, generator=generator, dtype=torch.float64) * gradient.shape[1] ** -0.5
    context = UpdateContext(rank, 0, 0.9, 1, None, ceiling=rank, columns=columns.to(dtype))
    operator = Dense(gradient.to(dtype, copy=True), is_owned=True)
    if mode is None:
        return LowRankPolar(residual=residual).update(operator, {}, context)[0]
    with mode:
        return LowRankPolar(residual=residual).update(operator, {}, context)[0]


def gradient_of(tokens, m=512, n=384):
    """A float64 sum of outer products whose spectrum falls as those of real layers do, with the number of the direction."""

    def side(size):
        turned = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        return torch.randn(tokens, size, dtype=torch.float64) / torch.arange(1, size + 1) @ turned

    return side(m).mT @ side(n)


def test_why_products_of_an_update_are_not_made_in_tf32():
    """In TF32 a tenth of the update is another one; of few tokens the residual, rounding errors, is larger than the update."""
    torch.set_float32_matmul_precision("high")
    try:
        changes = {}
        for tokens, residual in ((2048, 0.0), (2048, 0.5), (2, 0.5)):
            gradient = gradient_of(tokens)
            expected = directions(gradient, residual=residual, dtype=torch.float64).direction()
            for mode in (None, Tf32()):
                found = directions(gradient, residual=residual, mode=mode).direction()
                changes[tokens, residual, mode is None] = float((found - expected).norm() / expected.norm())
        assert all(change < 1e-3 for (*_, is_float32), change in changes.items() if is_float32), changes
        assert changes[2048, 0.0, False] > 0.03 and changes[2048, 0.5, False] > 0.03 and changes[2, 0.5, False] > 1, changes
        with Tf32():
            basis = orthonormalize(torch.randn(512, 64))  # bases stay orthonormal, but for those ten bits
        torch.testing.assert_close(basis.mT @ basis, torch.eye(64), rtol=0, atol=2e-3)
    finally:
        forbid()
