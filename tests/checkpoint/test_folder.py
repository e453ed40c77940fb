"""Folders of shards, in one process; tests/distributed writes them with several."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models import attached, mlp, train

import gradlr
from gradlr import CheckpointError
from gradlr.checkpoint.folder import write_folder

ALONE = SimpleNamespace(rank=0, group=None, assert_same_on_all_ranks=lambda told: None, tell_failure=lambda error: None)


@pytest.fixture
def saved(tmp_path):
    model, tracker, opt = attached(mlp(16, 3))
    train(model, opt, tracker, 2)
    checkpoint = {"gradlr": 1, "model": model.state_dict(), "optimizer": opt.state_dict(), "more": {"epoch": {"value": 3}}}
    write_folder(tmp_path / "run", checkpoint, ALONE)
    return tmp_path / "run", model, opt


def test_a_folder_is_loaded_by_one_process(saved):
    path, model, opt = saved
    other, tracker, other_opt = attached(mlp(16, 3, seed=1), momentum_rank=4)
    assert gradlr.load(path, model=other, optimizer=other_opt) == {"epoch": 3}
    assert all(map(torch.equal, model.parameters(), other.parameters())) and len(tracker.history) == 2
    for record, other_record in zip(opt.records, other_opt.records, strict=True):
        state, found = opt.state[record.plan.parameter], other_opt.state[other_record.plan.parameter]
        assert state.keys() == found.keys() and found["step"] == 2
        # The momentum has two columns more now.
        factors = {key: value for key, value in state.items() if value.ndim}
        assert all(torch.equal(value, found[key][..., : value.shape[-1]]) for key, value in factors.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(16, 2), r"has, unlike the model, '4.bias' \(2 in all\)"),
        (lambda: mlp(16, 4), r"lacks '6.bias' \(2 in all\)"),
        (lambda: mlp(8, 3), r"'0.weight' has shape \(16, 16\), the model's is \(8, 8\)"),
    ],
)
def test_another_model_is_named_and_nothing_is_changed(saved, make, message):
    other, _, opt = attached(make())
    before = copy.deepcopy(other.state_dict())
    for optimizer in (opt, None):
        with pytest.raises(CheckpointError, match=message):
            gradlr.load(saved[0], model=other, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
