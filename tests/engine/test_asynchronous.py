"""Where the host runs ahead of the device: nothing waits, and what the device finds out is told at the next loss.

CPU tensors stand for a GPU's here (the fixture `asynchronous`). Most tests of the engine are run a second time in this mode
(`also_asynchronous`); these are for what differs.
"""

import copy
from contextlib import ExitStack

import pytest
import torch
from models import Mixed, attached, is_unchanged, loss_of, mlp, train, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradlr
from gradlr import BackwardError, GradlrWarning, NonFiniteError, tensors
from gradlr.gradient import Dense
from gradlr.linalg import bases
from gradlr.tensors import AsyncScalar

pytestmark = pytest.mark.usefixtures("asynchronous")


def spoiled(parameter, factor=float("nan")):
    """Multiplies the gradient until the handle is removed."""
    return parameter.register_hook(lambda gradient: gradient * factor)


def states_of(opt, but=()):
    """Copies of the state of all parameters; of those in `but` without the step count, which the host keeps."""
    return {
        record.plan.name: {
            key: value.clone()
            for key, value in opt.state[record.plan.parameter].items()
            if key != "step" or record.plan.name not in but
        }
        for record in opt.records
    }


def assert_same_states(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# -- losses ------------------------------------------------------------------------------------------------------------------


def test_the_ratio_follows_one_loss_late():
    tracker = gradlr.LossTracker()
    ratios = []
    for loss in (4.0, 2.0, 1.0):
        tracker(torch.tensor(loss))
        ratios.append(tracker.ratio)
    assert ratios == [1.0, 1.0, 0.5]
    assert tracker.state_dict()["history"] == [4.0, 2.0, 1.0] and tracker.ratio == 0.25  # there it is waited for


def test_a_loss_that_is_overwritten_later_counts_as_it_was_shown():
    tracker, loss = gradlr.LossTracker(), torch.tensor(4.0)
    tracker(loss)
    loss.zero_()
    assert tracker.recent(1) == [4.0]


@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_a_scaled_loss_is_told_at_the_next_loss(scale):
    model, tracker, opt = attached()
    (tracker(loss_of(model)) * scale).backward()
    opt.step()
    with pytest.raises(BackwardError, match="multiplied by.*The update has been applied"):
        tracker(loss_of(model))
    train(model, opt, tracker, 1)  # told once


# -- updates in backward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_bad_gradient_leaves_its_parameter_and_is_told_at_the_next_loss(bad, capture):
    model, tracker, opt = attached(capture=capture)
    train(model, opt, tracker, 2)
    before, states = weights(model), states_of(opt, but=["2.bias"])
    handle = spoiled(model[2].bias, bad)
    tracker(loss_of(model)).backward()
    opt.step()
    handle.remove()
    changed = {name for (name, now), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(old, now)}
    assert changed == {name for name, _ in model.named_parameters()} - {"2.bias"}
    assert_same_states(states["2.bias"], states_of(opt, but=["2.bias"])["2.bias"])
    with pytest.raises(NonFiniteError, match=r"'2\.bias' held NaN.*at loss number 3\. Told one loss late"):
        tracker(loss_of(model))
    train(model, opt, tracker, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_bad_gradient_is_told_when_a_checkpoint_is_asked_for():
    model, tracker, opt = attached()
    handle = spoiled(model[0].weight)
    tracker(loss_of(model)).backward()
    handle.remove()
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"):
        opt.state_dict()
    opt.state_dict()


class Failing(gradlr.rules.LowRankPolar):
    """The default rule, whose factorization does not converge while `is_failing`."""

    is_failing = False

    def update(self, gradient, state, context):
        if self.is_failing:
            raise torch.linalg.LinAlgError("no convergence")
        return super().update(gradient, state, context)


def test_a_factorization_that_fails_in_backward_is_a_gradient_that_is_not_finite():
    rule = Failing()
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False), rule=rule)
    before, states = weights(model), states_of(opt, but=["weight"])
    rule.is_failing = True
    tracker(loss_of(model)).backward()
    rule.is_failing = False
    assert is_unchanged(model, before)
    assert_same_states(states, states_of(opt, but=["weight"]))
    with pytest.raises(NonFiniteError, match="'weight'"):
        tracker(loss_of(model))


# -- whole steps -------------------------------------------------------------------------------------------------------------


def assert_left_out(model, tracker, opt, take_step):
    """`take_step` changes nothing, and that is told and counted at the next loss; the steps after it are taken."""
    before, states, skipped = weights(model), states_of(opt), opt.skipped
    take_step()
    assert is_unchanged(model, before) and opt.skipped == skipped
    with pytest.warns(GradlrWarning, match=r"the step was left out whole: .*told one loss late"):
        loss = tracker(loss_of(model))
    assert opt.skipped == skipped + 1
    assert_same_states(states, states_of(opt))  # the counts of steps as well
    loss.backward()
    opt.step()
    train(model, opt, tracker, 1)
    assert opt.skipped == skipped + 1
    assert not any(torch.equal(old, now) for old, now in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["0.weight", "4.bias"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"capture": "adaptor"}], ids=str)
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_bad_gradient_leaves_the_step_out_and_is_counted_at_the_next_loss(options, name):
    model, tracker, opt = attached(apply="step", **options)
    train(model, opt, tracker, 2)

    def take_step():
        handle = spoiled(dict(model.named_parameters())[name])
        tracker(loss_of(model)).backward()
        handle.remove()
        opt.step()

    assert_left_out(model, tracker, opt, take_step)


