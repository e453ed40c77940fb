"""What runs in each process of tests/parallel/test_ddp.py: one function per check, called alike on every rank."""

import copy
import functools
import gc
import io
import math
import os
import pickle
import tempfile
import warnings
from datetime import timedelta

import pytest
import torch
from checks import AGREEMENT, alone, assert_same_everywhere, mixed, part_of, tokens_of
from checks import attach as attach_group
from checks import train as train_group
from models import Mixed, mlp
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import gradlr

SKETCHES = {"gradlr_right_sketch", "gradlr_left_sketch"}


def attach(model, **options):
    options = {"lr": 1e-2, "rank": 2, "momentum_rank": 1, "apply": "step", "capture": "ddp"} | options
    tracker = gradlr.LossTracker()
    return tracker, gradlr.attach(model, tracker, **options)


def wrapped(model, ddp_options=None, /, **options):
    tracker, opt = attach(model, **options)
    return DistributedDataParallel(model, **(ddp_options or {})), tracker, opt


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(ddp, tracker, opt, steps, *, part=slice(None), micro=1, start=0):
    """As `checks.train`; all micro-batches but the last under no_sync()."""
    for step in range(start, start + steps):
        *early, last = tokens_of(step)[part].chunk(micro)
        with ddp.no_sync():
            for some in early:
                (tracker(loss_of(ddp, some)) / micro).backward()
        (tracker(loss_of(ddp, last)) / micro).backward()
        opt.step()
        opt.zero_grad()


def assert_close(model, reference):
    for name, parameter in reference.named_parameters():
        tell = lambda tale, name=name: f"{name}: {tale}"  # noqa: E731
        torch.testing.assert_close(model.get_parameter(name), parameter, **AGREEMENT, msg=tell)


def compare(rank, size, ddp_options=None, /, *, micro=1, **options):
    """Twenty steps: as one process on the whole batch, and as processes that exchange sketches themselves."""
    model = mixed(seed=rank)
    ddp, tracker, opt = wrapped(model, ddp_options, **options)
    train(ddp, tracker, opt, 20, part=part_of(rank, size), micro=micro)
    assert_same_everywhere(model)
    assert not torch.equal(model.mix.weight, mixed().mix.weight)
    assert {slot.plan.name for slot in opt.slots if slot.capture == "ddp"} == {"conv.weight", "mix.weight"}
    assert {slot.capture for slot in opt.slots} == {"ddp", "grad"}
    assert all(parameter.grad is None for parameter in model.parameters())
    for group, part, pieces in ((alone(), slice(None), 1), (distributed.group.WORLD, part_of(rank, size), micro)):
        reference = mixed()
        reference_tracker, reference_opt = attach_group(reference, group, **options)
        train_group(reference, reference_tracker, reference_opt, 20, part=part, micro=pieces)
        assert_close(model, reference)
        assert math.isclose(tracker.ratio, reference_tracker.ratio, rel_tol=1e-6)
        assert [slot.rank for slot in opt.slots] == [slot.rank for slot in reference_opt.slots]
        assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)
    return opt


def stock_ddp_equals_one_process(rank, size):
    opt = compare(rank, size, rank=gradlr.ByLoss(3))
    assert min(slot.rank for slot in opt.slots if slot.capture == "ddp") < 3
    assert f"processes={size}" in repr(opt)


def accumulation_equals_one_process(rank, size):
    compare(rank, size, {"gradient_as_bucket_view": True}, micro=2, max_grad_norm=0.5, max_norm_growth=1.5, weight_decay=0.1)


def a_static_graph_equals_one_process(rank, size):
    compare(rank, size, {"static_graph": True}, rule=gradlr.rules.FactorMoments(newton_schulz_dtype=torch.float64))


def run_beside_exchange(model, rank, size, loss_of, ddp_options=None, **options):
    """Equal to the processes' own exchange, for any loss of a replica on (16, 8) numbers."""
    torch.manual_seed(rank)
    reference = copy.deepcopy(model)
    ddp, tracker, opt = wrapped(model, ddp_options, **options)
    reference_tracker, reference_opt = attach_group(reference, **options)
    for step in range(4):
        x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(size * step + rank))
        for module, tell, optimizer in ((ddp, tracker, opt), (reference, reference_tracker, reference_opt)):
            tell(loss_of(module, x)).backward()
            optimizer.step()
    assert_same_everywhere(model)
    assert_close(model, reference)
    return opt


