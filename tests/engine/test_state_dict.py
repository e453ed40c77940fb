"""state_dict: plain tensors, bit for bit, and refusals that name the parameter."""

import copy
import json

import pytest
import torch
from damage import damaged, is_refused, listed
from models import Mixed, attached, mlp, train
from torch import nn

import gradlr
from gradlr import CheckpointError

pytestmark = pytest.mark.also_asynchronous


def snapshot(model, opt, path):
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("rule", ["low_rank_polar", "factor_moments", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, apply, rule, dtype):
    options = {"apply": apply, "rule": rule, "rank": gradlr.ByLoss(8), "seed": 5}
    model, tracker, opt = attached(mlp(dtype=dtype), **options)
    train(model, opt, tracker, 3)
    saved = snapshot(model, opt, tmp_path / "checkpoint.pt")
    train(model, opt, tracker, 4, start=3)

    other, other_tracker, other_opt = attached(mlp(dtype=dtype, seed=9), **{**options, "seed": 0})
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["optimizer"])
    train(other, other_opt, other_tracker, 4, start=3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    one, two = opt.state_dict(), other_opt.state_dict()
    assert str(one["gradlr"]) == str(two["gradlr"])
    for index in one["state"]:
        assert one["state"][index].keys() == two["state"][index].keys()
        assert all(torch.equal(one["state"][index][key], two["state"][index][key]) for key in one["state"][index])


def test_state_is_plain_and_keeps_its_own_dtype():
    model, tracker, opt = attached(mlp(dtype=torch.bfloat16))
    train(model, opt, tracker, 1)
    state = opt.state_dict()
    opt.load_state_dict(copy.deepcopy(state))
    assert opt.state[model[0].weight]["P"].dtype == torch.float32
    assert all(isinstance(value, torch.Tensor) for entry in state["state"].values() for value in entry.values())


def test_learning_rates_come_back_with_the_checkpoint():
    model, tracker, opt = attached(lr=0.5)
    state = opt.state_dict()
    opt.param_groups[0]["lr"] = 0.1
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("saved_k", "loaded_k"), [(4, 2), (2, 4)])
def test_the_momentum_rank_may_differ(saved_k, loaded_k):
    model, tracker, opt = attached(mlp(), momentum_rank=saved_k, rank=8)
    train(model, opt, tracker, 3)
    state = opt.state_dict()
    saved = opt.state[model[0].weight]["P"]
    other, tracker, other_opt = attached(mlp(seed=2), momentum_rank=loaded_k, rank=4)
    other_opt.load_state_dict(state)
    loaded = other_opt.state[other[0].weight]["P"]
    kept = min(saved_k, loaded_k)
    assert loaded.shape == (16, loaded_k)
    assert torch.equal(loaded[:, :kept], saved[:, :kept])
    assert not loaded[:, kept:].any()
    train(other, other_opt, tracker, 2)


def test_the_rank_of_factor_moments_may_differ():
    model, tracker, opt = attached(rule="factor_moments", rank=8)
    train(model, opt, tracker, 2)
    other, tracker, other_opt = attached(rule="factor_moments", rank=3)
    other_opt.load_state_dict(opt.state_dict())
    assert other_opt.state[other[0].weight]["U"].shape == (16, 3)
    train(other, other_opt, tracker, 2)


def test_saving_in_the_middle_of_an_accumulation_is_refused():
    model, tracker, opt = attached(apply="step")
    tracker(model(torch.randn(4, 16)).square().mean()).backward()
    with pytest.raises(CheckpointError, match=r"6 gradients wait.*opt\.step\(\)"):
        opt.state_dict()
    opt.step()
    opt.state_dict()


def one_record(state):
    # Without the copy that torch.distributed.checkpoint finds.
    del state["param_groups"][0]["gradlr"]


