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

import gradlr

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


def train(model, tracker, opt, steps, *, part=slice(None), micro=1, start=0):
    """Next-token loss on a global batch of eight sequences, of which this process sees a part."""
    for step in range(start, start + steps):
        tokens = tokens_of(step)[part]
        for some in tokens.chunk(micro):
            loss = cross_entropy(model(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten())
            (tracker(loss) / micro).backward()
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


def compare_with_one_process(rank, size, /, *, micro=1, agreement=AGREEMENT, **options):
    model, reference = mixed(seed=rank), mixed()
    tracker, opt = attach(model, **options)
    train(model, tracker, opt, 8, part=part_of(rank, size), micro=micro)
    reference_tracker, reference_opt = attach(reference, alone(), **options)
    train(reference, reference_tracker, reference_opt, 8)
    assert_same_everywhere(model)
    assert_like(model, reference, agreement)
    assert math.isclose(tracker.ratio, reference_tracker.ratio, rel_tol=1e-6)
    assert [record.rank for record in opt.records] == [record.rank for record in reference_opt.records]
    assert not torch.equal(model.mix.weight, mixed().mix.weight)
    if opt.grad_norm is not None:
        assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)
    return opt


@check(2, 4)
def hooks_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, rank=gradlr.ByLoss(3))
    assert f"processes={size}" in repr(opt)
    # They exchange sketches, not gradients, of both matrices that are large enough.
    from gradlr.distributed.replicated import form_of

    assert [form_of(record) for record in opt.records if record.plan.kind == "matrix"] == ["sketch", "sketch"]


@check(2)
def accumulation_equals_one_process(rank, size):
    compare_with_one_process(rank, size, micro=2, max_grad_norm=0.5)


@check(2, 4)
def adaptors_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, capture="adaptor", weight_decay=0.1)
    assert {record.capture for record in opt.records} == {"adaptor", "rows", "hook"}


@check(2)
def one_sided_layers_equal_one_process(rank, size):
    opt = compare_with_one_process(rank, size, capture="one_sided", micro=2)
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
    tracker, opt = attach(model, beta=0.9)
    untouched = copy.deepcopy(model.ways[2].state_dict())
    for step in range(4):
        x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        tracker(mse_loss(model(x, min(rank, 1)), x)).backward()
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
    model = Mixed()
    tracker, opt = attach(model, rank=2)
    with counted_bytes() as counts:
        train(model, tracker, opt, 1, part=part_of(rank, size))
    # Formula of docs/devices.md. Matrices: conv 12 x 24, mix 8 x 12.
    matrices = 2 * (12 + 24) + 2 * (8 + 12)
    vectors = 8 + 8 + 12 + 8
    tables = [model.embedding.weight, model.head.weight]
    seen = len(tokens_of(0)[:, :-1].unique())
    rows = seen * 8 + 11 * 8  # of the embedding what any rank has seen, of the head all
    header = 2 + 2 * size + 8
    assert sum(1 for _ in model.parameters()) == 8
    assert counts == [sum(map(len, tables)), 4 * (header + matrices + vectors + rows)]


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
    with pytest.raises(gradlr.ParallelError, match=r"rank 1 is missing \(it last came to step 1\)"):
        train(model, tracker, opt, 1, part=part_of(rank, size), start=1)