class Single(nn.Module):
    """A convolution of one picture without a batch, which no linear map takes, and a Linear that is called by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, kernel_size=3, padding=1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return self.mix(input=torch.tanh(self.conv(x.mT)).mT)


def what_no_map_fits_is_formed_and_sketched(rank, size):
    torch.manual_seed(0)
    opt = run_beside_exchange(Single().double(), rank, size, lambda model, x: mse_loss(model(x), x))
    assert [slot.plan.name for slot in opt.slots if slot.capture == "ddp"] == ["conv.weight", "mix.weight"]


class Recomputed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blocks, self.options = mlp(8, dtype=torch.float64), options

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        return x


def checkpointed_layers_are_recomputed(rank, size):
    selective = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    for ddp_options, options in (({}, {}), ({"static_graph": True}, {}), ({}, {"context_fn": selective})):
        run_beside_exchange(Recomputed(**options), rank, size, lambda model, x: mse_loss(model(x), x), ddp_options)


def second_derivatives_reach_the_sketches(rank, size):
    """A penalty on the gradient by the input, whose own gradient goes through every weight once more."""

    def loss_of(model, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return slope.square().mean()

    run_beside_exchange(mlp(8, dtype=torch.float64), rank, size, loss_of)


def a_layer_may_be_used_twice_or_share_its_weight(rank, size):
    model = mlp(8, depth=2, dtype=torch.float64)
    model.append(model[0])
    opt = run_beside_exchange(model, rank, size, lambda model, x: mse_loss(model(x), x))
    assert [slot.capture for slot in opt.slots] == ["ddp", "ddp", "grad", "grad"]
    model = mlp(8, depth=2)
    model[2].weight = model[0].weight
    _, opt = attach(model)
    assert [slot.capture for slot in opt.slots] == ["grad"] * 3


class Branches(nn.Module):
    """Three ways, of which a batch takes one."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, way):
        return self.ways[way](x)


def parameters_may_be_unused(rank, size):
    """Rank 0 goes one way, the others another; the third way nobody."""
    torch.manual_seed(0)
    model, way = Branches().double(), min(rank, 1)
    untouched = copy.deepcopy(model.ways[2].state_dict())
    options = {"find_unused_parameters": True}
    opt = run_beside_exchange(model, rank, size, lambda model, x: mse_loss(model(x, way), x), ddp_options=options)
    assert all(torch.equal(value, untouched[key]) for key, value in model.ways[2].state_dict().items())
    steps = {slot.plan.name: int(opt.state[slot.plan.parameter]["step"]) for slot in opt.slots}
    assert steps["ways.0.weight"] == steps["ways.1.weight"] == 4
    assert steps["ways.2.weight"] == steps["ways.2.bias"] == 0


def narrow_weights_and_sparse_rows_stay_equal(rank, size):
    torch.manual_seed(0)
    model = Mixed()
    model.embedding = nn.Embedding(11, 8, sparse=True)
    ddp, tracker, opt = wrapped(model.bfloat16(), weight_decay=0.1, state_dtype=torch.bfloat16)
    with opt.observe():
        train(ddp, tracker, opt, 3, part=part_of(rank, size))
    assert {model.conv.gradlr_right_sketch.dtype, model.mix.gradlr_left_sketch.dtype} == {torch.float32}
    assert_same_everywhere(model)
    assert str(opt.report()) and "  ddp  " in repr(opt)
    model = mlp(16)
    ddp, tracker, opt = wrapped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tracker(mse_loss(ddp(torch.randn(8, 16)), torch.zeros(8, 16))).backward()
    opt.step()
    assert_same_everywhere(model)
    assert not torch.equal(model[0].weight, mlp(16)[0].weight)


