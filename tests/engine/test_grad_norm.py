"""The norm of what waits, where stock tools look for it, and its limits."""

import pytest
import torch

from gradlr.engine.grad_norm import GradClipper, GradNormProxy

FORM = {"dtype": torch.float64, "device": torch.device("cpu")}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def gauge_of(*energies):
    gauge = GradNormProxy(**FORM)
    for key, energy in enumerate(energies):
        gauge.record(key, number(energy))
    return gauge


def test_the_gradient_of_its_parameter_is_the_global_norm():
    gauge = gauge_of(9.0, 16.0)
    assert gauge.parameter.grad.flatten().tolist() == pytest.approx([3.0, 4.0], rel=1e-15) and gauge.norm().item() == 5.0
    gauge.record(1, number(72.0))  # more has come for the second: its whole energy anew
    assert gauge.norm().item() == 9.0 and gauge.factor().item() == 1.0
    gauge.clear()
    assert gauge.parameter.grad is None and gauge.factor().item() == 1.0


@pytest.mark.parametrize("factor", [0.25, 2.0**-16, 3.0])
def test_what_was_done_to_it_is_read_off(factor):
    gauge = gauge_of(9.0, 16.0)
    gauge.parameter.grad.mul_(factor)
    assert gauge.factor().item() == factor
    assert gauge.norm().item() == 5.0 * factor


@pytest.mark.parametrize("energy", [0.0, 25.0, float("inf"), float("nan")])
@pytest.mark.parametrize("limit", [0.0, 3.5, 1.0, 4.5])
def test_only_cutting_by_value_is_uneven(energy, limit):
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
        gauge = gauge_of(energy)
        clip([gauge.parameter], limit)
        is_cut = clip is torch.nn.utils.clip_grad_value_ and energy == 25.0 and 0 < limit < 4  # the elements are 3 and 4
        assert bool(gauge.is_even()) is not is_cut
        assert gauge.is_touched


@pytest.mark.parametrize("energy", [0.0, float("inf")])
def test_a_norm_that_tells_nothing_changes_nothing(energy):
    gauge = gauge_of(energy)
    gauge.parameter.grad.mul_(0.5)
    assert gauge.factor().item() == 1.0


def test_a_gradient_that_is_not_finite_stays_visible():
    gauge = gauge_of(1.0, float("nan"))
    gauge.record(1, number(4.0))
    assert gauge.norm().isnan()


@pytest.mark.parametrize(("norm", "expected"), [(0.5, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_the_norm_is_limited_as_torch_does(norm, expected):
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    weight.grad = number([norm])
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    factor = GradClipper(max_norm=1.0).factor(number(norm)).item()
    assert factor == pytest.approx(expected, rel=2e-6)
    assert factor * norm == pytest.approx(weight.grad.item(), rel=1e-15)
