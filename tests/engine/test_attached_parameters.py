"""Which parameters are trained, and what is told where the model no longer holds those that were attached."""

import copy
import gc

import pytest
import torch
from models import attached, loss_of, mlp, regression, train
from torch import nn

import gradlr
from gradlr import AttachError, GradlrWarning

pytestmark = pytest.mark.also_asynchronous


@pytest.mark.parametrize("replace", ["assign", "new"])
def test_parameters_replaced_since_attaching(replace):
    model, tracker, _ = attached()
    if replace == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[0].weight = nn.Parameter(torch.randn(16, 16))
    count = 6 if replace == "assign" else 1
    with pytest.raises(AttachError, match=f"{count} of 6 parameters were replaced since attach.*'0.weight' first"):
        tracker(loss_of(model))


@pytest.mark.parametrize("change", [lambda model: model.double(), lambda model: model.bfloat16()])
def test_another_dtype_since_attaching(change):
    model, tracker, _ = attached()
    change(model)
    with pytest.raises(AttachError, match=r"'0\.weight' was \(16, 16\) torch.float32 on cpu when it was attached and is"):
        tracker(1.0)


def test_an_unfrozen_or_new_parameter_is_told_once():
    model = mlp()
    model[0].weight.requires_grad_(False)
    _, tracker, opt = attached(model)
    train(model, opt, tracker, 1)
    model[0].weight.requires_grad_(True)
    with pytest.warns(GradlrWarning, match=r"1 trainable parameters of the model are not attached \('0\.weight' first\)"):
        tracker(loss_of(model))
    tracker(loss_of(model))


def test_a_submodule_taken_out_of_the_model_is_not_replaced():
    model, tracker, opt = attached()
    last = model[4]
    del model[4]
    tracker(last(model(torch.randn(4, 16))).square().mean()).backward()


def test_a_container_made_for_the_call_does_not_blind_the_check():
    encoder, decoder = mlp(), mlp(seed=1)
    _, tracker, opt = attached(nn.ModuleList([encoder, decoder]))
    gc.collect()
    tracker(1.0)
    decoder.load_state_dict(copy.deepcopy(decoder.state_dict()), assign=True)
    with pytest.raises(AttachError, match=r"6 of 12 parameters were replaced since attach \('1\.0\.weight' first\)"):
        tracker(1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "no values yet"),
        (nn.Linear(4, 4, device="meta"), "no values yet"),
        (nn.ParameterList([nn.Parameter(torch.randn(1, 4).expand(3, 4))]), "expanded view"),
    ],
)
def test_parameters_that_cannot_be_written_are_refused(model, message):
    with pytest.raises(AttachError, match=message):
        gradlr.attach(model, gradlr.LossTracker())


def test_groups_are_fixed_once_attached():
    _, _, opt = attached()
    with pytest.raises(gradlr.ArgumentError, match="fixed once attached"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_frozen_parameters_stay_and_unfrozen_ones_are_told():
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    _, tracker, opt = attached(model)
    x, y = regression(16)
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    with pytest.warns(GradlrWarning, match="not attached.*0.weight"):
        loss = tracker(nn.functional.mse_loss(model(x), y))
    loss.backward()
    assert torch.equal(model[0].weight, frozen)
    assert "0.weight" not in {record.plan.name for record in opt.records}


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_parameters_unused_in_a_step_stand_still(apply):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]).double()
    _, tracker, opt = attached(model, apply=apply)
    x = torch.randn(8, 5, dtype=torch.float64)

    def snapshot(layer):
        states = [{**opt.state[parameter], "parameter": parameter.detach()} for parameter in layer.parameters()]
        return [{key: value.clone() for key, value in state.items()} for state in states]

    for used in (0, 1, 0, 0):
        moving, still = snapshot(model[used]), snapshot(model[1 - used])
        tracker((model[used](x) - 1).square().mean()).backward()
        opt.step()
        for old, new in zip(still, snapshot(model[1 - used]), strict=True):
            assert all(torch.equal(old[key], new[key]) for key in old)
        for old, new in zip(moving, snapshot(model[used]), strict=True):
            assert not any(torch.equal(old[key], new[key]) for key in old)
    assert [int(opt.state[layer.weight]["step"]) for layer in model] == [3, 1]
