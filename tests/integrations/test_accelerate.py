"""gradlr.integrations.accelerate: the loop of accelerate's documentation, on the CPU."""

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate_states import forget_accelerate, fresh_accelerate
from models import mlp, regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradlr
from gradlr import ArgumentError, AttachError
from gradlr.integrations.accelerate import attach, clip_grad_norm_, unwrap
from gradlr.rules import LowRankPolar

pytestmark = pytest.mark.usefixtures(fresh_accelerate.__name__)

PLAIN = {"lr": 1e-2, "rank": 4, "momentum_rank": 2, "rule": LowRankPolar(residual=0)}
EXACT = {"lr": 1e-2, "rank": 1.0, "momentum_rank": 2}


class Loop:
    """A prepared model and its training loop."""

    def __init__(self, *, options=PLAIN, batch=16, dtype=torch.float32, seed=0, **arguments):
        self.accelerator = Accelerator(cpu=True, **arguments)
        self.tracker = gradlr.LossTracker()
        self.plain = mlp(16, 3, dtype=dtype, seed=seed)
        self.opt = attach(self.accelerator, self.plain, self.tracker, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda step: 1 / (1 + step))
        loader = DataLoader(TensorDataset(*regression(16, dtype=dtype)), batch_size=batch)
        self.model, self.prepared, self.loader, self.scheduler = self.accelerator.prepare(self.plain, self.opt, loader, scheduler)
        self.norms, self.losses = [], []

    def run(self, epochs=1, max_norm=None):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.losses.append(loss.item())
                    self.accelerator.backward(self.tracker(loss))
                    if self.accelerator.sync_gradients and max_norm is not None:
                        self.norms.append(clip_grad_norm_(self.accelerator, self.prepared, max_norm).item())
                    self.prepared.step()
                    self.scheduler.step()
                    self.prepared.zero_grad()
        return self

    @property
    def weights(self):
        return [parameter.detach().clone() for parameter in self.plain.parameters()]


def assert_same(one, other, atol=0.0):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_hand(*, batch=16, dtype=torch.float32, options=PLAIN, **more):
    model, tracker, norms = mlp(16, 3, dtype=dtype), gradlr.LossTracker(), []
    opt = gradlr.attach(model, tracker, apply="step", **options, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    x, y = regression(16, dtype=dtype)
    for rows in torch.arange(64).split(batch):
        tracker(nn.functional.mse_loss(model(x[rows]), y[rows])).backward()
        opt.step()
        norms.append(opt.grad_norm)
        scheduler.step()
    return [parameter.detach() for parameter in model.parameters()], norms


def test_a_prepared_loop_is_a_plain_one():
    assert_same(Loop().run().weights, by_hand()[0])


def test_accumulated_micro_batches_are_one_batch_and_losses_are_true():
    small = Loop(options=EXACT, batch=4, dtype=torch.float64, gradient_accumulation_steps=4).run()
    # Sums in another order, in float64.
    assert_same(small.weights, by_hand(options=EXACT, dtype=torch.float64)[0], atol=1e-9)
    assert small.tracker.history == pytest.approx(small.losses, rel=1e-12)
    assert small.tracker.count == 16


def test_clipping_through_the_optimizer_is_that_of_attach():
    clipped = Loop(options=PLAIN, dtype=torch.float64).run(max_norm=1e-3)
    expected, norms = by_hand(dtype=torch.float64, max_grad_norm=1e-3)
    assert_same(clipped.weights, expected, atol=1e-12)  # the factor is read back from a quotient of norms
    assert clipped.norms == pytest.approx(norms, rel=1e-12)
    assert max(norms) > 1e-3
    free = Loop(options=PLAIN, dtype=torch.float64).run()
    assert not torch.equal(free.opt.state[free.plain[0].weight]["R"], clipped.opt.state[clipped.plain[0].weight]["R"])


def test_stock_clipping_over_the_model_is_that_of_the_optimizer():
    """What training scripts write: `accelerator.clip_grad_norm_(model.parameters(), ...)`, which finds no gradients by itself."""
    loops = []
    for clip in (
        lambda loop: loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1e-3),
        lambda loop: clip_grad_norm_(loop.accelerator, loop.prepared, 1e-3),
    ):
        loop, (x, y) = Loop(), regression(16)
        loop.accelerator.backward(loop.tracker(nn.functional.mse_loss(loop.model(x), y)))
        loop.norms.append(clip(loop).item())
        loop.prepared.step()
        loops.append(loop)
    assert_same(loops[0].weights, loops[1].weights)
    assert loops[0].norms == loops[1].norms and loops[0].norms[0] > 1e-3


