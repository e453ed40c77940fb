"""Capture by hooks: the gradient is handed over once, and nothing is kept alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from gradlr.capture.hook import HookCapture
from gradlr.errors import AttachError
from gradlr.layers import View
from gradlr.params.kinds import ParameterPlan, plan_parameters


class Receiver:
    """Remembers what it was given, and whether the parameter still had it."""

    def __init__(self):
        self.received, self.kept = [], []

    def receive(self, parameter, gradient):
        self.received.append((parameter, gradient))
        self.kept.append(parameter.grad)


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def backward(model):
    model(torch.ones(5, 4)).square().sum().backward()


def ordinary_gradients(model):
    """What autograd alone leaves in `.grad`."""
    backward(model)
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return gradients


def test_every_gradient_is_handed_over_and_none_is_left():
    model, receiver = two_layers(), Receiver()
    expected = ordinary_gradients(model)
    capture = HookCapture(plan_parameters(model), receiver)
    backward(model)
    assert all(p.grad is None for p in model.parameters())
    found = dict(receiver.received)
    assert len(receiver.received) == 4 and all(grad is None for grad in receiver.kept)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(found[parameter].matrix, gradient)
    capture.remove()


def test_a_second_backward_is_handed_over_anew_not_accumulated():
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model), receiver)
    backward(model)
    backward(model)
    assert len(receiver.received) == 8
    first, second = (dict(receiver.received[start : start + 4]) for start in (0, 4))
    assert all(torch.equal(first[p].matrix, second[p].matrix) for p in model.parameters())
    capture.remove()


def test_several_uses_of_one_parameter_in_one_backward_arrive_as_their_sum():
    weight, receiver = nn.Parameter(torch.ones(3)), Receiver()
    capture = HookCapture([ParameterPlan("weight", weight, "vector", View())], receiver)
    (2 * weight.sum() + 3 * weight.sum()).backward()
    ((_, gradient),) = receiver.received
    assert torch.equal(gradient.matrix, torch.full((3,), 5.0))
    capture.remove()


def test_parameters_that_were_not_named_keep_their_gradients():
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model[0]), receiver)
    backward(model)
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model[1].parameters())
    capture.remove()


def test_a_second_capture_of_a_parameter_is_refused_by_name():
    model, first, second = two_layers(), Receiver(), Receiver()
    capture = HookCapture(plan_parameters(model[1]), first)
    with pytest.raises(AttachError, match=r"'1\.weight' is attached already"):
        HookCapture(plan_parameters(model), second)
    backward(model)
    assert len(first.received) == 2 and not second.received  # the refused one has registered nothing
    assert all(p.grad is not None for p in model[0].parameters())
    capture.remove()


def test_a_capture_that_fails_half_way_leaves_no_hook():
    weight, frozen, receiver = nn.Parameter(torch.ones(3)), torch.ones(3), Receiver()
    named = {"weight": weight, "frozen": frozen}
    with pytest.raises(RuntimeError, match="grad"):
        HookCapture([ParameterPlan(name, one, "vector", View()) for name, one in named.items()], receiver)
    weight.sum().backward()
    assert not receiver.received and weight.grad is not None


def test_remove_gives_back_ordinary_behaviour_and_may_be_repeated():
    model, receiver = two_layers(), Receiver()
    expected = ordinary_gradients(model)
    capture = HookCapture(plan_parameters(model), receiver)
    capture.remove()
    capture.remove()
    backward(model)
    assert not receiver.received
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), expected, strict=True))


def test_a_removed_capture_makes_room_for_another_and_does_not_touch_it_later():
    model, first, second, third = two_layers(), Receiver(), Receiver(), Receiver()
    former = HookCapture(plan_parameters(model), first)
    former.remove()
    latter = HookCapture(plan_parameters(model), second)
    former.remove()
    backward(model)
    assert not first.received and len(second.received) == 4
    with pytest.raises(AttachError, match="attached already"):
        HookCapture(plan_parameters(model), third)
    latter.remove()


def test_backward_without_the_receiver_says_what_to_do():
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model), receiver)
    del receiver
    gc.collect()
    with pytest.raises(AttachError, match=r"does not exist any more.*[Kk]eep it in a variable"):
        backward(model)
    capture.remove()


def test_an_error_of_the_receiver_reaches_the_caller_of_backward():
    class Failing(Receiver):
        def receive(self, parameter, gradient):
            raise ZeroDivisionError("from the receiver")

    model, receiver = two_layers(), Failing()
    capture = HookCapture(plan_parameters(model), receiver)
    with pytest.raises(ZeroDivisionError, match="from the receiver"):
        backward(model)
    capture.remove()


def test_a_dropped_capture_makes_room_for_another():
    model, first, second = two_layers(), Receiver(), Receiver()
    former = HookCapture(plan_parameters(model), first)
    del former
    latter = HookCapture(plan_parameters(model), second)
    backward(model)
    assert not first.received and len(second.received) == 4
    latter.remove()


def test_a_dropped_capture_in_a_reference_cycle_makes_room_too():
    class Optimizer(Receiver):
        def __init__(self, model):
            super().__init__()
            self.itself = self
            self.capture = HookCapture(plan_parameters(model), self)

    model = two_layers()
    gc.disable()  # so that only the capture itself can collect the cycle
    try:
        first = Optimizer(model)
        del first
        second = Optimizer(model)
    finally:
        gc.enable()
    backward(model)
    assert len(second.received) == 4
    second.capture.remove()


@pytest.mark.parametrize("runs_backward", [False, True])
def test_neither_model_nor_receiver_is_kept_alive(runs_backward):
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model), receiver)
    if runs_backward:
        backward(model)
    references = [weakref.ref(thing) for thing in (model, receiver, model[0].weight)]
    receiver.received.clear()
    del model, receiver
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    capture.remove()  # with its parameters gone


def test_the_hooks_do_not_keep_the_receiver_alive_while_the_model_lives():
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model), receiver)
    backward(model)
    reference, capture_reference = weakref.ref(receiver), weakref.ref(capture)
    del receiver, capture
    gc.collect()
    assert reference() is None and capture_reference() is None


def test_the_receiver_does_not_keep_the_model_alive():
    model, receiver = two_layers(), Receiver()
    capture = HookCapture(plan_parameters(model), receiver)
    references = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in references)
    capture.remove()
