"""What runs in each process of tests/distributed/test_replicated.py: one function per check, called alike on every rank."""

import copy
import math
import os
import signal
import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from models import Mixed, mlp
from processes import Checks
from torch import distributed, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import gradlr
from gradlr import tensors
from gradlr.attach import DEFAULT_LR, DEFAULT_MOMENTUM_RANK, DEFAULT_RANK
from gradlr.distributed.first_round import form_of
from gradlr.gradient import Dense

# Rounding of float64, grown over a few steps of orthogonalized updates.
AGREEMENT = {"rtol": 1e-6, "atol": 1e-6}
# The same where nothing is orthogonalized.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

check = Checks()
_alone = []


def alone():
    """A group of this process only: the reference."""
    if not _alone:
        groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
        _alone.append(groups[distributed.get_rank()])
    return _alone[0]


def mixed(seed=0):
    torch.manual_seed(seed)
    return Mixed().double()


def attach(model, group=None, **options):
    options = {"lr": 1e-2, "rank": 2, "momentum_rank": 1, "apply": "step"} | options
    tracker = gradlr.LossTracker()
    group = distributed.group.WORLD if group is None else group
    return tracker, gradlr.attach(model, tracker, process_group=group, **options)


def tokens_of(step, count=8):
    return torch.randint(11, (count, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model, tracker, opt, steps, *, part=slice(None), micro=1, start=0, parts=1):
    """Next-token loss on a global batch of eight sequences, of which this process sees a part.

    Or all `parts`, where it stands for as many processes: each of its micro-batches is one of each of theirs.
    """
    for step in range(start, start + steps):
        chunks = [tokens.chunk(micro) for tokens in tokens_of(step)[part].chunk(parts)]
        for some in zip(*chunks, strict=True):
            (tracker(loss_of(model, torch.cat(some))) / micro).backward()
        opt.step()


def part_of(rank, size, count=8):
    return slice(rank * count // size, (rank + 1) * count // size)


def assert_same_everywhere(model):
    """Bitwise, over all processes."""
    own = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
    everything = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everything, own)
    assert all(torch.equal(one, own) for one in everything)


def assert_like(model, reference, agreement=AGREEMENT):
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, **agreement, msg=lambda tale, name=name: f"{name}: {tale}")


def attach_alone(model, **options):
    """Without a group: as one process trains."""
    options = {"lr": 1e-2, "rank": 2, "momentum_rank": 1, "apply": "step"} | options
    tracker = gradlr.LossTracker()
    with warnings.catch_warnings():  # several processes run, and this model is one process' own
        warnings.filterwarnings("ignore", "[0-9]+ processes run", gradlr.GradlrWarning)
        return tracker, gradlr.attach(model, tracker, **options)


def compare_with_one_process(rank, size, /, *, micro=1, agreement=AGREEMENT, kind=mixed, is_in_group=False, **options):
    """With one that has no group; or with a group of one, which has the norms of sketches, and the same one-sided bases."""
    model, reference = kind(seed=rank), kind()
    tracker, opt = attach(model, **options)
    train(model, tracker, opt, 8, part=part_of(rank, size), micro=micro)
    reference_tracker, reference_opt = (
        attach(reference, alone(), **options) if is_in_group else attach_alone(reference, **options)
    )
    train(reference, reference_tracker, reference_opt, 8, parts=size, micro=micro)
    assert_same_everywhere(model)
    assert_like(model, reference, agreement)
    if micro == 1:  # of several losses the ratio is that of their mean, or of the last
        assert math.isclose(tracker.ratio, reference_tracker.ratio, rel_tol=1e-6)
    assert not any(map(torch.equal, reference.parameters(), kind().parameters()))
    if is_in_group and opt.grad_norm is not None:
        assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)
    return opt


@check(2, 4)
def hooks_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, rank=1)
    assert f"processes={size}" in repr(opt)
    # They exchange sketches, not gradients, of both matrices.
    assert [form_of(record) for record in opt.records if record.plan.kind == "matrix"] == ["sketch", "sketch"]