def test_one_norm_is_taken_over_what_is_attached_and_what_is_not():
    loop, other, (x, y) = Loop(), nn.Linear(16, 16), regression(16)
    loop.accelerator.backward(loop.tracker(nn.functional.mse_loss(other(loop.model(x)), y)))
    parts = torch.stack([loop.opt.pending.norm_proxy.norm(), *(one.grad.norm() for one in other.parameters())])
    norm = loop.accelerator.clip_grad_norm_([*loop.model.parameters(), *other.parameters()], 1e-3)
    assert norm.item() == pytest.approx(parts.norm().item(), rel=1e-6)  # float32
    assert other.weight.grad.norm() < 1e-3 < parts[1]
    loop.opt.zero_grad()
    assert loop.accelerator.clip_grad_norm_(other.parameters(), 1.0) <= 1e-3 * (1 + 1e-5)  # another model's are its own


def test_clipping_that_could_not_be_done_is_an_error():
    loop, (x, y) = Loop(), regression(16)
    loop.accelerator.backward(loop.tracker(nn.functional.mse_loss(loop.model(x), y)))
    with pytest.raises(ArgumentError, match=r"given 2 of 6 attached parameters.*give all of them"):
        loop.accelerator.clip_grad_norm_(loop.model[0].parameters(), 1.0)
    with pytest.raises(ArgumentError, match="clip_grad_value_: what waits for opt.step.. is a sketch"):
        loop.accelerator.clip_grad_value_(loop.model.parameters(), 1.0)
    loop.opt.zero_grad()
    loop.opt.detach()
    loop.model(x).sum().backward()  # an ordinary model again
    assert loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1e-3) > 1e-3
    immediate = Loop(options={**PLAIN, "apply": "backward"})
    with pytest.raises(ArgumentError, match='changed in backward already; attach with apply="step"'):
        immediate.accelerator.clip_grad_norm_(immediate.model.parameters(), 1.0)


def test_bfloat16_autocast_trains_and_state_stays_wide():
    options = {**PLAIN, "lr": 5e-2}
    loop = Loop(options=options, mixed_precision="bf16").run(epochs=5)
    forget_accelerate()
    wide = Loop(options=options).run(epochs=5)
    assert loop.losses[-1] < 0.95 * loop.losses[0]
    assert loop.losses != wide.losses
    assert loop.losses == pytest.approx(wide.losses, rel=2e-2)  # autocast rounds to 8 bits
    assert {value.dtype for state in loop.opt.state.values() for value in state.values()} == {torch.float32, torch.int64}


def test_state_of_bfloat16_weights_survives_prepare():
    """Accelerate loads the optimizer's own state once; torch's loader would narrow it."""
    loop = Loop(dtype=torch.bfloat16)
    assert {value.dtype for state in loop.opt.state.values() for value in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_save_state_resumes_bit_for_bit(tmp_path, precision):
    arguments = {"mixed_precision": precision, "batch": 8, "gradient_accumulation_steps": 2}
    whole = Loop(**arguments).run(epochs=2)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.run()
    resumed = Loop(seed=3, **arguments)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.run()
    assert_same(whole.weights, resumed.weights)
    assert whole.losses[16:] == resumed.losses
    assert whole.tracker.history == resumed.tracker.history


def test_a_step_that_the_scaler_skips_leaves_nothing_over():
    loop = Loop(dtype=torch.float64)
    loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    loop.prepared = type(loop.prepared)(loop.opt, scaler=loop.accelerator.scaler)
    before = loop.weights
    handle = loop.plain[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    x, y = regression(16, dtype=torch.float64)

    def step():
        loop.accelerator.backward(loop.tracker(nn.functional.mse_loss(loop.model(x), y)))
        loop.prepared.step()
        loop.prepared.zero_grad()

    step()
    handle.remove()
    assert_same(before, loop.weights)
    assert loop.opt.skipped == 1 and loop.opt.state_dict()  # nothing waits
    step()
    plain = Loop(dtype=torch.float64)
    plain.tracker(nn.functional.mse_loss(plain.plain(x), y)).backward()
    plain.opt.step()
    assert_same(plain.weights, loop.weights, atol=1e-12)  # a power of two, but for the norm's own rounding


def test_what_does_not_fit_is_refused():
    accelerator = Accelerator(cpu=True)
    model = mlp()
    opt = attach(accelerator, model, gradlr.LossTracker(), apply="backward")
    with pytest.raises(ArgumentError, match='apply="step"'):
        clip_grad_norm_(accelerator, opt, 1.0)
    with pytest.raises(ArgumentError, match="SGD; make it with gradlr"):
        unwrap(torch.optim.SGD(model.parameters()))
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(AttachError, match="DEEPSPEED; gradlr knows replicas and FSDP2"):
        attach(accelerator, mlp(), gradlr.LossTracker())