def test_a_bad_loss_leaves_the_step_out():
    model, tracker, opt = attached(apply="step")
    train(model, opt, tracker, 2)

    def take_step():
        tracker(loss_of(model) * float("nan")).backward()
        opt.step()

    assert_left_out(model, tracker, opt, take_step)


def test_one_bad_micro_batch_leaves_the_step_out():
    model, tracker, opt = attached(apply="step")
    train(model, opt, tracker, 2)

    def take_step():
        for factor in (1.0, float("inf"), 1.0):
            handle = spoiled(model[2].weight, factor)
            tracker(loss_of(model)).backward()
            handle.remove()
        opt.step()

    assert_left_out(model, tracker, opt, take_step)


def test_clipping_by_value_leaves_the_step_out():
    model, tracker, opt = attached(apply="step")
    train(model, opt, tracker, 2)

    def take_step():
        tracker(loss_of(model)).backward()
        nn.utils.clip_grad_value_([parameter for group in opt.param_groups for parameter in group["params"]], 1e-6)
        opt.step()

    assert_left_out(model, tracker, opt, take_step)


def test_a_factorization_that_fails_leaves_the_step_out():
    rule = Failing()
    model, tracker, opt = attached(rule=rule, apply="step")
    train(model, opt, tracker, 2)

    def take_step():
        tracker(loss_of(model)).backward()
        rule.is_failing = True
        opt.step()
        rule.is_failing = False

    assert_left_out(model, tracker, opt, take_step)


def test_a_checkpoint_knows_of_the_step_that_was_left_out():
    model, tracker, opt = attached(apply="step")
    train(model, opt, tracker, 2)
    handle = spoiled(model[0].weight)
    tracker(loss_of(model)).backward()
    handle.remove()
    opt.step()
    with pytest.warns(GradlrWarning, match="left out whole"):
        saved = opt.state_dict()
    assert opt.skipped == 1 and {int(state["step"]) for state in saved["state"].values()} == {2}


# -- gradients that are dropped ----------------------------------------------------------------------------------------------


def scaled_step(model, tracker, opt, scaler):
    opt.zero_grad()
    scaler.scale(tracker(loss_of(model))).backward()
    scaler.step(opt)
    scaler.update()


