"""decide_rank and the schedules."""

import math

import pytest
import torch

import gradlr
from gradlr import ArgumentError, ByLoss, ByProgress, Fixed, LossError, RankInputs, decide_rank
from gradlr.ranks import round_rank


def notebook_decide_rank(loss, max_loss, max_rank, min_rank):
    return max(min_rank, int(loss / max_loss * max_rank))


@pytest.mark.parametrize("loss", [0.01, 0.4, 0.99, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(("max_rank", "min_rank"), [(8, 1), (16, 4), (1, 1)])
def test_it_is_the_notebooks_formula_up_to_the_maximal_loss(loss, max_rank, min_rank):
    assert decide_rank(loss, 2.0, max_rank, min_rank) == notebook_decide_rank(loss, 2.0, max_rank, min_rank)


def test_it_never_passes_the_maximal_rank():
    assert notebook_decide_rank(6.0, 2.0, 8, 1) == 24
    assert decide_rank(6.0, 2.0) == 8


def test_an_unknown_maximum_is_the_current_loss():
    assert decide_rank(0.3) == 8


@pytest.mark.parametrize(("loss", "max_loss", "rank"), [(0.0, None, 8), (0.0, 1.0, 1), (-1.0, 2.0, 1), (-1.0, -0.5, 8)])
def test_edges(loss, max_loss, rank):
    assert decide_rank(loss, max_loss) == rank


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_is_an_error(loss):
    with pytest.raises(LossError, match="finite"):
        decide_rank(loss, 1.0)


@pytest.mark.parametrize(("highest", "lowest"), [(4, 5), (4, 0), (0, 0)])
def test_ranks_out_of_order_are_an_error(highest, lowest):
    with pytest.raises(ArgumentError, match="min_rank"):
        decide_rank(1.0, 1.0, highest, lowest)


def test_ranks_move_in_steps_of_eight_and_stop_at_the_limit():
    assert [round_rank(rank, 30) for rank in (1, 7, 8, 9, 16, 17, 25)] == [1, 7, 8, 16, 16, 24, 30]


@pytest.mark.parametrize(("ratio", "rank"), [(1.0, 64), (0.5, 32), (0.51, 32), (0.55, 40), (0.05, 3), (0.0, 1)])
def test_by_loss(ratio, rank):
    assert ByLoss(64)(RankInputs(ratio, current=64, limit=128)) == rank


@pytest.mark.parametrize(("progress", "rank"), [(1.0, 80), (0.5, 64), (0.51, 64), (0.61, 72), (0.0, 40)])
def test_by_progress(progress, rank):
    assert ByProgress(80)(RankInputs(ratio=0.0, current=80, limit=128, progress=progress)) == rank
    assert ByProgress(80).ceiling(128) == 80 and ByProgress(80).ceiling(30) == 30


@pytest.mark.parametrize("highest", [1, 2, 3, 8, 9, 30])
def test_by_progress_keeps_half_of_the_rank(highest):
    ranks = [ByProgress(highest)(RankInputs(0.0, 1, 64, progress / 8)) for progress in range(9)]
    assert ranks == sorted(ranks) and ranks[0] >= highest / 2 and ranks[-1] == highest


def test_fractions_are_of_the_shorter_side():
    assert Fixed(0.25)(RankInputs(1.0, 1, limit=128)) == 32
    assert ByLoss(0.5, 0.25)(RankInputs(0.0, 1, limit=128)) == 32
    assert ByProgress(0.5)(RankInputs(0.0, 1, limit=128, progress=0.0)) == 32
    assert Fixed(64)(RankInputs(1.0, 1, limit=10)) == 10
    assert Fixed(0.001)(RankInputs(1.0, 1, limit=10)) == 1


@pytest.mark.parametrize("rank", [0, -3, 0.0, 1.5, True, "8", None])
@pytest.mark.parametrize("schedule", [Fixed, ByLoss, ByProgress])
def test_ranks_out_of_range_are_refused(schedule, rank):
    with pytest.raises(ArgumentError, match="rank"):
        schedule(rank)


@pytest.mark.parametrize(("rank", "given"), [(0.5, 32), (Fixed(0.25), 16), (ByLoss(0.25), 16), (ByProgress(0.5), 32)])
def test_a_fraction_is_one_of_the_matrix_at_every_step(rank, given):
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(torch.nn.Linear(64, 80), tracker, rank=rank)
    assert opt.records[0].rank == given
    tracker(1.0)
    assert opt.records[0].rank == given