def not_finite_is_left_out_by_all(rank, size):
    model = mixed()
    ddp, tracker, opt = wrapped(model)
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy([opt.state[slot.plan.parameter] for slot in opt.slots])
    own = ". Here, on rank 1: loss number 2 is nan" if rank == 1 else ""
    loss = loss_of(ddp, tokens_of(1)[part_of(rank, size)])
    tracker(loss * math.nan if rank == 1 else loss).backward()
    with pytest.warns(gradlr.GradlrWarning, match=f"NaN or infinity in a loss or a gradient on rank 1{own}"):
        opt.step()
    # A gradient alone.
    loss = loss_of(ddp, tokens_of(1)[part_of(rank, size)])
    if rank == 1:
        model.mix.bias.register_hook(lambda gradient: gradient * math.inf)
    tracker(loss).backward()
    with pytest.warns(gradlr.GradlrWarning, match="the gradient of 'mix.bias' holds NaN"):
        opt.step()
    assert opt.skipped == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for slot, state in zip(opt.slots, states, strict=True):
        assert all(torch.equal(value, opt.state[slot.plan.parameter][key]) for key, value in state.items())
    if rank == 1:
        model.mix.bias._backward_hooks.clear()
    train(ddp, tracker, opt, 1, part=part_of(rank, size), start=2)
    assert_same_everywhere(model)
    assert opt.skipped == 2 and not torch.equal(model.mix.weight, before["mix.weight"])


def clipping_and_scaling_by_hand_are_right(rank, size):
    """Over the wrapper's parameters and over the optimizer's; scaled gradients are those of an unscaled loss."""
    tokens, ways = tokens_of(0)[part_of(rank, size)], {}
    for way in ("limit", "wrapper", "optimizer", "scaler"):
        model = mixed()
        ddp, tracker, opt = wrapped(model, max_grad_norm=0.1 if way == "limit" else None)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way == "scaler")
        scaler.scale(tracker(loss_of(ddp, tokens))).backward()
        held = [parameter for group in opt.param_groups for parameter in group["params"]]
        assert {id(one) for one in held if one.grad is not None} == {id(one) for one in ddp.parameters() if one.grad is not None}
        if way == "wrapper":
            before = nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
        elif way == "optimizer":
            torch.testing.assert_close(nn.utils.clip_grad_norm_(held, 0.1), before)
        scaler.step(opt)
        scaler.update()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_same_everywhere(model)
        ways[way] = model, opt.grad_norm
    # Updates of matrices do not depend on the length of one gradient, and nothing else differs by more than its eps.
    for model, _ in list(ways.values())[1:]:
        for one, other in zip(model.parameters(), ways["limit"][0].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The norm of both sketches counts what both see twice.
    assert math.isclose(ways["wrapper"][1], ways["optimizer"][1], rel_tol=1e-9) and ways["wrapper"][1] < 0.1
    assert math.isclose(ways["scaler"][1], ways["limit"][1], rel_tol=1e-9)
    # Infinity in one process' part: the scaler leaves the step out on all.
    model = mixed()
    ddp, tracker, opt = wrapped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(tracker(loss_of(ddp, tokens)) * (math.inf if rank == 1 else 1)).backward()
    scaler.step(opt)
    opt.zero_grad()
    assert torch.equal(model.mix.weight, mixed().mix.weight)
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    assert_same_everywhere(model)
    assert opt.skipped == 0 and not torch.equal(model.mix.weight, mixed().mix.weight)


def a_model_keeps_its_keys_and_copies_plainly(rank, size):
    plain = mixed()
    model = mixed()
    ddp, tracker, opt = wrapped(model)
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"weight", "bias", *SKETCHES}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert ddp.state_dict().keys() == {f"module.{key}" for key in plain.state_dict()}
    assert not model.mix.weight.requires_grad and isinstance(model.mix, nn.Linear)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin.mix) is nn.Linear and type(twin.conv) is nn.Conv1d
        assert all(parameter.requires_grad for parameter in twin.parameters())
        assert len(list(twin.parameters())) == len(list(plain.parameters()))
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict(), strict=True)
    missing = model.load_state_dict({"mix.bias": twin.mix.bias}, strict=False)
    assert not any("gradlr" in key for key in missing.missing_keys) and "mix.weight" in missing.missing_keys
    tracker(loss_of(ddp, tokens_of(2)[part_of(rank, size)])).backward()
    with pytest.warns(gradlr.GradlrWarning, match="drops the gradients of 8 parameters"):
        opt.detach()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert type(model.mix) is nn.Linear
    assert sum(len(group["params"]) for group in opt.param_groups) == len(opt.slots) + 1
    loss_of(model, tokens_of(2)).backward()
    assert model.mix.weight.grad is not None
    model.zero_grad()
    # What is attached cannot be attached to again; what was abandoned can.
    tracker, opt = attach(model)
    for capture in ("ddp", "hook"):
        with pytest.raises(gradlr.AttachError, match="attached already"):
            attach(model, capture=capture, process_group=distributed.group.WORLD)
    with torch.no_grad():
        assert model.mix(torch.ones(12, dtype=torch.float64)).grad_fn is None
    del opt
    gc.collect()
    with pytest.raises(gradlr.AttachError, match="does not exist any more"):
        model.mix(torch.ones(12, dtype=torch.float64))
    _, opt = attach(model)
    assert sum(slot.plan.parameter.numel() for slot in opt.slots) == sum(one.numel() for one in plain.parameters())


