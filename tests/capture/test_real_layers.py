"""Adaptor capture in real networks: transformers' GPT-2 with its Conv1D, a convolutional net, and what "auto" makes of them."""

import copy

import pytest
import torch
from models import attached, checkpointing_switch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import gradlr
from gradlr.capture.layer_swap import SwappedLayer
from gradlr.rules import LowRankPolar

QUIET = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
PLAIN = {"rule": LowRankPolar(residual=0)}


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **options)).double()


def convolutional():
    torch.manual_seed(0)
    wide, pointwise = nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 1)
    grouped, head = nn.Conv2d(16, 16, 3, groups=4), nn.Linear(64, 10)
    return nn.Sequential(wide, nn.ReLU(), pointwise, nn.ReLU(), grouped, nn.Flatten(), head).double()


def language_loss(model, step):
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


def image_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.randint(10, (6,), generator=generator))


NETWORKS = {"gpt2": (gpt2, language_loss), "convolutional": (convolutional, image_loss)}


def fine_tune(name, steps=4, **options):
    make, loss_of = NETWORKS[name]
    model, tracker, opt = attached(make(), **PLAIN, **options)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        tracker(loss).backward()
        opt.step()
        losses.append(loss.item())
    return model, opt, losses


@QUIET
@pytest.mark.parametrize("name", list(NETWORKS))
def test_training_is_that_of_hook_capture(name):
    (wanted, _, losses), (found, _, found_losses) = fine_tune(name), fine_tune(name, capture="adaptor")
    # float64; products in another order, then eigenvectors of 4 x 4 matrices.
    assert found_losses == pytest.approx(losses, rel=1e-9)
    for one, other in zip(wanted.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@QUIET
@pytest.mark.sampled
@pytest.mark.parametrize("capture", ["adaptor", "one_sided", "auto"])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_training_lowers_the_loss_on_one_batch(name, capture, apply):
    make, loss_of = NETWORKS[name]
    model, tracker, opt = attached(make(), capture=capture, apply=apply, lr=3e-3, **PLAIN)
    losses = []
    for _ in range(25):
        loss = loss_of(model, 0)
        tracker(loss).backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@QUIET
def test_which_layer_got_which():
    _, opt, _ = fine_tune("gpt2", 1, capture="adaptor")
    captures = {record.plan.name: record.capture for record in opt.records}
    assert captures["transformer.wte.weight"] == "rows"  # its tied head adds to them through autograd
    assert captures["transformer.h.0.attn.c_attn.weight"] == "adaptor"
    assert captures["transformer.h.0.ln_1.weight"] == "hook"
    _, opt, _ = fine_tune("convolutional", 1, capture="one_sided")
    captures = {record.plan.name: record.capture for record in opt.records}
    assert captures["0.weight"] == captures["2.weight"] == captures["6.weight"] == "one_sided"
    assert captures["4.weight"] == "hook"  # grouped
    assert "one_sided" in repr(opt)


@QUIET
def test_transformers_layers_stay_what_they_were():
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, tracker, opt = attached(model, capture="adaptor")
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, SwappedLayer) and isinstance(layer, Conv1D)
    assert list(model.state_dict()) == list(before)
    copied = copy.deepcopy(model)
    assert type(copied.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(language_loss(copied, 0), language_loss(model, 0), rtol=1e-12, atol=0)
    opt.detach()
    assert not any(isinstance(module, SwappedLayer) for module in model.modules())


@QUIET
@pytest.mark.parametrize("capture", ["adaptor", "one_sided"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformers_own_checkpointing_gives_the_same_weights(use_reentrant, capture):
    results = []
    for is_checkpointed in (False, True):
        model = gpt2()
        if is_checkpointed:
            checkpointing_switch(model)({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model, tracker, opt = attached(model.train(), capture=capture, **PLAIN)
        for step in range(3):
            tracker(language_loss(model, step)).backward()
        results.append(model.transformer.h[0].mlp.c_fc.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@QUIET
@pytest.mark.parametrize("capture", ["adaptor", "one_sided"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_hook_on_a_weight_sees_and_changes_its_gradient(is_late, capture):
    results = []
    for kind in ("hook", capture):
        torch.manual_seed(0)
        layer, mask = nn.Linear(16, 8, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
        mask[:4] = 0
        if not is_late:
            layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        _, tracker, opt = attached(layer, capture=kind, **PLAIN)
        if is_late:
            layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        before = layer.weight.detach().clone()
        tracker(layer(torch.randn(5, 16, dtype=torch.float64)).square().mean()).backward()
        assert (layer.weight - before)[:4].abs().max() < 1e-12 < (layer.weight - before)[4:].abs().max()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@QUIET
def test_a_hook_that_comes_between_forward_and_backward_fires():
    results = []
    for capture in ("hook", "adaptor"):
        torch.manual_seed(0)
        layer, seen = nn.Linear(16, 8, dtype=torch.float64), []
        _, tracker, opt = attached(layer, capture=capture, **PLAIN)
        loss = tracker(layer(torch.randn(5, 16, dtype=torch.float64)).square().mean())
        layer.weight.register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
        loss.backward()
        results.append([layer.weight.detach(), *seen])
    assert len(results[0]) == 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@QUIET
def test_a_hook_that_comes_after_a_forward_that_kept_no_input_is_told():
    layer = nn.Linear(16, 8)
    _, tracker, _ = attached(layer, capture="one_sided", **PLAIN)
    loss = tracker(layer(torch.randn(5, 16)).square().mean())
    layer.weight.register_hook(lambda gradient: None)
    with pytest.raises(gradlr.BackwardError, match='register_hook or opt.detach.*capture="adaptor"'):
        loss.backward()


def test_a_module_with_an_attribute_called_original_is_no_layer_of_ours():
    class Odd(nn.Module):
        original = True

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    attached(Odd())[2].detach()


def test_ranks_for_which_hooks_would_be_faster_are_told():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.warns(gradlr.GradlrWarning, match=r"2 of the layers: '0.weight' \(64 x 64\) with rank 32.* rank of 16 at most"):
        attached(model, capture="adaptor", rank=32)[2].detach()
    with pytest.warns(gradlr.GradlrWarning, match=r"rank 17.* r\(m \+ 3n\) = 4,352 .* rank of 16 at most"):
        attached(model, capture="one_sided", rank=17)[2].detach()
    attached(model, capture="one_sided", rank=16)[2].detach()
    _, _, opt = attached(model, capture="auto", rank=32)
    assert {record.capture for record in opt.records} == {"hook"}


class CalledOperators(TorchDispatchMode):
    """Names of all operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket._qualified_op_name.split("::")[1])
        return function(*args, **(kwargs or {}))


# What waits for a CUDA device, or is slow there.
DECOMPOSITIONS = {"linalg_eigh", "_linalg_eigh", "linalg_qr", "_linalg_svd", "linalg_svd", "geqrf", "nonzero", "_unique2"}


@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_low_rank_polar_decomposes_nothing(apply, capture):
    """Products, Cholesky factors and triangular solves, as devices like them that must not wait."""
    called = {}
    for rule in ("low_rank_polar", "factor_moments"):
        model = nn.Sequential(nn.Embedding(70, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 70))
        options = {"apply": apply, "capture": capture, "rank": 8, "momentum_rank": 4}
        _, tracker, opt = attached(model, rule=rule, **options)
        with CalledOperators() as operators:
            tracker(model(torch.arange(9)).square().mean()).backward()
            opt.step()
        called[rule] = operators.names
    assert not called["low_rank_polar"] & DECOMPOSITIONS
    assert {"linalg_cholesky_ex", "linalg_solve_triangular"} <= called["low_rank_polar"]
    assert called["factor_moments"] & DECOMPOSITIONS  # the check sees them


@QUIET
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_convolutions_that_share_a_weight_keep_their_own_geometry(apply):
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)
    second.weight = first.weight
    model, x = nn.ModuleList([first, second]), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        expected = first(x) + second(x)
    attached(model, capture="adaptor", apply=apply, rank=2)
    torch.testing.assert_close(first(x) + second(x), expected)
