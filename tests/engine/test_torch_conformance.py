"""What pytorch's own tests ask of every optimizer (test/test_optim.py and its table of optimizers), asked of GradLR."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Mixed, attached, is_unchanged, loss_of, mlp, train, weights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import gradlr
from gradlr import ArgumentError, CheckpointError

APPLY = pytest.mark.parametrize("apply", ["backward", "step"])


@pytest.fixture(scope="module")
def entries():
    """{"taken", "refused"}: (optimizer, description, options) of each entry of torch's table with counterparts here."""
    script = Path(__file__).with_name("torch_entries.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return {key: [(*names, read(options)) for *names, options in rows] for key, rows in json.loads(done.stdout).items()}


def read(options):
    if options is None:
        return None
    return {key: torch.tensor(one["tensor"]) if isinstance(one, dict) else one for key, one in options.items()}


def one_step(model, tracker, opt):
    tracker(loss_of(model)).backward()
    opt.step()


def everything(opt):
    state = opt.state_dict()
    return state["state"], [{key: str(value) for key, value in group.items()} for group in state["param_groups"]]


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1] == other[1]


def test_every_entry_of_torchs_table_trains_and_goes_on_from_its_state_dict(entries, tmp_path):
    inputs = {repr(options): options for _, _, options in entries["taken"] if options is not None}
    assert len(inputs) >= 15 and any(isinstance(one.get("lr"), torch.Tensor) for one in inputs.values())
    for options in inputs.values():
        for apply in ("backward", "step"):
            model, tracker, opt = attached(apply=apply, **options)
            given = options.get("lr", 1e-2)
            assert all(opt.defaults[key] == one for key, one in ({"lr": given} | options).items())
            one_step(model, tracker, opt)
            torch.save((model.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
            saved_weights, saved = torch.load(tmp_path / "saved.pt", weights_only=True)
            other, other_tracker, other_opt = attached(mlp(seed=3), apply=apply)
            other.load_state_dict(saved_weights)
            other_opt.load_state_dict(copy.deepcopy(saved))
            for _ in range(2):
                one_step(model, tracker, opt)
                one_step(other, other_tracker, other_opt)
            assert is_unchanged(other, weights(model)), options
            assert_same(everything(opt), everything(other_opt))


def test_every_refusal_of_torchs_table_is_one_here(entries):
    inputs = {repr(one): one for *_, one in entries["refused"] if one and repr(one) != "{'lr': 0.01}"}
    assert len(inputs) >= 5
    for options in inputs.values():
        with pytest.raises(ValueError, match="lr|weight_decay|beta"):
            attached(**options)


def test_complex_parameters_are_refused():
    with pytest.raises(gradlr.AttachError, match=r"complex \(torch\.complex64\)"):
        attached(nn.Linear(4, 4, dtype=torch.complex64))


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [float, np.float32, np.float64, torch.tensor, lambda x: torch.tensor([x]), lambda x: np.int64(1)]
)
@pytest.mark.parametrize("place", ["lr", "kinds", "groups", "weight_decay", "beta"])
def test_numbers_of_any_library_are_numbers(number, place):
    value = np.int64(0) if place == "beta" and float(number(0.0625)) == 1 else number(0.0625)
    results = []
    for given in (value, float(value)):
        options = {
            "kinds": {"kinds": {"vector": {"lr": given}}}, "groups": {"groups": [{"match": "0.*", "lr": given}]},
        }.get(place, {place: given})  # fmt: skip
        model, tracker, opt = attached(**options)
        one_step(model, tracker, opt)
        results.append(weights(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@APPLY
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor([x])])
def test_a_rate_may_be_written_as_any_number(apply, number, tmp_path):
    results = []
    for given in (number(0.25), 0.25):
        model, tracker, opt = attached(apply=apply)
        for group in opt.param_groups:
            group["lr"], group["weight_decay"], group["beta"] = given, given, given
        one_step(model, tracker, opt)
        results.append(weights(model))
        torch.save(opt.state_dict(), tmp_path / "saved.pt")
        opt.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
        assert float(opt.param_groups[0]["lr"]) == 0.25
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("lr", [torch.tensor([1e-3, 1e-3]), torch.tensor(-1e-3), torch.tensor(float("nan")), np.float32(-1), True,
                                torch.tensor(True), torch.tensor(1j), np.bool_(True), "1e-3", None])  # fmt: skip
def test_what_is_no_rate_is_refused(lr):
    with pytest.raises(ArgumentError, match="lr="):
        attached(lr=lr)


@APPLY
@pytest.mark.parametrize(("key", "value"), [("lr", float("nan")), ("lr", -1e-3), ("lr", float("inf")), ("lr", torch.tensor(-1.0)),
                                            ("beta", 1.0), ("weight_decay", -0.1), ("lr_scale", float("nan"))])  # fmt: skip
def test_a_rate_that_nothing_can_be_done_with_is_told_before_anything_changes(apply, key, value):
    model, tracker, opt = attached(apply=apply)
    before, good = weights(model), opt.param_groups[1][key]
    told = rf"'{key}' of group 'vector' is .*must lie in \[0"
    if apply == "backward":
        opt.param_groups[1][key] = value
        with pytest.raises(ArgumentError, match=told):
            tracker(loss_of(model))
    else:
        tracker(loss_of(model)).backward()
        opt.param_groups[1][key] = value
        with pytest.raises(ArgumentError, match=told):
            opt.step()
    assert is_unchanged(model, before)
    opt.param_groups[1][key] = good
    if apply == "backward":
        tracker(loss_of(model)).backward()
    opt.step()  # what waited has gone on waiting
    assert not is_unchanged(model, before)


def test_a_schedule_that_ends_a_rounding_below_zero_ends_at_zero():
    model, tracker, opt = attached()
    for group in opt.param_groups:
        group["lr"] = -1e-18
    before = weights(model)
    one_step(model, tracker, opt)
    assert is_unchanged(model, before)


@pytest.mark.parametrize("value", [-1, 0.0, float("nan"), "1"])
def test_a_limit_of_the_norm_that_is_none_is_told_where_it_is_written(value):
    _, _, opt = attached(apply="step", max_grad_norm=1.0)
    with pytest.raises(ArgumentError, match="max_grad_norm="):
        opt.clipper.max_norm = value
    assert opt.clipper.max_norm == 1.0
    opt.clipper.max_norm = None
    opt.clipper.max_norm = 2


def test_a_limit_of_the_norm_that_nothing_would_look_at_is_told_where_it_is_written():
    _, _, opt = attached(apply="backward")
    with pytest.raises(ArgumentError, match='attach with apply="step"'):
        opt.clipper.max_norm = 1.0
    opt.clipper.max_norm = None


# -- groups ------------------------------------------------------------------------------------------------------------


@APPLY
def test_a_group_with_a_rate_of_zero_stands_still(apply):
    model, tracker, opt = attached(apply=apply, groups=[{"match": "0.*", "lr": 0.0}])
    before = weights(model[0])
    train(model, opt, tracker, 2)
    assert is_unchanged(model[0], before) and not is_unchanged(model[2], weights(mlp()[2]))


@APPLY
def test_a_step_without_gradients_is_none(apply):
    model, tracker, opt = attached(apply=apply)
    before = weights(model)
    opt.step()
    tracker(loss_of(model) * 0).backward()  # gradients of zeros
    opt.step()
    assert is_unchanged(model, before)


@APPLY
def test_the_groups_hold_the_models_parameters_and_no_others_between_steps(apply):
    """Whoever walks them (Lightning's BaseFinetuning maps each one to its name) finds what `named_parameters` has."""
    model, tracker, opt = attached(Mixed(), apply=apply)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tokens = torch.arange(22).reshape(2, 11) % 11

    def walk():
        return [[names[parameter] for parameter in group["params"]] for group in opt.param_groups]

    expected = [group["param_names"] for group in opt.param_groups]
    for end in (opt.step, *([opt.zero_grad] if apply == "step" else []), opt.step, opt.detach):
        assert walk() == expected
        tracker(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())).backward()
        held = [parameter for group in opt.param_groups for parameter in group["params"]]
        assert len(held) == len(names) + (apply == "step")
        if end == opt.detach and apply == "step":
            with pytest.warns(gradlr.GradlrWarning, match="drops the gradients"):
                end()
        else:
            end()
    assert walk() == expected


