"""What runs in each process of tests/distributed/test_sharded.py: models under FSDP2, tensor parallelism and both."""

import copy
import itertools
import math
import os
import signal
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from processes import Checks
from replicated_checks import CLOSE, counted_bytes
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

import gradlr
from gradlr.attach import DEFAULT_LR, DEFAULT_RANK
from gradlr.gradient import Dense

# Rounding of float64, grown over a few steps of orthogonalized updates.
AGREEMENT = {"rtol": 1e-6, "atol": 1e-6}
OPTIONS = {"lr": 1e-2, "rank": 2, "momentum_rank": 1}
STEPS = 6
check = Checks()


class Net(nn.Module):
    """Two matrices that are worth sketching even in four parts, a table, a head, a norm, biases."""

    def __init__(self, width=24, hidden=48):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


class Odd(nn.Module):
    """Rows that do not divide by the number of processes, down to one; filters, experts, fused projections."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.narrow = nn.Linear(6, 5)
        self.thin = nn.Linear(5, 3, bias=False)
        self.filters = nn.Conv1d(3, 6, kernel_size=3, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens):
        x = self.filters(self.thin(torch.tanh(self.narrow(self.embedding(tokens)))).mT).mT
        x = torch.einsum("bti,eio->bto", x, self.experts)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def net(seed=0, kind=Net, dtype=torch.float64):
    torch.manual_seed(seed)
    return kind().to(dtype)


def attach(model, **options):
    tracker = gradlr.LossTracker()
    return tracker, gradlr.attach(model, tracker, **OPTIONS | options)


def attach_alone(model, **options):
    with warnings.catch_warnings():  # several processes run, and this model is one process' own
        warnings.filterwarnings("ignore", "[0-9]+ processes run", gradlr.GradlrWarning)
        return attach(model, **options)


def tokens_of(step, count=8):
    return torch.randint(11, (count, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model, tracker, opt, steps, *, part=slice(None), micro=1, start=0, syncs_last=False, shows_share=False):
    """Next-token loss on a global batch of eight sequences, of which this process sees a part.

    Shows the tracker the losses before they are divided by the number of micro-batches, or after that.
    """
    for step in range(start, start + steps):
        chunks = tokens_of(step)[part].chunk(micro)
        for number, tokens in enumerate(chunks):
            if syncs_last:
                model.set_requires_gradient_sync(number == len(chunks) - 1)
            loss = loss_of(model, tokens)
            (tracker(loss / micro) if shows_share else tracker(loss) / micro).backward()
        opt.step()


def shard(model, mesh=None, **options):
    """FSDP2, each layer for itself and the rest at the root."""
    # A Linear's output may be a view; nothing here writes to it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    for name in ("up", "down", "filters", "attention"):
        if hasattr(model, name):
            fully_shard(getattr(model, name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def share_of(rank, size, count=8):
    return slice(rank * count // size, (rank + 1) * count // size)


def assert_like(model, reference, agreement=AGREEMENT):
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        whole = one.detach().full_tensor() if isinstance(one, DTensor) else one
        torch.testing.assert_close(whole, other, **agreement, msg=lambda tale, name=name: f"{name}: {tale}")


def compare_with_one_process(
    rank, size, /, *, place=shard, kind=Net, share=None, reference_micro=None, agreement=AGREEMENT, **options
):
    how = {key: options.pop(key) for key in ("micro", "syncs_last", "shows_share") if key in options}
    model, reference = place(net(kind=kind)), net(kind=kind)
    untrained = copy.deepcopy(reference)
    tracker, opt = attach(model, **options)
    train(model, tracker, opt, STEPS, part=share_of(rank, size) if share is None else share, **how)
    reference_tracker, reference_opt = attach_alone(reference, **options)
    train(reference, reference_tracker, reference_opt, STEPS, micro=reference_micro or how.get("micro", 1))
    assert_like(model, reference, agreement)
    assert all(not torch.equal(one, two) for one, two in zip(reference.parameters(), untrained.parameters(), strict=True))
    if reference_micro is None:  # both have shown the same losses
        assert math.isclose(tracker.ratio, reference_tracker.ratio, rel_tol=1e-6)
    assert [record.rank for record in opt.records] == [record.rank for record in reference_opt.records]
    assert f"processes={size}" in repr(opt)
    if opt.grad_norm is not None:
        assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)
    return opt


@check(2, 4, slow=4)
def fsdp_in_backward_equals_one_process(rank, size):
    opt = compare_with_one_process(rank, size, rank=gradlr.ByLoss(3), weight_decay=0.1)
    up = next(record.plan.parameter for record in opt.records if record.plan.name == "up.weight")
    assert up.grad is None and opt.state[up]["P"].shape == (48 // size, 1) and opt.state[up]["R"].shape == (24, 1)


@contextmanager
def forms_seen():
    """Names of the operators that rules are given."""
    seen, update = set(), gradlr.rules.LowRankPolar.update
    with pytest.MonkeyPatch.context() as patch:

        def looking(self, gradient, state, settings):
            seen.add(type(gradient).__name__)
            return update(self, gradient, state, settings)

        patch.setattr(gradlr.rules.LowRankPolar, "update", looking)
        yield seen


@check(2, 4)
def fsdp_at_step_equals_one_process(rank, size):
    with forms_seen() as seen:
        compare_with_one_process(rank, size, apply="step", max_grad_norm=0.5)
    assert seen == {"Sketched"}


@check(2, 4, slow=4)
def a_gradient_waits_in_the_form_of_one_process(rank, size):
    """Also where the part here is smaller than a sketch, and the whole is not: a residual belongs to both or to none.

    The second is how `attach` is called without options, at a rank that makes all of them small.
    """
    kind = partial(Net, 32, 64)
    for forms, options in (({"Sketched"}, {"rank": 8}), ({"Dense"}, {"rank": DEFAULT_RANK, "lr": DEFAULT_LR})):
        with forms_seen() as seen:
            compare_with_one_process(rank, size, kind=kind, apply="step", momentum_rank=0, agreement=CLOSE, **options)
        assert seen == forms


@check(2)
def normalized_gradients_equal_one_process(rank, size):
    for apply in ("backward", "step"):
        compare_with_one_process(rank, size, rule="multi_normalized", apply=apply, agreement=CLOSE)


@check(2)
def fsdp_accumulates_sketches(rank, size):
    """Each micro-batch is reduced and sketched: a process' micro-batches pair up with those of the others."""
    model, reference = shard(net()), net()
    tracker, opt = attach(model, apply="step")
    reference_tracker, reference_opt = attach_alone(reference, apply="step")
    for step in range(STEPS):
        tokens = tokens_of(step)
        for half in tokens.chunk(2):
            (tracker(loss_of(model, half[share_of(rank, size, 4)])) / 2).backward()
            (reference_tracker(loss_of(reference, half)) / 2).backward()
        opt.step()
        reference_opt.step()
    assert_like(model, reference)
    assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)