@check(2, 4)
def the_defaults_equal_one_process(rank, size):
    """`attach` as it is called without options, on matrices that wait whole and, at a smaller rank, as sketches."""
    defaults = {"lr": DEFAULT_LR, "momentum_rank": DEFAULT_MOMENTUM_RANK, "agreement": CLOSE}
    opt = compare_with_one_process(rank, size, rank=DEFAULT_RANK, **defaults)
    assert {form_of(record) for record in opt.records if record.plan.kind == "matrix"} == {"entries"}
    opt = compare_with_one_process(rank, size, rank=gradlr.ByProgress(2), **defaults)
    assert {form_of(record) for record in opt.records if record.plan.kind == "matrix"} == {"sketch"}


@check(2)
def accumulation_equals_one_process(rank, size):
    """Each micro-batch with one of each other process; the first one gives the directions."""
    compare_with_one_process(rank, size, micro=2)
    compare_with_one_process(rank, size, micro=2, momentum_rank=0)
    compare_with_one_process(rank, size, micro=2, is_in_group=True, max_grad_norm=0.5)


@check(2, 4)
def adaptors_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, capture="adaptor", weight_decay=0.1)
    assert {record.capture for record in opt.records} == {"adaptor", "rows", "hook"}


@check(2)
def one_sided_layers_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, is_in_group=True, capture="one_sided", micro=2)
    assert "one_sided" in {record.capture for record in opt.records}


@check(2)
def other_rules_equal_one_process(rank, size):
    compare_with_one_process(
        rank, size, rule=gradlr.rules.FactorMoments(newton_schulz_dtype=torch.float64), kinds={"embedding": {"rule": "adam"}}
    )


@check(2)
def normalized_gradients_equal_one_process(rank, size):
    """Of the whole sum: nothing is orthogonalized, so that rounding hardly grows."""
    compare_with_one_process(rank, size, rule="multi_normalized", micro=2, agreement=CLOSE)


@check(2)
def narrow_weights_and_sparse_rows_stay_equal(rank, size):
    """Stochastic rounding draws the same numbers everywhere; an observed process makes the same steps as the others."""
    torch.manual_seed(0)
    model = Mixed()
    model.embedding = nn.Embedding(11, 8, sparse=True)
    model = model.bfloat16()
    tracker, opt = attach(model, weight_decay=0.1)
    if rank == 1:
        opt.observe()
    train(model, tracker, opt, 5, part=part_of(rank, size))
    assert_same_everywhere(model)
    assert str(opt.report())
    assert all(int(opt.state[record.plan.parameter]["step"]) == 5 for record in opt.records)