def test_the_step_after_an_overflow_of_the_scaler_is_taken():
    """The flags of the gradients that zero_grad() drops must not outlive them."""
    model, tracker, opt = attached(apply="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(model, tracker, opt, scaler)
    before, states = weights(model), states_of(opt)
    handle = spoiled(model[0].weight, float("inf"))
    scaled_step(model, tracker, opt, scaler)
    handle.remove()
    assert is_unchanged(model, before) and scaler.get_scale() == 2.0**9
    assert_same_states(states, states_of(opt))
    scaled_step(model, tracker, opt, scaler)
    assert not any(torch.equal(old, now) for old, now in zip(before, model.parameters(), strict=True))
    scaled_step(model, tracker, opt, scaler)
    assert opt.skipped == 1  # without a word: a scaler expects it
    assert {int(opt.state[parameter]["step"]) for parameter in model.parameters()} == {3}


def test_what_a_dropped_batch_held_is_forgotten():
    model, tracker, opt = attached(apply="step")
    shadow, shadow_tracker, shadow_opt = attached(apply="step")
    handle = spoiled(model[0].weight)
    tracker(loss_of(model)).backward()
    handle.remove()
    opt.zero_grad()
    for each in ((model, opt, tracker), (shadow, shadow_opt, shadow_tracker)):
        train(*each, 2)
    assert is_unchanged(model, weights(shadow))


# -- nothing waits -----------------------------------------------------------------------------------------------------------


class _NothingIsAsked(TorchDispatchMode):
    """Refuses operations that on CUDA ask the device themselves: for the size of their result, or whether they have succeeded."""

    asking = (
        "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_coalesce", "_linalg_check_errors",
        "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_lstsq",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in self.asking or (name in ("index", "index_put_") and any(_is_mask(one) for one in args[1])):
            raise AssertionError(f"aten::{name} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@pytest.fixture
def no_waiting(monkeypatch):
    """The host may read a tensor through `AsyncScalar` alone, and its own counts of steps."""
    is_allowed = []

    def guarded(method):
        def reading(tensor, *rest):
            is_count = tensor.dtype != torch.bool and not tensor.is_floating_point()
            if not (is_allowed or is_count):
                raise AssertionError(f"Tensor.{method.__name__} makes the host wait for the device")
            return method(tensor, *rest)

        return reading

    def allowed(method):
        def read(scalar):
            is_allowed.append(True)
            try:
                return method(scalar)
            finally:
                is_allowed.pop()

        return read

    for name in ("read", "read_all"):
        monkeypatch.setattr(AsyncScalar, name, allowed(getattr(AsyncScalar, name)))

    with ExitStack() as stack:

        def forbid():
            for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy"):
                monkeypatch.setattr(torch.Tensor, name, guarded(getattr(torch.Tensor, name)))
            stack.enter_context(_NothingIsAsked())

        yield forbid


@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.parametrize("options", [{}, {"apply": "step"}, {"apply": "step", "max_grad_norm": 1.0}], ids=str)
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_nothing_between_loss_and_step_waits_for_the_device(options, capture, no_waiting):
    model, tracker, opt = attached(mlp(64, 2), capture=capture, weight_decay=0.1, **options)
    x = torch.randn(8, 64)
    no_waiting()
    for _ in range(3):
        for _ in range(2 if "apply" in options else 1):
            tracker(model(x).square().mean()).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.parametrize("rule", ["low_rank_polar", "multi_normalized", "polar"])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_no_kind_of_parameter_waits(rule, capture, apply, no_waiting):
    """Tables, dense and sparse, convolution, norm, head; in half precision."""
    torch.manual_seed(0)
    model = Mixed()
    model.embedding = nn.Embedding(11, 8, sparse=capture == "hook")
    model, tracker, opt = attached(model.bfloat16(), capture=capture, apply=apply, rule=rule, rank=2, weight_decay=0.1)
    tokens = torch.arange(10).reshape(2, 5)
    no_waiting()
    for _ in range(2):
        tracker(model(tokens).square().mean()).backward()
        opt.step()


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_observing_waits_for_nothing(apply, capture, no_waiting):
    """Until the numbers are read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False))
    model, tracker, opt = attached(model, capture=capture, apply=apply)
    tokens = torch.arange(8)
    with opt.observe():
        no_waiting()
        for _ in range(2):
            tracker(model(tokens).square().mean()).backward()
            opt.step()
    assert all(record.metrics.update_norm is not None for record in opt.records)


def embedded():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)).double()


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("rule", ["rowwise_rmsprop", "adam"])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_rows_that_come_several_times_are_added_up_without_being_counted(rule, apply, monkeypatch):
    """Places that are left over hold the first row's number and zeros: they must not move it, nor its state."""
    monkeypatch.setattr(bases, "_WELL_CONDITIONED", float("inf"))  # where the host may look, two passes may be enough
    results = []
    for is_async in (True, False):
        with monkeypatch.context() as patch:
            if not is_async:
                patch.delitem(gradlr.tensors._OVERRIDES, "cpu")
            model, tracker, opt = attached(embedded(), capture="adaptor", apply=apply, kinds={"embedding": {"rule": rule}})
            for step in range(4):
                for _ in range(2 if apply == "step" else 1):
                    tracker(model(torch.tensor([step, 7, 7, 3])).square().mean()).backward()
                opt.step()
            results.append((weights(model), copy.deepcopy(opt.state_dict()["state"])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_updates_are_those_of_a_synchronous_device(monkeypatch):
    """Bit for bit, in every way of training, but for a third pass that a synchronous device may spare."""
    monkeypatch.setattr(bases, "_WELL_CONDITIONED", float("inf"))
    for options in ({}, {"apply": "step"}, {"apply": "step", "max_grad_norm": 0.1}, {"rule": "factor_moments"}):
        results = []
        for is_async in (True, False):
            with monkeypatch.context() as patch:
                if not is_async:
                    patch.delitem(gradlr.tensors._OVERRIDES, "cpu")
                model, tracker, opt = attached(**options)
                train(model, opt, tracker, 4)
                results.append((weights(model), copy.deepcopy(opt.state_dict()["state"])))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_entries_whose_products_overflow_leave_the_weight():
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False))
    before = weights(model)
    tracker(1.0)
    opt.receive(model.weight, Dense(torch.full((16, 16), 3e38)))
    assert is_unchanged(model, before)
    with pytest.raises(NonFiniteError, match="'weight'"):
        tracker(1.0)


class _WithoutFloat64(TorchDispatchMode):
    """A device that computes in float32 at most, as Apple's, refuses the rest."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            assert not (isinstance(one, torch.Tensor) and one.dtype == torch.float64), f"{func} gives float64"
        return result


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")
@pytest.mark.parametrize("capture", ["hook", "adaptor", "one_sided"])
@pytest.mark.parametrize("options", [{}, {"apply": "step"}, {"apply": "step", "max_grad_norm": 0.1}], ids=str)
def test_a_device_without_float64_meets_none(monkeypatch, options, capture):
    monkeypatch.setitem(tensors._OVERRIDES, "cpu", tensors.DeviceTraits(is_async=True, widest_float=torch.float32))
    model, tracker, opt = attached(mlp(16, 2), capture=capture, **options)
    with _WithoutFloat64():
        for _ in range(3):
            tracker(model(torch.randn(8, 16)).square().mean()).backward()
            opt.step()
    assert all(weight.isfinite().all() for weight in model.parameters())