@check(2)
def fsdp_accumulates_before_it_reduces(rank, size):
    """With set_requires_gradient_sync(False) the hooks see the sum of all micro-batches, once."""
    micro = 8 // size
    how = {"micro": micro, "syncs_last": True, "reference_micro": 1}
    compare_with_one_process(rank, size, apply="step", **how)
    compare_with_one_process(rank, size, shows_share=True, **how)


@check(2)
def fsdp_keeps_its_weights_gathered(rank, size):
    compare_with_one_process(rank, size, place=partial(shard, reshard_after_forward=False))


@check(2, 4)
def odd_sizes_equal_one_process(rank, size):
    """Parts of unequal size and without any row, filters, experts; fused projections become one matrix, with a warning."""
    for apply in ("backward", "step"):
        model = shard(net(kind=Odd))
        with pytest.warns(gradlr.GradlrWarning, match="'attention.in_proj_weight' .* is taken as one matrix"):
            tracker, opt = attach(model, apply=apply)
        reference = net(kind=Odd)
        views = {"attention.in_proj_weight": "m n -> m n"}
        reference_tracker, reference_opt = attach_alone(reference, apply=apply, views=views)
        train(model, tracker, opt, STEPS, part=share_of(rank, size))
        train(reference, reference_tracker, reference_opt, STEPS)
        assert_like(model, reference)


