"""Which parameters are trained, and what is told where the model no longer holds those that were attached."""

import copy
import gc

import pytest
import torch
from models import attached, loss_of, mlp, train
from torch import nn

import gradlr
from gradlr import AttachError, GradlrWarning


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