def a_resumed_run_goes_on_bit_for_bit(rank, size):
    model = mixed()
    ddp, tracker, opt = wrapped(model, rank=gradlr.ByLoss(3))
    train(ddp, tracker, opt, 3, part=part_of(rank, size))
    paths = [os.path.join(tempfile.mkdtemp(), "run.pt")]
    distributed.broadcast_object_list(paths)
    if rank == 0:
        gradlr.save(paths[0], model=model, optimizer=opt)
    train(ddp, tracker, opt, 3, part=part_of(rank, size), start=3)
    other = mixed(seed=5)
    other_ddp, other_tracker, other_opt = wrapped(other, rank=gradlr.ByLoss(3))
    train(other_ddp, other_tracker, other_opt, 1, part=part_of(rank, size))
    gradlr.load(paths[0], model=other, optimizer=other_opt)
    train(other_ddp, other_tracker, other_opt, 3, part=part_of(rank, size), start=3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    # Without a wrapper, one process goes on with it, and exchanging sketches, too.
    plain = mixed(seed=6)
    plain_tracker, plain_opt = attach_group(plain, rank=gradlr.ByLoss(3))
    gradlr.load(paths[0], model=plain, optimizer=plain_opt)
    train_group(plain, plain_tracker, plain_opt, 3, part=part_of(rank, size), start=3)
    assert_close(model, plain)
    tracker(loss_of(ddp, tokens_of(6))).backward()
    with pytest.raises(gradlr.CheckpointError, match="8 gradients wait"):
        opt.state_dict()


def a_graph_from_before_has_bases_that_are_gone(rank, size):
    model = mlp(8)
    tracker, opt = attach(model)
    loss = tracker(model(torch.ones(3, 8)).sum())
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(gradlr.BackwardError, match="of 8 x 8 through a graph from before the last opt.step"):
        loss.backward()
    opt.zero_grad()
    loss = model(torch.ones(3, 8)).sum()
    opt.detach()
    with pytest.raises(gradlr.BackwardError, match="opt.detach"):
        loss.backward()


def mistakes_are_told(rank, size):
    with pytest.raises(gradlr.ArgumentError, match='capture="ddp" needs apply="step"'):
        attach(mixed(), apply="backward")
    with pytest.raises(gradlr.AttachError, match=r'process_group= instead of wrapping it, or capture="ddp" before'):
        attach(DistributedDataParallel(mixed()))
    with pytest.raises(gradlr.ParallelError, match=r"rank 1, lr of 'conv.weight': 0\.02; on rank 0: 0\.01"):
        attach(mixed(), lr=2e-2 if rank == 1 else 1e-2)
    with pytest.raises(gradlr.ParallelError, match=r"capture of 'conv.weight': hook; on rank 0: ddp"):
        attach(mixed(), capture="hook" if rank == 1 else "ddp", process_group=distributed.group.WORLD)
    tokens = tokens_of(0)[part_of(rank, size)]
    # Never wrapped; wrapped and not called; the last backward under no_sync().
    model = mixed()
    tracker, opt = attach(model)
    tracker(loss_of(model, tokens)).backward()
    tale = r"ranks? 1.* brought other gradients to step number 1 than rank 0: .*DistributedDataParallel\(model\)"
    with pytest.raises(gradlr.ParallelError, match=tale):
        opt.step()
    assert torch.equal(model.mix.weight, mixed().mix.weight)
    ddp = DistributedDataParallel(model)
    with ddp.no_sync():
        tracker(loss_of(ddp, tokens)).backward()
    with pytest.raises(gradlr.ParallelError, match="to step number 2 than rank 0.*no_sync"):
        opt.step()
    # Nothing was changed, and the run goes on.
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    assert_same_everywhere(model)
    tracker(torch.zeros((), requires_grad=True)).backward()
    with pytest.raises(gradlr.AttachError, match="none of the 8 attached parameters received a gradient"):
        opt.step()
    with pytest.warns(gradlr.GradlrWarning, match="none of the 8 attached parameters received a gradient"):
        tracker(1.0)
    if rank == 1:
        with torch.no_grad():
            model.mix.weight[0, 0] += 1e-9
    with pytest.raises(gradlr.ParallelError, match=r"'mix.weight' has other weights on rank 1 than on rank 0"):
        train(ddp, tracker, opt, len(opt.slots), part=part_of(rank, size))


def an_error_on_one_rank_stops_all(rank, size):
    ddp, tracker, opt = wrapped(mixed())
    tracker(loss_of(ddp, tokens_of(0)[part_of(rank, size)])).backward()
    if rank == 1:
        tracker.load_state_dict(tracker.state_dict())
    error, tale = (gradlr.LossError, "never shown a loss") if rank == 1 else (gradlr.ParallelError, "error on rank 1")
    with pytest.raises(error, match=tale):
        opt.step()
    assert all(parameter.grad is None for parameter in ddp.parameters())
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    assert_same_everywhere(ddp.module)


def weights_come_from_the_first_rank(rank, size):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4).requires_grad_(False))
    attach(model)
    assert_same_everywhere(model)
    torch.manual_seed(0)
    assert torch.equal(model[0].weight, nn.Linear(16, 16).weight)


