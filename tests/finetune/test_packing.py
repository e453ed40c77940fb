"""Packing: no token lost, none learned twice, and an order that depends on seed and step alone."""

import pytest
import torch

from gradlr import ArgumentError
from gradlr.apps.finetune.packing import (
    IGNORED,
    PackedTokens,
    Tokens,
    require_whole_sequence,
    sequences_of_step,
    split,
    steps_of_epochs,
)


def packed(*documents, length=4, padding=99):
    return PackedTokens([Tokens(list(ids), list(flags)) for ids, flags in documents], length, padding)


def plain(*ids):
    return ids, [True] * len(ids)


@pytest.mark.parametrize("count", range(2, 12))
def test_every_token_but_the_first_is_a_target_once(count):
    data = packed(plain(*range(count)))
    inputs, targets = data.batch(torch.arange(len(data)))
    assert inputs.shape == targets.shape == (len(data), 4)
    assert targets[targets != IGNORED].tolist() == list(range(1, count))
    assert torch.equal(inputs[targets != IGNORED] + 1, targets[targets != IGNORED])
    assert (data.size, data.learned) == (count, count - 1)
    assert inputs.flatten()[count:].eq(99).all()


def test_documents_follow_each_other_and_prompts_are_not_learned():
    data = packed(([1, 2, 3], [False, False, True]), ([4, 5], [False, True]), length=8)
    inputs, targets = data.batch(torch.tensor([0]))
    assert inputs[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert targets[0].tolist() == [IGNORED, 3, IGNORED, 5, *[IGNORED] * 4]


def test_sequences_without_anything_to_learn_are_left_out():
    data = packed(([0] * 9, [False] * 9), plain(1, 2, 3, 4))
    assert len(data) == 1
    assert data.batch(torch.tensor([0]))[1].tolist() == [[1, 2, 3, 4]]
    assert len(packed(([0] * 9, [False] * 9))) == 0


@pytest.mark.parametrize("data", [packed(plain(1, 2, 3, 4)), packed(([0] * 9, [False] * 9))])
def test_too_little_to_train_on_is_told_with_the_numbers(data):
    with pytest.raises(ArgumentError, match=rf"d\.txt: {data.size} tokens .*, {data.learned} of them .* takes 4 and one more"):
        require_whole_sequence(data, "d.txt")


def test_the_split_keeps_one_document_on_each_side_and_follows_the_seed():
    ours, theirs = split(100, 0.1, 0)
    assert sorted([*ours, *theirs]) == list(range(100)) and len(theirs) == 10
    assert ours == sorted(ours) and theirs == sorted(theirs)
    assert split(100, 0.1, 0) == (ours, theirs) != split(100, 0.1, 1)
    assert [len(part) for part in split(2, 0.01, 0)] == [1, 1] == [len(part) for part in split(2, 0.99, 0)]


def test_each_epoch_holds_every_sequence_once_in_an_order_of_its_own():
    steps = [sequences_of_step(7, 3, seed=1, step=step) for step in range(7)]
    epochs = torch.cat(steps).view(3, 7)
    assert all(torch.equal(epoch.sort().values, torch.arange(7)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(sequences_of_step(7, 3, seed=1, step=4), steps[4])  # whatever was asked for before
    assert not torch.equal(torch.cat([sequences_of_step(7, 3, seed=2, step=step) for step in range(7)]).view(3, 7)[0], epochs[0])


def test_a_step_may_be_larger_than_the_data():
    assert sequences_of_step(2, 5, seed=0, step=0).bincount().tolist() in ([3, 2], [2, 3])


@pytest.mark.parametrize(("epochs", "count", "size", "steps"), [(1, 10, 4, 3), (2, 10, 5, 4), (0.1, 10, 4, 1), (0.01, 10, 4, 1)])
def test_steps_of_epochs(epochs, count, size, steps):
    assert steps_of_epochs(epochs, count, size) == steps
