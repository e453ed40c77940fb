"""Torch's own clipping, and a package's, over parameters whose gradients are taken: told, or right."""

import subprocess
import sys
import textwrap

import pytest
import torch
from models import attached, is_unchanged, loss_of, mlp, weights
from torch import nn

from gradlr import ArgumentError, GradlrWarning

pytestmark = pytest.mark.also_asynchronous
MODES = pytest.mark.parametrize("apply", ["backward", "step"])


@MODES
@pytest.mark.parametrize("where", [nn.utils, nn.utils.clip_grad])
def test_value_clipping_over_the_models_parameters(apply, where):
    model, tracker, opt = attached(apply=apply)
    tracker(loss_of(model)).backward()
    before = weights(model)
    with pytest.raises(ArgumentError, match=r"clip_grad_value_ finds no gradient of '0.weight' \(6 parameters.*register_hook"):
        where.clip_grad_value_(model.parameters(), 0.1)
    with pytest.raises(ArgumentError, match=r"'2.weight' \(1 parameters"):
        where.clip_grad_value_(model[2].weight, 0.1)
    assert is_unchanged(model, before)
    opt.step()


@MODES
def test_norm_clipping_over_the_models_parameters_is_told_once(apply):
    model, tracker, opt = attached(apply=apply)
    for step in range(2):
        tracker(loss_of(model)).backward()
        if step:
            assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == 0
        else:
            with pytest.warns(GradlrWarning, match=r"clip_grad_norm_ finds no gradient of '0.weight' \(6.*max_grad_norm="):
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        opt.step()


def test_under_a_limit_nothing_is_told():
    model, tracker, opt = attached(apply="step", max_grad_norm=1.0)
    tracker(loss_of(model)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()


@MODES
def test_clipping_of_other_gradients_is_nobodys_business(apply):
    model, tracker, opt = attached(apply=apply)
    other = mlp(seed=1)
    tracker(loss_of(model)).backward()
    loss_of(other).backward()
    assert nn.utils.clip_grad_norm_(other.parameters(), 1e-3) > 1e-3
    nn.utils.clip_grad_value_(other.parameters(), 1e-6)
    assert max(parameter.grad.abs().max() for parameter in other.parameters()) <= 1e-6
    opt.step()


def test_gradients_by_hand_are_clipped_by_value_as_in_torch():
    results = []
    for is_late in (True, False):
        model, tracker, opt = attached(apply="step", momentum_rank=0)
        gradients = torch.autograd.grad(tracker(loss_of(model)), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient if is_late else gradient.clamp(-1e-3, 1e-3)
        if is_late:
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        opt.step()
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_value_clipping_by_hooks_is_the_way_out():
    model = mlp()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    _, tracker, opt = attached(model, apply="step")
    tracker(loss_of(model)).backward()
    assert opt.pending.norm_proxy.norm() <= 1e-3 * sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    opt.step()


def adaptive_clip_grad(parameters, clip_factor=0.01, eps=1e-3):
    """timm's AGC, to the letter."""

    def unitwise_norm(x):
        return x.norm(2) if x.ndim <= 1 else x.norm(2, dim=tuple(range(1, x.ndim)), keepdim=True)

    for p in parameters:
        if p.grad is None:
            continue
        p_data, g_data = p.detach(), p.grad.detach()
        max_norm = unitwise_norm(p_data).clamp_(min=eps).mul_(clip_factor)
        grad_norm = unitwise_norm(g_data)
        clipped_grad = g_data * (max_norm / grad_norm.clamp(min=1e-6))
        p.grad.detach().copy_(torch.where(grad_norm < max_norm, g_data, clipped_grad))


@pytest.mark.synchronous("the step is left out there, and told one loss late: test_asynchronous.py")
def test_adaptive_clipping_over_the_optimizers_parameters():
    model, tracker, opt = attached(apply="step")
    before = weights(model)
    tracker(loss_of(model)).backward()
    adaptive_clip_grad([parameter for group in opt.param_groups for parameter in group["params"]])
    with pytest.raises(ArgumentError, match="row by row.*adaptive_clip_grad.*Clip by norm instead"):
        opt.step()
    assert is_unchanged(model, before)


@pytest.mark.synchronous("what stands in torch's modules does not look at the device")
def test_torchs_functions_are_back_after_detach():
    # In a process of its own: optimizers of other tests may be alive.
    subprocess.run([sys.executable, "-c", textwrap.dedent(_BACK_AFTER_DETACH)], check=True)


_BACK_AFTER_DETACH = """
    from torch import nn
    import gradlr

    found = lambda: (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_, nn.utils.clip_grad.clip_grad_norm_)
    before = found()
    opt = gradlr.attach(nn.Linear(4, 4), gradlr.LossTracker())
    assert not set(before) & set(found()) and nn.utils.clip_grad_norm_.__doc__ == before[0].__doc__
    opt.detach()
    assert before == found()
"""