def strangers_are_told_and_sketches_are_none(rank, size):
    model = mixed()
    ddp, tracker, opt = wrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ddp, tracker, opt, 2, part=part_of(rank, size))
    model.late = nn.Parameter(torch.zeros(3))
    with pytest.warns(gradlr.GradlrWarning, match=r"^1 trainable parameters.*'late'"):
        tracker(1.0)


def bytes_are_those_of_the_formula(rank, size):
    counts = []

    def count(state, bucket):
        counts.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(None, bucket)

    ddp, tracker, opt = wrapped(Mixed(), rank=gradlr.ByLoss(2))
    ddp.register_comm_hook(None, count)
    train(ddp, tracker, opt, 2, part=part_of(rank, size))
    # Formula of docs/devices.md. Matrices: conv 12 x 24, mix 8 x 12; two tables of 11 x 8.
    matrices, vectors, tables = 2 * (12 + 24) + 2 * (8 + 12), 8 + 8 + 12 + 8, 2 * 11 * 8
    assert sum(counts) == 2 * 4 * (matrices + vectors + tables)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        original = gradlr.parallel.Replicas.all_reduce
        patch.setattr(gradlr.parallel.Replicas, "all_reduce", lambda self, one: (told.append(one.nbytes), original(self, one)))
        train(ddp, tracker, opt, 1, part=part_of(rank, size), start=2)
    assert told == [8 * (2 + 3 * size)]


def a_process_that_stops_early_is_named(rank, size):
    """It takes part in the backward, where DistributedDataParallel waits for it, and does not come to the step."""
    group = distributed.new_group(list(range(size)))
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    ddp, tracker, opt = wrapped(mixed(), process_group=group)
    train(ddp, tracker, opt, 1, part=part_of(rank, size))
    tracker(loss_of(ddp, tokens_of(1)[part_of(rank, size)])).backward()
    if rank != 1:
        with pytest.raises(gradlr.ParallelError, match=r"step number 2: rank 1 is missing \(it last came to step 1\)"):
            opt.step()
    distributed.barrier()