@check(2)
def full_rank_sees_the_whole_gradient(rank, size):
    """Where sketches would be larger than gradients, these are exchanged: the update is that of one process without a group."""
    model, reference = mixed(seed=rank), mixed()
    tracker, opt = attach(model, rank=8, momentum_rank=2)
    train(model, tracker, opt, 5, part=part_of(rank, size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradlr.GradlrWarning)
        tracker = gradlr.LossTracker()
        opt = gradlr.attach(reference, tracker, lr=1e-2, rank=8, momentum_rank=2, apply="step")
    train(reference, tracker, opt, 5)
    assert_like(model, reference)


class Layers(nn.Module):
    """Four matrices that are worth sketching, the first of which is made last."""

    def __init__(self):
        super().__init__()
        self.third, self.second, self.first, self.other = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def layers(seed=0):
    torch.manual_seed(seed)
    return Layers().double()


def compare_steps(rank, size, backward, /, *, steps=4, agreement=CLOSE, **options):
    """With one process on the whole batch; `backward(model, tracker, x)` is all that a step does before `opt.step()`."""
    model, reference = layers(seed=rank), layers()
    options = {"momentum_rank": 0} | options
    ways = [
        (model, *attach(model, **options), part_of(rank, size)),
        (reference, *attach_alone(reference, **options), slice(None)),
    ]
    for step in range(steps):
        x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for way, tracker, opt, part in ways:
            backward(way, tracker, x[part])
            # Whoever logs the mean of something does so between backward and step.
            distributed.all_reduce(torch.ones(1))
            opt.step()
    assert_same_everywhere(model)
    assert_like(model, reference, agreement)
    assert not torch.equal(model.first.weight, layers().first.weight)
    counts = [[int(opt.state[record.plan.parameter]["step"]) for record in opt.records] for _, _, opt, _ in ways]
    assert counts[0] == counts[1]


def _one_loss(model, tracker, x):
    tracker(mse_loss(model(x), x)).backward()


def _two_losses(model, tracker, x):
    """Each of other layers."""
    tracker(mse_loss(model(x), x)).backward()
    tracker(mse_loss(model.other(x), x)).backward()
    tracker(mse_loss(model.other(x), -x)).backward()


def _nothing_first(model, tracker, x):
    """An empty micro-batch, whose gradients are zeros."""
    tracker(0 * mse_loss(model(x), x)).backward()
    for target in (x, -x):
        tracker(mse_loss(model(x), target)).backward()


def _one_weight_twice(model, tracker, x):
    tracker(mse_loss(model.other(torch.tanh(model.other(model(x)))), x)).backward()


def _checkpointed(model, tracker, x):
    """Each call runs a backward of its own, inside the first one."""
    inside = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    tracker(mse_loss(model.other(inside), x.detach())).backward()


@check(2, 4)
def directions_are_those_of_the_whole_batch(rank, size):
    """Whatever the order and number of backwards, and whichever gradients come out of turn."""
    for backward in (_one_loss, _two_losses, _nothing_first, _checkpointed):
        compare_steps(rank, size, backward)
    for backward in (_one_loss, _two_losses, _nothing_first, _one_weight_twice):
        compare_steps(rank, size, backward, capture="adaptor")
    compare_steps(rank, size, _two_losses, momentum_rank=1, agreement=AGREEMENT)


@check(2)
def directions_where_the_host_runs_ahead(rank, size):
    """The rank follows one loss late, as in one process, and nothing is asked of the device before the end of backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tensors._OVERRIDES, "cpu", tensors.DeviceTraits(is_async=True, widest_float=torch.float64))
        for backward in (_one_loss, _two_losses, _nothing_first):
            compare_steps(rank, size, backward)
        compare_steps(rank, size, _one_loss, rank=gradlr.ByLoss(3), agreement=AGREEMENT)


@check(2)
def the_rank_follows_progress_as_in_one_process(rank, size):
    """Step by step, the mean of several losses in one; and on a rank that has no loss to show at all."""
    ranks, model, reference = ([], []), layers(seed=rank), layers()
    options = {"rank": gradlr.ByProgress(3), "momentum_rank": 0, "lr": 1e-2}
    ways = [
        (model, *attach(model, **options), part_of(rank, size)),
        (reference, *attach_alone(reference, **options), slice(None)),
    ]
    x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(40):  # rounding errors grow by two thirds a step here
        for (way, tracker, opt, part), seen in zip(ways, ranks, strict=True):
            for target in (x, x.roll(1, dims=1)):
                tracker(mse_loss(way(x[part]), target[part])).backward()
            seen.append([record.rank for record in opt.records])
            opt.step()
    assert ranks[0] == ranks[1]
    assert len({tuple(one) for one in ranks[0]}) > 1
    assert_like(model, reference)
    _, tracker, opt, part = ways[0]
    for step in range(20):
        if rank == 0 or step % 3:
            _one_loss(model, tracker, x[part])
        opt.step()
        own = torch.tensor([record.rank for record in opt.records])
        everywhere = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(everywhere, own)
        assert all(torch.equal(one, own) for one in everywhere)
    assert_same_everywhere(model)


@check(2)
def gradients_that_are_dropped_spoil_no_step(rank, size):
    """On all ranks, or on one: the directions stay those of the first backward until the step, and are finite."""
    model = layers()
    tracker, opt = attach(model, momentum_rank=0)
    x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for factor, drops in ((math.nan, True), (1.0, True), (1.0, rank == 1), (1.0, False)):
        before = copy.deepcopy(model.state_dict())
        tracker(factor * mse_loss(model(x), x)).backward()
        if drops:
            opt.zero_grad()
        _one_loss(model, tracker, x)
        opt.step()
        assert_same_everywhere(model)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert not torch.equal(before["first.weight"], model.first.weight)
    assert opt.skipped == 1


def _step_and_show(opt, tracker):
    opt.step()
    tracker(1.0)  # on a device that runs behind the host, the skip is told here


@check(2)
def products_that_overflow_skip_the_step_on_all(rank, size):
    """Every entry is finite, and so is every loss: nobody knows before the first round."""
    for is_async in (False, True):
        model = layers().float()
        with pytest.MonkeyPatch.context() as patch:
            if is_async:
                patch.setitem(tensors._OVERRIDES, "cpu", tensors.DeviceTraits(is_async=True, widest_float=torch.float64))
            tracker, opt = attach(model, momentum_rank=0)
            before = copy.deepcopy(model.state_dict())
            tracker(1.0)
            opt.receive(model.first.weight, Dense(torch.full((16, 16), 3e38 if rank == 1 else 1.0)))
            with pytest.warns(gradlr.GradlrWarning, match="left out whole"):
                _step_and_show(opt, tracker)
            assert opt.skipped == 1
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@check(2)
def float32_weights_equal_those_of_one_process(rank, size):
    """To the rounding of sums in another order: an update's last digits, of which a weight sees a few thousandths."""
    model, reference = layers(seed=rank).float(), layers().float()
    options = {"lr": DEFAULT_LR, "rank": gradlr.ByProgress(3), "momentum_rank": DEFAULT_MOMENTUM_RANK}
    ways = [
        (model, *attach(model, **options), part_of(rank, size)),
        (reference, *attach_alone(reference, **options), slice(None)),
    ]
    for step in range(10):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for way, tracker, opt, part in ways:
            _one_loss(way, tracker, x[part])
            opt.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


class Branches(nn.Module):
    """Three ways, of which a batch takes one."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x, way):
        return self.norm(self.ways[way](x))


@check(2, 4)
def parameters_may_be_unused(rank, size):
    """Rank 0 goes one way, the others another; the third way nobody."""
    torch.manual_seed(0)
    model = Branches().double()
    tracker, opt = attach(model, rank=1)
    assert {form_of(record) for record in opt.records if record.plan.kind == "matrix"} == {"sketch"}
    untouched = copy.deepcopy(model.ways[2].state_dict())
    for step in range(4):
        x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        tracker(mse_loss(model(x, min(rank, 1)), x)).backward()
        distributed.all_reduce(torch.ones(1))  # of the user's own: no rank may wait for another one's step
        opt.step()
    assert_same_everywhere(model)
    assert all(torch.equal(value, untouched[key]) for key, value in model.ways[2].state_dict().items())
    steps = {record.plan.name: int(opt.state[record.plan.parameter]["step"]) for record in opt.records}
    assert steps["ways.0.weight"] == steps["ways.1.weight"] == 4
    assert steps["ways.2.weight"] == steps["ways.2.bias"] == 0


@check(2)
def a_process_without_batches_counts_as_zero(rank, size):
    """It still calls step(); the reference divides its loss by the number of processes."""
    model, reference = mixed(), mixed()
    tracker, opt = attach(model)
    reference_tracker, reference_opt = attach(reference, alone())
    for step in range(3):
        tokens = tokens_of(step)
        if rank == 0:
            tracker(cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())).backward()
        opt.step()
        loss = cross_entropy(reference(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        (reference_tracker(loss) / size).backward()
        reference_opt.step()
    assert_same_everywhere(model)
    assert_like(model, reference)
    assert tracker.ratio == pytest.approx(reference_tracker.ratio, rel=1e-12)


@check(2)
def values_come_from_the_first_rank(rank, size):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).bfloat16().requires_grad_(False))
    model[0].weight.data = torch.randn(6, 5).t()
    model[1].running_mean.fill_(rank)
    model[1].num_batches_tracked.fill_(3 + rank)
    attach(model)
    assert_same_everywhere(model)
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).bfloat16())
    assert torch.equal(model[2].weight, expected[2].weight)
    assert model[1].running_mean.eq(0).all() and model[1].num_batches_tracked == 3


@check(2, 4)
def one_process_with_nan_skips_the_step_on_all(rank, size):
    model = mixed()
    tracker, opt = attach(model)
    train(model, tracker, opt, 1, part=part_of(rank, size))
    before, latest = copy.deepcopy(model.state_dict()), tracker.state_dict()["latest"]
    states = copy.deepcopy([opt.state[record.plan.parameter] for record in opt.records])
    tokens = tokens_of(1)[part_of(rank, size)]
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    tracker(loss * math.nan if rank == 1 else loss).backward()
    own = ". Here, on rank 1: loss number 2 is nan" if rank == 1 else ""
    with pytest.warns(gradlr.GradlrWarning, match=f"NaN or infinity in a loss or a gradient on rank 1{own}"):
        opt.step()
    assert opt.skipped == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for record, state in zip(opt.records, states, strict=True):
        assert all(torch.equal(value, opt.state[record.plan.parameter][key]) for key, value in state.items())
    assert tracker.state_dict()["latest"] != latest  # that of the processes whose loss was sound
    train(model, tracker, opt, 2, part=part_of(rank, size), start=2)
    assert_same_everywhere(model)
    assert opt.skipped == 1


@check(2)
def other_arguments_are_told(rank, size):
    with pytest.raises(gradlr.ParallelError, match=r"rank 1, lr of 'conv.weight': 0\.02; on rank 0: 0\.01 \(7 more"):
        attach(mixed(), lr=2e-2 if rank == 1 else 1e-2)
    with pytest.raises(gradlr.ParallelError, match=r"on rank 1, seed: 7; on rank 0: 0\. Give"):
        attach(mixed(), seed=7 if rank == 1 else 0)
    with pytest.raises(gradlr.ParallelError, match=r"order of '2.weight': not there; on rank 0: 1 "):
        attach(mlp(depth=1 if rank == 1 else 2))
    error, tale = (gradlr.ArgumentError, "^lr=-1") if rank == 1 else (gradlr.ParallelError, "On rank 1: ArgumentError: lr=-1")
    with pytest.raises(error, match=tale):
        attach(mixed(), lr=-1 if rank == 1 else 1e-2)
    with pytest.raises(gradlr.ArgumentError, match='needs apply="step"'):
        attach(mixed(), apply="backward")
    with pytest.raises(gradlr.ArgumentError, match=r"process_group=7.*group.WORLD"):
        attach(mixed(), 7)
    # Nothing has stayed attached.
    model = mixed()
    tracker, opt = attach(model)
    train(model, tracker, opt, 1, part=part_of(rank, size))


@check(2)
def clipping_by_hand_is_refused(rank, size):
    model = mixed()
    tracker, opt = attach(model)
    tokens = tokens_of(0)
    tracker(cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())).backward()
    held = [parameter for group in opt.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(held, 1.0)
    with pytest.raises(gradlr.ArgumentError, match="max_grad_norm="):
        opt.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(tracker(cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))).backward()
    with pytest.raises(gradlr.ArgumentError, match="GradScaler"):
        scaler.step(opt)
    assert_same_everywhere(model)


@check(2)
def an_error_on_one_rank_stops_all(rank, size):
    model = mixed()
    tracker, opt = attach(model)
    tokens = tokens_of(0)
    loss = tracker(cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
    if rank == 1:

        def fail(gradient):
            raise KeyError("a layer")

        handle = model.conv.weight.register_hook(fail)
        with pytest.raises(KeyError):
            loss.backward()
        handle.remove()
    else:
        loss.backward()
    error, tale = (gradlr.BackwardError, "did not come to its end") if rank == 1 else (gradlr.ParallelError, "error on rank 1")
    with pytest.raises(error, match=tale):
        opt.step()
    assert_like(model, mixed())
    train(model, tracker, opt, 1, part=part_of(rank, size))
    assert_same_everywhere(model)


@check(2)
def a_resumed_run_goes_on_bit_for_bit(rank, size):
    model = mixed()
    tracker, opt = attach(model, rank=gradlr.ByLoss(3), state_dtype=torch.bfloat16)
    train(model, tracker, opt, 3, part=part_of(rank, size))
    saved = [copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())] if rank == 0 else [None, None]
    distributed.broadcast_object_list(saved)
    train(model, tracker, opt, 3, part=part_of(rank, size), start=3)
    other = mixed(seed=5)
    other_tracker, other_opt = attach(other, rank=gradlr.ByLoss(3), state_dtype=torch.bfloat16)
    other.load_state_dict(saved[0])
    other_opt.load_state_dict(saved[1])
    train(other, other_tracker, other_opt, 3, part=part_of(rank, size), start=3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert other_tracker.ratio == tracker.ratio
    # One process goes on with the same checkpoint, and takes the same step.
    resumed = []
    for group, part in ((alone(), slice(None)), (distributed.group.WORLD, part_of(rank, size))):
        other = mixed(seed=6)
        other_tracker, other_opt = attach(other, group, rank=gradlr.ByLoss(3), state_dtype=torch.bfloat16)
        other.load_state_dict(saved[0])
        other_opt.load_state_dict(saved[1])
        train(other, other_tracker, other_opt, 1, part=part, start=3)
        resumed.append(other)
    assert_like(*resumed)
    changed = copy.deepcopy(saved[1])
    if rank == 1:
        next(iter(changed["state"].values()))["P"][0] += 1
    before = copy.deepcopy(other_opt.state_dict())
    with pytest.raises(gradlr.ParallelError, match=r"on rank 1, state of '"):
        other_opt.load_state_dict(changed)
    after = other_opt.state_dict()
    assert after["gradlr"] == before["gradlr"] and after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())
    error, tale = (gradlr.CheckpointError, "lacks") if rank == 1 else (gradlr.ParallelError, "On rank 1: CheckpointError")
    with pytest.raises(error, match=tale):
        other_opt.load_state_dict({} if rank == 1 else saved[1])


@check(2)
def drifting_weights_are_told(rank, size):
    model = mixed()
    tracker, opt = attach(model)
    if rank == 1:
        with torch.no_grad():
            model.mix.weight[0, 0] += 1e-9
    with pytest.raises(gradlr.ParallelError, match=r"'mix.weight' has other weights on rank 1 than on rank 0"):
        train(model, tracker, opt, len(opt.records), part=part_of(rank, size))


@contextmanager
def counted_bytes(*kinds):
    """Bytes that this process hands to collectives of torch.distributed, all of them or those whose names begin so."""
    counts, kinds = [], kinds or ("all_", "broadcast", "reduce", "gather", "scatter")
    names = [name for name in dir(distributed) if name.startswith(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            original = getattr(distributed, name)
            if not callable(original):
                continue

            def counting(tensor, *rest, original=original, **named):
                counts.append(tensor.numel() * tensor.element_size())
                return original(tensor, *rest, **named)

            patch.setattr(distributed, name, counting)
        yield counts


@check(2)
def bytes_are_those_of_the_formula(rank, size):
    # Formula of docs/devices.md. Matrices: conv 12 x 24, mix 8 x 12.
    vectors = 8 + 8 + 12 + 8
    seen = len(tokens_of(0)[:, :-1].unique())
    rows = seen * 8 + 11 * 8  # of the embedding what any rank has seen, of the head all
    header = 2 + 2 * size + 8
    for k, micro in ((0, 1), (0, 2), (1, 1)):
        model = Mixed()
        tracker, opt = attach(model, rank=1, momentum_rank=k)
        assert sum(1 for _ in model.parameters()) == 8
        with counted_bytes() as counts:
            train(model, tracker, opt, 1, part=part_of(rank, size), micro=micro)
        images = [8, 12]
        again = sum(images) if k or micro > 1 else 0
        body = again + (1 + k) * (24 + 12) + vectors + rows
        assert counts == [*(4 * image for image in images), 8 * header, 11 + 11, 4 * body]


@check(2)
def a_process_that_stops_early_is_named(rank, size):
    """Alive, with fewer batches: the others wait for the group's timeout."""
    group = distributed.new_group(list(range(size)))
    # Shorter only now: on a busy machine the processes may need longer to find each other.
    set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout  # before torch 2.15
    set_timeout(timedelta(seconds=4), group)
    model = mixed()
    tracker, opt = attach(model, group)
    train(model, tracker, opt, 2, part=part_of(rank, size))
    if rank != 1:
        with pytest.raises(gradlr.ParallelError, match=r"step number 3: rank 1 is missing \(it last came to step 2\)"):
            train(model, tracker, opt, 1, part=part_of(rank, size), start=2)
    distributed.barrier()


@check(4)
def a_killed_process_ends_the_others(rank, size):
    """In the middle of a step; last of all checks, since the group is broken afterwards."""
    model = mixed()
    tracker, opt = attach(model)
    train(model, tracker, opt, 1, part=part_of(rank, size))
    if rank == 1:
        model.mix.weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
    # It had begun the step. Who has no connection to it waits for those who have, and may hear of it after them.
    with pytest.raises(gradlr.ParallelError, match=r"step number 2: (rank 1 is missing|ranks( \d,)* 1(, \d)* have not met)"):
        train(model, tracker, opt, 1, part=part_of(rank, size), start=1)