def test_requires_grad_may_be_switched_over_the_groups_and_back():
    """As Lightning's toggle_optimizer does, while gradients wait as well."""
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    before = weights(model)
    for value in (False, True):
        for group in opt.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad = value
    opt.step()
    assert not is_unchanged(model, before)
    one_step(model, tracker, opt)


def test_groups_that_somebody_has_put_in_their_places_are_used():
    model, tracker, opt = attached()
    opt.param_groups = [{**group, "lr": 0.0} for group in opt.param_groups]
    before = weights(model)
    one_step(model, tracker, opt)
    assert is_unchanged(model, before)


# -- state -------------------------------------------------------------------------------------------------------------


@APPLY
@pytest.mark.parametrize("rule", ["low_rank_polar", "factor_moments", "adam"])
@pytest.mark.parametrize("way", ["clear", "replace", "pop"])
def test_state_that_was_cleared_is_made_anew(apply, rule, way):
    options = {"apply": apply, "rule": rule, "rank": 4}
    model, tracker, opt = attached(**options)
    train(model, opt, tracker, 3)
    if way == "clear":
        opt.state.clear()
    elif way == "replace":
        opt.state = type(opt.state)(dict)
    else:
        for parameter in list(opt.state):
            opt.state.pop(parameter)
    assert "6 parameters" in str(opt) and opt.report().totals["weights"] > 0
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    _, fresh_tracker, fresh_opt = attached(fresh, **options)
    for _ in range(2):
        one_step(model, tracker, opt)
        one_step(fresh, fresh_tracker, fresh_opt)
    assert is_unchanged(fresh, weights(model))
    assert {int(state["step"]) for state in opt.state.values()} == {2}
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@APPLY
def test_a_parameter_with_an_empty_axis_is_saved_and_loaded(shape, apply, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model.empty = nn.Parameter(torch.zeros(shape))
    model, tracker, opt = attached(model, apply=apply)
    tracker(model(torch.ones(2, 4)).sum() + model.empty.sum()).backward()
    opt.step()
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    gradlr.load(tmp_path / "run.pt", model=model, optimizer=opt)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("make", [lambda: nn.Embedding(4, 0), lambda: nn.Embedding(0, 4), lambda: nn.Linear(0, 4)])
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@APPLY
def test_a_layer_with_an_empty_axis_trains_and_loads(make, capture, apply):
    layer, like = make(), nn.Linear(4, 4)
    inputs = torch.ones(2, 0) if isinstance(layer, nn.Linear) else torch.zeros(0, dtype=torch.long)
    _, tracker, opt = attached(nn.ModuleList([layer, like]), capture=capture, apply=apply, rank=1, momentum_rank=0)
    tracker(layer(inputs).sum() + like(torch.ones(2, 4)).sum()).backward()
    opt.step()
    opt.load_state_dict(opt.state_dict())


def test_loading_twice_gives_the_same_and_leaves_what_was_given_alone():
    model, tracker, opt = attached()
    train(model, opt, tracker, 2)
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    for _ in range(2):
        opt.load_state_dict(saved)
        assert_same(everything(opt), (kept["state"], [{k: str(v) for k, v in group.items()} for group in kept["param_groups"]]))
        train(model, opt, tracker, 1)
    torch.testing.assert_close(saved["state"], kept["state"], rtol=0, atol=0)


# -- keys that schedulers and users keep in groups -----------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9, cycle_momentum=False),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 1e-3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", [True, False])
def test_a_state_dict_loads_whether_its_scheduler_was_made_before_or_after(name, before):
    model, tracker, opt = attached()
    scheduler = SCHEDULERS[name](opt) if before else None
    one_step(model, tracker, opt)
    saved, rate = opt.state_dict(), opt.param_groups[0]["lr"]
    _, _, other = attached()
    scheduler = SCHEDULERS[name](other) if not before else None
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == rate
    scheduler = scheduler or SCHEDULERS[name](other)
    other.step()
    scheduler.step()


def test_keys_of_the_users_own_go_with_a_group():
    model, tracker, opt = attached()
    opt.param_groups[0].update(name="trunk", tags=["a", 1], initial_lr=0.5)
    saved = opt.state_dict()
    _, _, other = attached()
    other.param_groups[1]["name"] = "biases"
    other.load_state_dict(saved)
    assert other.param_groups[0]["name"] == "trunk" and other.param_groups[0]["tags"] == ["a", 1]
    assert other.param_groups[1]["name"] == "biases"
    saved["param_groups"][0]["tags"].append(2)  # no part of the optimizer
    assert other.param_groups[0]["tags"] == ["a", 1]
    opt.load_state_dict(attached()[2].state_dict())
    assert opt.param_groups[0]["name"] == "trunk"


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_around_state_dict_see_the_whole_and_what_they_return_counts():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    seen = []
    opt.register_state_dict_pre_hook(lambda optimizer: seen.append(len(optimizer.state)))

    def note(optimizer, state_dict):
        seen.append((len(state_dict["state"]), sorted(state_dict), int(state_dict["state"][0]["step"])))
        state_dict["note"] = "in place"

    opt.register_state_dict_post_hook(note)
    opt.register_state_dict_post_hook(lambda optimizer, state_dict: {**state_dict, "more": 1})
    opt.register_state_dict_post_hook(lambda optimizer, state_dict: seen.append("first"), prepend=True)
    saved = opt.state_dict()
    assert seen == [6, "first", (6, ["gradlr", "param_groups", "state"], 1)]
    assert (saved["note"], saved["more"]) == ("in place", 1)
    opt.load_state_dict(saved)


def test_hooks_around_load_state_dict_see_the_whole_and_what_they_return_counts():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    saved = opt.state_dict()
    _, _, other = attached()
    seen = []

    def halve(optimizer, state_dict):
        seen.append((len(state_dict["state"]), int(state_dict["state"][0]["step"])))
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def rename(optimizer, state_dict):
        state_dict["renamed"] = state_dict.pop("state")  # of a copy: what was given stays as it was
        state_dict["state"] = state_dict.pop("renamed")

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_pre_hook(rename, prepend=True)
    first = other.records[0].plan.parameter
    other.register_load_state_dict_post_hook(lambda optimizer: seen.append(int(optimizer.state[first]["step"])))
    other.load_state_dict(saved)
    assert seen == [(6, 1), 1]
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] / 2
    assert set(saved) == {"state", "param_groups", "gradlr"}


def test_what_a_hook_makes_unfit_is_refused_whole():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    saved, before = opt.state_dict(), everything(opt)
    opt.register_load_state_dict_pre_hook(lambda optimizer, state_dict: {**state_dict, "state": {}})
    with pytest.raises(CheckpointError, match="lacks its state"):
        opt.load_state_dict(saved)
    assert_same(everything(opt), before)


@APPLY
def test_hooks_around_step_run_in_order(apply):
    model, tracker, opt = attached(apply=apply)
    seen = []
    pre = opt.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append("pre"))
    post = opt.register_step_post_hook(lambda optimizer, args, kwargs: seen.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        one_step(model, tracker, opt)
    finally:
        for handle in (pre, post, everywhere):
            handle.remove()
    assert seen == ["pre", "post", "everywhere"]
    one_step(model, tracker, opt)
    assert len(seen) == 3