def refusals():
    model, tracker, opt = attached(Mixed())
    good = opt.state_dict()

    def broken(change):
        state = copy.deepcopy(good)
        change(state)
        return state

    yield "no gradlr state", {"state": {}, "param_groups": []}, "no state_dict of gradlr"
    yield "fewer groups", broken(lambda s: s["param_groups"].pop()), "2 groups, this optimizer 3"
    yield "other names", broken(lambda s: s["param_groups"][0].update(param_names=["a", "b"])), "other parameters"
    yield "an empty gradlr entry", broken(lambda s: s.update(gradlr={})), "no state_dict of gradlr"
    yield "other kind", broken(lambda s: s["param_groups"][0].update(kind="vector")), "kind 'vector'"
    yield "another format", broken(lambda s: (one_record(s), s["gradlr"].update(version=99))), "format 99"
    yield "too few ranks", broken(lambda s: (one_record(s), s["gradlr"]["ranks"].pop())), "7 ranks"
    yield "two records", broken(lambda s: s["gradlr"].update(seed=3)), "two records .* differ"
    yield "a damaged record", broken(lambda s: (s.pop("gradlr"), s["param_groups"][0].update(gradlr="{"))), "losses is damaged"
    yield "no lr", broken(lambda s: s["param_groups"][1].pop("lr")), "lacks its 'lr'"
    yield "a vector of another length", broken(lambda s: s["state"][4].update(mean=torch.zeros(1))), "'mean'"
    yield "other rule", broken(lambda s: s["param_groups"][0].update(rule="adam")), "rule 'adam'"
    yield "state missing", broken(lambda s: s["state"].pop(1)), "'mix.weight'.*lacks"
    yield "entry missing", broken(lambda s: s["state"][0].pop("R")), "'conv.weight'.*R"
    yield "other shape", broken(lambda s: s["state"][1].update(P=torch.zeros(5, 2))), r"'mix.weight' \(8, 12\).*'P'.*\(5, 2\)"


@pytest.mark.parametrize(("state", "message"), [pytest.param(s, m, id=name) for name, s, m in refusals()])
def test_what_does_not_fit_is_refused_whole(state, message):
    model, tracker, opt = attached(Mixed())
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(CheckpointError, match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert str(after["param_groups"]) == str(before["param_groups"])


def test_the_tracker_comes_back_with_the_optimizer():
    model, tracker, opt = attached()
    train(model, opt, tracker, 3)
    other, other_tracker, other_opt = attached()
    other_opt.load_state_dict(opt.state_dict())
    assert other_tracker.history == tracker.history
    assert other_tracker.ratio == tracker.ratio


def test_frozen_layers_do_not_shift_the_state():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    _, tracker, opt = attached(model)
    tracker(model(torch.randn(4, 8)).square().mean()).backward()
    state = opt.state_dict()
    assert state["param_groups"][0]["param_names"] == ["1.weight"]


# -- a thousand damaged state_dicts ------------------------------------------------------------------------------------


@pytest.mark.synchronous("what is refused is refused before any device is asked")
@pytest.mark.parametrize("options", [{"rank": gradlr.ByLoss(4), "momentum_rank": 2}, {"rule": "factor_moments", "apply": "step"}])
def test_a_damaged_state_is_refused_whole_or_trains_on(options):
    def start():
        return attached(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5, bias=False)), **options)

    def one_step(model, tracker, opt):
        tracker(model(torch.ones(2, 8)).square().mean()).backward()
        opt.step()

    def everything(model, tracker, opt):
        return listed((opt.state_dict(), tracker.state_dict()))

    first, loaded = start(), start()
    one_step(*first)
    good, before = first[2].state_dict(), everything(*loaded)
    refused = taken = 0
    for path, index, state in damaged(good):
        if is_refused(lambda: loaded[2].load_state_dict(state)):  # noqa: B023 (called at once)
            refused += 1
            assert everything(*loaded) == before, (path, index)
        else:
            taken += 1
            one_step(*loaded)
            loaded = start()
            before = everything(*loaded)
    assert refused > 400 and taken < refused / 4


