"""What becomes of hooks when the model changes around them, and that nothing is left behind when it goes."""

import gc
from collections import Counter

import pytest
import torch
from models import attached, loss_of, mlp, regression, train
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import gradlr
from gradlr import AttachError, GradlrWarning


@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_a_model_that_is_compiled_as_a_whole_is_told_of_its_memory(how):
    model = mlp()
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.warns(GradlrWarning, match="compiled as a whole.*block by block"):
        _, tracker, opt = attached(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tracker(loss_of(model)).backward()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_compiling_the_whole_model_later_is_told_once():
    model, tracker, opt = attached()
    model.compile(backend="eager")
    with pytest.warns(GradlrWarning, match="compiled as a whole"):
        loss = tracker(loss_of(model))
    loss.backward()
    tracker(loss_of(model)).backward()


def test_blocks_that_are_compiled_are_no_trap():
    model = mlp()
    for layer in model:
        layer.compile(backend="eager")
    _, tracker, opt = attached(model)
    tracker(loss_of(model)).backward()


def test_weight_norm_applied_later_is_an_error():
    model, tracker, opt = attached()
    weight_norm(model[0])
    with pytest.raises(AttachError, match="'0.weight' first.*parametrize the model before attaching"):
        tracker(loss_of(model))


def test_torch_itself_refuses_to_swap_attached_parameters():
    """Where `.to()` swaps tensors instead of their data, a held hook makes it an error of torch's, before anything changes."""
    model, tracker, opt = attached()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="Couldn't swap Linear.weight"):
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(model, opt, tracker, 1)


def test_memory_that_is_given_up_is_an_error():
    model, tracker, opt = attached()
    model.to_empty(device="meta")
    with pytest.raises(AttachError, match="6 of 6 parameters were replaced since attach"):
        tracker(1.0)


@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, {"apply": "step"}, {"capture": "adaptor"}, {"capture": "one_sided"}], ids=str)
@pytest.mark.parametrize("ending", ["dropped", "detached", "interrupted"])
def test_twenty_models_leave_nothing_behind(options, ending):
    def cycle():
        model, tracker, opt = attached(mlp(64, 1), **options)
        scheduler = torch.optim.lr_scheduler.ConstantLR(opt)
        train(model, opt, tracker, 2)
        scheduler.step()
        if ending == "detached":
            opt.detach()
        if ending == "interrupted":
            tracker(loss_64(model))

    def alive():
        gc.collect()
        kinds = Counter(map(type, gc.get_objects()))  # by type: there are far more objects than types
        return sum(count for kind, count in kinds.items() if issubclass(kind, torch.Tensor | nn.Module | gradlr.GradLR))

    cycle()
    before = alive()
    for _ in range(20):
        cycle()
    assert alive() <= before


def loss_64(model):
    x, y = regression(64, count=16)
    return nn.functional.mse_loss(model(x), y)