def _by_columns(parameter):
    is_even = parameter.ndim == 2 and parameter.shape[1] % distributed.get_world_size() == 0
    return Shard(1) if is_even else None


@check(2)
def columns_may_be_sharded(rank, size):
    place = partial(shard, shard_placement_fn=_by_columns)
    opt = compare_with_one_process(rank, size, place=place, kinds={"embedding": {"rule": "rowwise_rmsprop"}})
    up = next(record.plan.parameter for record in opt.records if record.plan.name == "up.weight")
    assert up.placements == (Shard(1),) and opt.state[up]["R"].shape == (24 // size, 1)
    with forms_seen() as seen:
        compare_with_one_process(rank, size, place=place, apply="step")
    assert seen == {"Sketched"}
    compare_with_one_process(rank, size, place=place, rule=gradlr.rules.LowRankPolar(residual=0.0))


def _same_gradients(model, reference, twin, steps, rank, size, **options):
    """Trains `model` sharded, and `reference` in one process on the gradients that a twin gets under the same FSDP2."""
    tracker, opt = attach(model, **options)
    reference_tracker, reference_opt = attach_alone(reference, **options)
    for step in range(steps):
        tokens = tokens_of(step)[share_of(rank, size)]
        loss = loss_of(model, tokens)
        mean = loss.detach() / size
        distributed.all_reduce(mean)
        with torch.no_grad():
            for one, other in zip(twin.parameters(), reference.parameters(), strict=True):
                one.copy_(DTensor.from_local(other.detach(), one.device_mesh, run_check=False))
        loss_of(twin, tokens).backward()
        reference_tracker(float(mean))
        tracker(loss).backward()
        for one, other in zip(twin.parameters(), reference.parameters(), strict=True):
            reference_opt.receive(other, Dense(one.grad.full_tensor().reshape(other.shape)))
            one.grad = None
        opt.step()
        reference_opt.step()


@check(2)
def policies_of_fsdp_are_followed(rank, size):
    """Mixed precision and CPU offload: the update is that of one process that is given the same gradients."""
    policies = {
        "half": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    for policy in policies.values():
        for apply in ("backward", "step"):
            model, twin, reference = (net(dtype=torch.float32) for _ in range(3))
            _same_gradients(shard(model, **policy), reference, shard(twin, **policy), 3, rank, size, apply=apply)
            # float32, and gradients of bfloat16 that a last bit of a weight may turn.
            assert_like(model, reference, {"rtol": 1e-2, "atol": 1e-3})


@check(2)
def narrow_weights_are_rounded_in_each_part(rank, size):
    torch.manual_seed(0)
    model = shard(net(dtype=torch.bfloat16))
    before = [parameter.detach().full_tensor() for parameter in model.parameters()]
    tracker, opt = attach(model, state_dtype=torch.bfloat16)
    train(model, tracker, opt, 5, part=share_of(rank, size))
    after = [parameter.detach().full_tensor() for parameter in model.parameters()]
    assert all(two.isfinite().all() and not torch.equal(one, two) for one, two in zip(before, after, strict=True))


def _everywhere(value, group=None):
    others = [torch.empty_like(value) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(others, value.contiguous(), group=group)
    return others


@check(2)
def narrow_state_is_rounded_alike_where_it_is_the_same(rank, size):
    """Rounded at random in each process, R would be another test matrix in each, and its signs part."""
    model = shard(net(dtype=torch.float32))
    tracker, opt = attach(model, state_dtype=torch.bfloat16, rank=4, momentum_rank=2)
    train(model, tracker, opt, 5, part=share_of(rank, size))
    state = opt.state[model.up.weight]
    rights, lefts = _everywhere(state["R"]), _everywhere(state["P"])
    assert state["R"].dtype == torch.bfloat16 and all(torch.equal(rights[0], other) for other in rights)
    assert not torch.equal(lefts[0], lefts[1])


@check(4)
def narrow_state_over_two_axes(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = shard(_parallelized(net(dtype=torch.float32), mesh["tensor"]), mesh["data"])
    tracker, opt = attach(model, state_dtype=torch.bfloat16, rank=4, momentum_rank=2)
    train(model, tracker, opt, 3, part=share_of(mesh["data"].get_local_rank(), 2))
    left, right = (_everywhere(opt.state[model.down.weight][key]) for key in ("P", "R"))
    assert torch.equal(left[0], left[1]) and torch.equal(left[2], left[3]) and not torch.equal(left[0], left[2])
    assert torch.equal(right[0], right[2]) and torch.equal(right[1], right[3]) and not torch.equal(right[0], right[1])


@check(2)
def a_model_is_attached_after_an_evaluation(rank, size):
    """Which leaves whole weights at the root: hooks on those would train copies that nobody keeps."""
    for place in (shard, fully_shard):
        model, reference = place(net()), net()
        with torch.no_grad():
            loss_of(model, tokens_of(0))
        assert not isinstance(model.embedding.weight, DTensor)
        tracker, opt = attach(model)
        reference_tracker, reference_opt = attach_alone(reference)
        train(model, tracker, opt, 3, part=share_of(rank, size))
        train(reference, reference_tracker, reference_opt, 3)
        assert_like(model, reference)


@check(4)
def weights_are_kept_in_a_smaller_mesh_between_forward_and_backward(rank, size):
    compare_with_one_process(rank, size, place=partial(shard, reshard_after_forward=2))


@check(4)
def experts_of_all_processes_share_one_rank(rank, size):
    """Three experts in four processes, one of which has none."""
    options = {"rank": gradlr.ByLoss(0.5), "momentum_rank": 4}
    model, reference = shard(net(kind=Odd)), net(kind=Odd)
    with pytest.warns(gradlr.GradlrWarning, match="is taken as one matrix"):
        tracker, opt = attach(model, **options)
    views = {"attention.in_proj_weight": "m n -> m n"}
    reference_tracker, reference_opt = attach_alone(reference, views=views, **options)
    for step in range(5):
        train(model, tracker, opt, 1, part=share_of(rank, size), start=step)
        train(reference, reference_tracker, reference_opt, 1, start=step)
        assert [record.rank for record in opt.records] == [record.rank for record in reference_opt.records]
    assert_like(model, reference)
    opt.load_state_dict(opt.state_dict())
    train(model, tracker, opt, 1, part=share_of(rank, size))


@check(2)
def a_norm_that_overflows_is_infinite_everywhere(rank, size):
    _, opt = attach(shard(net()), apply="step")
    opt.pending.norm_proxy.record(0, torch.tensor(math.inf if rank == 1 else 1.0, dtype=torch.float64))
    result = opt.sync.exchange(opt.pending, [], opt.policy.skipped)
    assert opt.pending.norm_proxy.energy == math.inf and not result.not_finite and not result.failed


def _parallelized(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@check(2, 4, slow=4)
def tensor_parallel_equals_one_process(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    for options in ({}, {"apply": "step", "max_grad_norm": 0.5}, {"apply": "step", "micro": 2}):
        opt = compare_with_one_process(rank, size, place=partial(_parallelized, mesh=mesh), share=slice(None), **options)
    state = {record.plan.name: opt.state[record.plan.parameter] for record in opt.records}
    assert state["up.weight"]["P"].shape == (48 // size, 1) and state["up.weight"]["R"].shape == (24, 1)
    assert state["down.weight"]["P"].shape == (24, 1) and state["down.weight"]["R"].shape == (48 // size, 1)


@check(4)
def fsdp_over_tensor_parallel_equals_one_process(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    place = lambda model: shard(_parallelized(model, mesh["tensor"]), mesh["data"])  # noqa: E731
    share = share_of(mesh["data"].get_local_rank(), 2)
    for options in ({}, {"apply": "step", "max_grad_norm": 0.5}):
        opt = compare_with_one_process(rank, size, place=place, share=share, **options)
    down = next(record.plan.parameter for record in opt.records if record.plan.name == "down.weight")
    assert opt.state[down]["P"].shape == (12, 1) and opt.state[down]["R"].shape == (24, 1)


@check(4)
def hybrid_sharding_equals_one_process(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for options in ({}, {"apply": "step", "max_grad_norm": 0.5}):
        opt = compare_with_one_process(rank, size, place=partial(shard, mesh=mesh), **options)
        parts = torch.cat([record.plan.here.flatten() for record in opt.records])
        others = [torch.empty_like(parts) for _ in range(2)]
        distributed.all_gather(others, parts, group=mesh["replicas"].get_group())
        assert torch.equal(*others)


@check(2)
def copies_that_drift_are_told(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    model = _parallelized(net(), mesh)
    tracker, opt = attach(model, apply="step")
    if rank == 1:
        with torch.no_grad():
            model.norm.weight[0] += 1e-9
    with pytest.raises(gradlr.ParallelError, match=r"has other weights on rank 1 than on rank 0"):
        train(model, tracker, opt, len(opt.records))


def _parts_of(model):
    return [parameter.to_local().clone() for parameter in model.parameters()]


@check(2)
def an_overflow_on_one_rank_skips_the_step_on_all(rank, size):
    model = shard(net())
    tracker, opt = attach(model, apply="step")
    train(model, tracker, opt, 1, part=share_of(rank, size))
    before = _parts_of(model)
    with pytest.MonkeyPatch.context() as patch:
        # One entry, in the part of the last process.
        hooks = model.up.weight._post_accumulate_grad_hooks
        (key,) = hooks
        take = hooks[key]

        def overflowing(parameter):
            if rank == size - 1:
                parameter.grad.to_local()[0, 0] = math.inf
            take(parameter)

        patch.setitem(hooks, key, overflowing)
        with pytest.warns(gradlr.GradlrWarning, match=f"left out whole: NaN or infinity in .* on rank {size - 1}"):
            train(model, tracker, opt, 1, part=share_of(rank, size), start=1)
    assert opt.skipped == 1 and all(map(torch.equal, before, _parts_of(model)))
    train(model, tracker, opt, 1, part=share_of(rank, size))
    assert not any(map(torch.equal, before[:1], _parts_of(model)[:1]))


def _backward_and_step(loss, opt):
    loss.backward()
    opt.step()


@check(2)
def a_loss_of_nan_on_one_rank_is_left_out_on_all(rank, size):
    for apply in ("backward", "step"):
        model = shard(net())
        tracker, opt = attach(model, apply=apply)
        train(model, tracker, opt, 1, part=share_of(rank, size))
        before, loss = _parts_of(model), loss_of(model, tokens_of(1))
        with pytest.warns(gradlr.GradlrWarning, match="NaN or infinity in a loss or a gradient on rank 1"):
            _backward_and_step(tracker(loss * (math.nan if rank == 1 else 1.0)), opt)
        assert opt.skipped == 1 and all(map(torch.equal, before, _parts_of(model)))
        train(model, tracker, opt, 1, part=share_of(rank, size))


@check(2)
def nan_in_backward_is_an_error_on_all(rank, size):
    model = shard(net())
    tracker, opt = attach(model)
    factor, before = math.nan if rank == 1 else 1.0, _parts_of(model.down)
    scale = lambda gradient: gradient * factor  # noqa: E731
    model.down.register_forward_hook(lambda module, inputs, output: output.register_hook(scale) and None)
    loss = loss_of(model, tokens_of(0))
    with pytest.raises(gradlr.NonFiniteError, match="'down"):
        tracker(loss).backward()
    assert all(map(torch.equal, before, (part.to_local() for part in model.down.parameters())))


def _numbers_of_an_update(m, n, r, k, *, by_rows, has_residual):
    """The formulas of docs/devices.md: what a matrix' update sends, before it is known to be finite."""
    if by_rows:
        return r * n + 3 * r * r + r * k + r + has_residual * (3 * n + 1)
    # Norms are summed in float64, which counts as two.
    return r * m + r * r + 2 + (k and r * r + 2 * 2 + r * k + k) + has_residual * (3 * m + 1)


@check(2)
def bytes_are_those_of_the_formula(rank, size):
    """What an update adds to the traffic of FSDP2 itself."""
    columns_of_matrices = partial(shard, shard_placement_fn=lambda one: Shard(1) if one.shape in ((24, 48), (48, 24)) else None)
    for place, residual, k in itertools.product((shard, columns_of_matrices), (0.0, 0.5), (0, 1)):
        model = place(net(dtype=torch.float32))
        tracker, opt = attach(model, rule=gradlr.rules.LowRankPolar(residual=residual), momentum_rank=k)
        train(model, tracker, opt, 1, part=share_of(rank, size))
        loss = loss_of(model, tokens_of(1)[share_of(rank, size)])
        with counted_bytes() as counts:
            tracker(loss)
        assert counts == [32 * size]
        with counted_bytes("all_reduce") as counts:  # FSDP2 itself gathers, and reduces with a scatter
            loss.backward()
        how = {"by_rows": place is shard, "has_residual": residual > 0}
        matrices = [_numbers_of_an_update(*shape, 2, k, **how) for shape in ((24, 48), (48, 24))]
        assert sum(counts) == 4 * (sum(matrices) + len(opt.records))
        opt.detach()


@check(2)
def what_cannot_be_sharded_is_refused(rank, size):
    for rule in ("factor_moments", "polar"):
        with pytest.raises(gradlr.ArgumentError, match=rf"rule '{rule}' needs whole matrices, and 'up.weight' \(48, 24\)"):
            attach(shard(net()), rule=rule)
    with pytest.raises(gradlr.ArgumentError, match="FSDP2 gathers a weight"):
        attach(shard(net()), capture="adaptor")
    with pytest.raises(gradlr.ArgumentError, match="leave process_group= out"):
        attach(shard(net()), process_group=distributed.group.WORLD, apply="step")
    with pytest.raises(gradlr.AttachError, match="takes that axis apart"):
        attach(shard(net()), views={"up.weight": "(three o) i -> three o i"})
    model = net()
    fully_shard(model.up)
    with pytest.raises(gradlr.AttachError, match=r"'embedding.weight' is a plain parameter .* \(6 such in all\)"):
        attach(model)
    model = shard(net())
    tracker, opt = attach(model)
    assert "(in this process)" in repr(opt)
    with pytest.raises(gradlr.ArgumentError, match="sharded"):
        opt.observe()
    with pytest.raises(gradlr.ArgumentError, match="sharded"):
        opt.report()
    with pytest.raises(gradlr.AttachError, match=r"the device mesh \[1, 0\] do not ascend"):
        attach(shard(net(), DeviceMesh("cpu", [1, 0])))
    with pytest.raises(gradlr.ParallelError, match=r"rank 1 and rank 0 do not train the same: on rank 1, lr of"):
        attach(shard(net()), lr=1e-2 * (1 + rank % 2))


@check(2)
def rates_and_gradients_of_one_rank_are_told(rank, size):
    model = shard(net())
    tracker, opt = attach(model, apply="step")
    if rank == 1:
        for group in opt.param_groups:
            group["lr"] /= 2
    with pytest.raises(gradlr.ParallelError, match="has learning rate .* on rank 1 and .* on rank 0"):
        train(model, tracker, opt, 1, part=share_of(rank, size))
    opt.detach()
    model.zero_grad()
    tracker, opt = attach(model, apply="step")
    before = _parts_of(model)
    tracker(loss_of(model, tokens_of(0))).backward()
    if rank == 1:
        opt.zero_grad()
    with pytest.raises(gradlr.ParallelError, match="gradients of 0 parameters wait on rank 1, of 8 on rank 0"):
        opt.step()
    assert all(map(torch.equal, before, _parts_of(model)))
    train(model, tracker, opt, 1, part=share_of(rank, size))


@check(2)
def attaching_before_sharding_is_told(rank, size):
    model = net()
    tracker, opt = attach_alone(model)
    shard(model)
    with pytest.raises(gradlr.AttachError, match="fully_shard"):
        train(model, tracker, opt, 1, part=share_of(rank, size))


@check(2)
def wrapping_after_attaching_is_told(rank, size):
    model = net()
    tracker, opt = attach_alone(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(gradlr.AttachError, match="wrapped in DistributedDataParallel.*process_group="):
        tracker(loss_of(ddp, tokens_of(0)))
    assert opt is not None


@check(2)
def a_model_is_attached_again_after_detach(rank, size):
    model = shard(net())
    tracker, opt = attach(model)
    train(model, tracker, opt, 1, part=share_of(rank, size))
    opt.detach()
    loss_of(model, tokens_of(0)).backward()
    assert isinstance(model, FSDPModule) and model.up.weight.grad is not None
    model.zero_grad()
    tracker, opt = attach(model)
    train(model, tracker, opt, 1, part=share_of(rank, size))


@check(2)
def gradients_by_hand_and_zero_grad_of_the_model_or_a_layer(rank, size):
    """Shards that are written into `.grad`, beside the whole gradients in one process."""
    model, reference = shard(net()), net()
    tracker, opt = attach(model, apply="step", momentum_rank=0)
    reference_tracker, reference_opt = attach_alone(reference, apply="step", momentum_rank=0)
    tracker(loss_of(model, tokens_of(0)[share_of(rank, size)])).backward()
    model.up.zero_grad()
    assert len(opt.pending) == len(opt.records) - 2
    model.zero_grad()
    assert len(opt.pending) == 0
    for one, show, optimizer in ((model, tracker, opt), (reference, reference_tracker, reference_opt)):
        show(1.0)
        for parameter in one.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        assert all(parameter.grad is None for parameter in one.parameters())
    assert_like(model, reference)
    assert math.isclose(opt.grad_norm, reference_opt.grad_norm, rel_tol=1e-6)


@check(4)
def a_killed_process_ends_the_others(rank, size):
    """In the middle of a step; last of all checks, since the group is broken afterwards."""
    model = shard(net())
    tracker, opt = attach(model, apply="step")
    train(model, tracker, opt, 1, part=share_of(rank, size))
    if rank == 1:
        warnings.filterwarnings("ignore", ".*have post-accumulate hooks", gradlr.GradlrWarning)
        model.up.weight.register_post_accumulate_grad_hook(lambda parameter: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises((gradlr.ParallelError, RuntimeError)):
        train(model, tracker, opt, 1, part=share_of(rank, size), start=1)


@check(2)
def a_replicated_number_is_trained(rank, size):
    """`distribute_module` makes DTensors of all parameters, those without axes included."""
    mesh = init_device_mesh("cpu", (size,))
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))
    tracker, opt = attach(model)
    tracker(model.scale.square().to_local()).backward()
    opt.step()
    assert model.scale.to_local() < 2