def test_an_empty_parameter_is_saved_and_loaded():
    model = nn.Sequential(nn.Linear(4, 4))
    model.empty = nn.Parameter(torch.zeros(0, 4))
    model, tracker, opt = attached(model)
    tracker(model(torch.ones(2, 4)).sum() + model.empty.sum()).backward()
    opt.load_state_dict(opt.state_dict())


def test_a_checkpoint_with_the_earlier_word_for_embeddings_is_loaded():
    model, _, opt = attached(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["kind"] = {"embedding": "table"}.get(group["kind"], group["kind"])
    opt.load_state_dict(saved)
    assert {group["kind"] for group in opt.param_groups} == {"embedding", "matrix", "vector"}


def of_format_1(saved, rate):
    """As gradlr wrote it when the rule was called TrackedMomentum and rates were in another unit."""
    saved["gradlr"] = {**saved["gradlr"], "version": 1}
    saved["param_groups"][0]["gradlr"] = json.dumps(saved["gradlr"])
    for group in saved["param_groups"]:
        group["lr"] = group["initial_lr"] = rate
        group["rule"] = group["rule"].replace("low_rank_polar", "tracked_momentum")
    return saved


@pytest.mark.parametrize("momentum_rank", [0, 2])
def test_a_checkpoint_of_format_1_is_loaded_without_its_rates(momentum_rank):
    model, tracker, opt = attached(momentum_rank=2)
    tracker(model(torch.ones(2, 16)).square().mean()).backward()
    saved = of_format_1(copy.deepcopy(opt.state_dict()), 0.016)
    _, _, fresh = attached(momentum_rank=momentum_rank, lr=3e-4)
    with pytest.warns(gradlr.GradlrWarning, match=r"0.016 \(kept: 0.0003\).*make a new one"):
        fresh.load_state_dict(saved)
    assert {group["lr"] for group in fresh.param_groups} == {3e-4}
    weight = fresh.records[0].plan.parameter
    assert fresh.state[weight]["step"] == 1
    assert (fresh.state[weight].keys() == {"step", "P", "R"}) == (momentum_rank == 2)
    assert fresh.param_groups[0]["rule"] == "low_rank_polar"
    assert fresh.state_dict()["gradlr"]["version"] == 3


def test_momentum_begins_at_zero_where_the_saved_run_had_none_and_ends_where_this_one_has_none():
    model, tracker, opt = attached(momentum_rank=0)
    tracker(model(torch.ones(2, 16)).square().mean()).backward()
    _, _, with_momentum = attached(momentum_rank=2)
    with_momentum.load_state_dict(opt.state_dict())
    state = with_momentum.state[with_momentum.records[0].plan.parameter]
    assert state["P"].shape == (16, 2) and not state["P"].any() and not state["R"].any() and state["step"] == 1
    _, _, without = attached(momentum_rank=0)
    without.load_state_dict(with_momentum.state_dict())
    assert without.state[without.records[0].plan.parameter].keys() == {"step"}


@pytest.mark.parametrize("key", ["P", "R"])
def test_half_a_momentum_is_damage(key):
    _, _, opt = attached(momentum_rank=2)
    saved = opt.state_dict()
    saved["state"][0] = {name: value for name, value in saved["state"][0].items() if name != key}
    with pytest.raises(gradlr.CheckpointError, match=f"lacks its state .{key}."):
        opt.load_state_dict(saved)


def test_the_earlier_name_of_the_rule_is_taken_and_told():
    with pytest.warns(gradlr.GradlrWarning, match="is called 'low_rank_polar'"):
        _, _, opt = attached(rule="tracked_momentum")
    assert opt.records[0].rule.name == "low_rank_polar"
    with pytest.warns(gradlr.GradlrWarning, match="is called 'low_rank_polar'"):
        assert gradlr.rules.TrackedMomentum is gradlr.rules.LowRankPolar
