"""`zero_grad`, of whomever it is: what waits for `opt.step()` goes with it, as `.grad` would."""

import copy
import gc
import pickle

import pytest
import torch
from models import attached, is_unchanged, loss_of, mlp, weights
from torch import nn

import gradlr
from gradlr import GradlrWarning

pytestmark = pytest.mark.also_asynchronous
CLASSES = pytest.mark.synchronous("what stands on torch's classes does not look at the device")
TORCHS = nn.Module.zero_grad, torch.optim.Optimizer.zero_grad


def is_torchs_own():
    gc.collect()  # optimizers of other tests
    return (nn.Module.zero_grad, torch.optim.Optimizer.zero_grad) == TORCHS


def adversaries():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    discriminator = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    return generator.double(), discriminator.double()


def dcgan(drop, *, freezes=False, apply="step"):
    """The loop of torch's DCGAN tutorial, three steps; both networks' weights."""
    netG, netD = adversaries()  # noqa: N806 (the tutorial's names)
    tracker_g, tracker_d = gradlr.LossTracker(), gradlr.LossTracker()
    optimizerG = gradlr.attach(netG, tracker_g, rank=4, lr=1e-2, apply=apply)  # noqa: N806
    optimizerD = gradlr.attach(netD, tracker_d, rank=4, lr=1e-2, apply=apply)  # noqa: N806
    criterion, random = nn.BCEWithLogitsLoss(), torch.Generator().manual_seed(1)
    ones, zeros = torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    for _ in range(3):
        real = torch.randn(6, 16, generator=random, dtype=torch.float64)
        fake = netG(torch.randn(6, 8, generator=random, dtype=torch.float64))
        drop(netD, optimizerD)
        if apply == "step":
            tracker_d(criterion(netD(real), ones)).backward()
            tracker_d(criterion(netD(fake.detach()), zeros)).backward()
        else:
            tracker_d(criterion(netD(real), ones) + criterion(netD(fake.detach()), zeros)).backward()
        optimizerD.step()
        drop(netG, optimizerG)
        netD.requires_grad_(not freezes)
        tracker_g(criterion(netD(fake), ones)).backward()
        optimizerG.step()
        netD.requires_grad_(True)
    with pytest.warns() if len(optimizerD.pending) else _nothing():
        optimizerD.detach()
    optimizerG.detach()
    return [*weights(netG), *weights(netD)]


class _nothing:  # noqa: N801 (a context)
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


DROPS = {
    "module": lambda net, opt: net.zero_grad(),
    "layers": lambda net, opt: [layer.zero_grad() for layer in net],
    "container": lambda net, opt: nn.ModuleList([net]).zero_grad(),
    "subclass": lambda net, opt: Owner(net).zero_grad(set_to_none=False),
    "optimizer": lambda net, opt: opt.zero_grad(),
    "another optimizer": lambda net, opt: torch.optim.SGD(net.parameters(), lr=1.0).zero_grad(),
}


class Owner(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_the_generators_gradients_do_not_train_the_discriminator(drop):
    """Adversaries with a tracker each, as in torch's tutorial: beside the same loop where D is frozen for G's backward."""
    expected = dcgan(DROPS["optimizer"], freezes=True)
    assert all(torch.equal(one, other) for one, other in zip(dcgan(drop), expected, strict=True))


def test_adversaries_where_backward_updates():
    """The same loop with one backward for D, and D frozen for G's."""
    G, D = adversaries()  # noqa: N806
    trained = dcgan(DROPS["module"], freezes=True, apply="backward")
    assert not any(torch.equal(one, other) for one, other in zip(trained, [*weights(G), *weights(D)], strict=True))


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_what_waits_for_other_parameters_stays(drop):
    model, tracker, opt = attached(mlp(64), apply="step", max_grad_norm=1.0)
    x = torch.randn(4, 64)
    tracker(model(x).square().mean()).backward()
    kept = nn.ModuleList([model[0], model[4]])
    expected = torch.stack([opt.pending.gradients[r.index].squared_norm() for r in opt.records if "2." not in r.plan.name])
    if drop is DROPS["optimizer"]:
        opt.zero_grad()
        assert len(opt.pending) == 0
        return
    drop(nn.Sequential(model[2]), opt)
    before, still = weights(kept), weights(model[2])
    assert len(opt.pending) == 4
    opt.step()
    assert opt.grad_norm == pytest.approx(expected.sum().sqrt().item(), rel=1e-5)
    assert is_unchanged(model[2], still) and not is_unchanged(kept, before)


def test_layers_one_by_one_leave_nothing_behind():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    for layer in model:
        layer.zero_grad()
    assert len(opt.pending) == 0 and opt.pending.norm_proxy.parameter.grad is None


def test_what_a_module_dropped_counts_as_after_the_optimizers_own_zero_grad():
    """A step that overflowed under a GradScaler counts as skipped, whoever drops its gradients."""
    for drop in (DROPS["module"], DROPS["optimizer"]):
        model, tracker, opt = attached(apply="step")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(tracker(loss_of(model) * 1e38)).backward()
        scaler.step(opt)
        scaler.update()
        drop(model, opt)
        tracker(1.0)
        assert opt.skipped == 1


@CLASSES
def test_torchs_methods_are_back_after_the_last_detach():
    assert is_torchs_own()
    _, _, one = attached(apply="step")
    _, _, other = attached()
    one.detach()
    one.detach()
    assert not is_torchs_own() and nn.Module.zero_grad.__doc__ == TORCHS[0].__doc__
    other.detach()
    assert is_torchs_own()


@CLASSES
def test_torchs_methods_are_back_after_an_optimizer_that_was_dropped():
    model, _, opt = attached(apply="step")
    del opt
    assert is_torchs_own()


@CLASSES
def test_what_somebody_else_has_put_over_it_stays(monkeypatch):
    _, _, opt = attached(apply="step")
    ours, calls = nn.Module.zero_grad, []
    monkeypatch.setattr(nn.Module, "zero_grad", lambda self, *given: (calls.append(self), ours(self, *given)))
    opt.detach()
    model = mlp()
    loss_of(model).backward()
    model.zero_grad()
    assert calls == [model] and model[0].weight.grad is None
    monkeypatch.undo()
    gradlr.attach(mlp(), gradlr.LossTracker(), apply="step").detach()
    assert is_torchs_own()


@CLASSES
def test_copies_and_pickles_of_an_attached_model_have_a_zero_grad_of_their_own():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    for other in (copy.deepcopy(model), copy.copy(model[0]), pickle.loads(pickle.dumps(model))):
        assert "zero_grad" not in vars(other)
    copied = copy.deepcopy(model)
    loss_of(copied).backward()
    copied.zero_grad()
    assert copied[0].weight.grad is None and len(opt.pending) == 6


@pytest.mark.slow  # imports torch's compiler
@CLASSES
def test_a_compiled_models_zero_grad():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    torch.compile(model, backend="eager").zero_grad()
    assert len(opt.pending) == 0


def test_zero_grad_before_the_first_backward_says_nothing():
    model, tracker, opt = attached(apply="step")
    model.zero_grad()
    tracker(loss_of(model)).backward()
    opt.step()
    model.zero_grad()


def test_a_step_after_everything_was_dropped():
    model, tracker, opt = attached(apply="step")
    before = weights(model)
    tracker(loss_of(model)).backward()
    model.zero_grad()
    opt.step()
    assert is_unchanged(model, before)


def test_detach_after_zero_grad_drops_nothing():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    with pytest.warns(GradlrWarning, match="6 parameters"):
        opt.detach()
    _, tracker, opt = attached(model, apply="step")
    tracker(loss_of(model)).backward()
    model.zero_grad()
    opt.detach()


def test_the_norm_is_shown_once_after_a_module_has_dropped_all_that_waited():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, apply="step")
    count = len(opt.param_groups[-1]["params"])
    tracker(model(torch.ones(2, 4)).square().mean()).backward()
    model.zero_grad()
    assert len(opt.param_groups[-1]["params"]) == count
    tracker(model(torch.ones(2, 4)).square().mean()).backward()
    assert len(opt.param_groups[-1]["params"]) == count + 1
