"""Distributed checkpoints of sharded models: what one, two and four processes save, the others load."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Checks
from sharded_checks import Net, _parallelized, attach, attach_alone, loss_of, net, shard, share_of, tokens_of, train
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gradlr

check = Checks()
FOLDER = "GRADLR_TEST_FOLDER"
OPTIONS = {
    "rank": gradlr.ByLoss(3),
    "apply": "step",
    "max_grad_norm": 0.5,
    "kinds": {"vector": {"rule": "adam"}, "embedding": {"rule": "adam"}},
}


def folder(name):
    return os.path.join(os.environ[FOLDER], name)


def placed(rank, size):
    """A model as these processes hold it: alone, under FSDP2, or under FSDP2 over tensor parallelism."""
    if size == 1:
        return net(seed=9)
    if size == 2:
        return shard(net(seed=9))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return shard(_parallelized(net(seed=9), mesh["tensor"]), mesh["data"])


def batch_share(rank, size):
    return share_of(rank, size) if size < 4 else share_of(rank // 2, 2)


def whole(model):
    options = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(model, options=options)


def begin(rank, size):
    """Three steps, saved with torch.distributed.checkpoint; three more, whose result is kept beside."""
    model = placed(rank, size)
    model.load_state_dict(model.state_dict())
    set_model_state_dict(model, net().state_dict(), options=StateDictOptions(full_state_dict=True))
    tracker, opt = attach(model, **OPTIONS) if size > 1 else attach_alone(model, **OPTIONS)
    train(model, tracker, opt, 3, part=batch_share(rank, size))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder(f"from{size}"))
    gradlr.save(folder(f"from{size}.gradlr"), model=model, optimizer=opt, epoch=1)
    train(model, tracker, opt, 3, part=batch_share(rank, size), start=3)
    result = whole(model)
    if rank == 0:
        torch.save({"model": result, "ratio": tracker.ratio}, folder(f"from{size}.expected"))


def _go_on(rank, size, source):
    model = placed(rank, size)
    tracker, opt = attach(model, **OPTIONS) if size > 1 else attach_alone(model, **OPTIONS)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder(f"from{source}"))
    set_model_state_dict(model, state["model"])
    if size > 1:
        set_optimizer_state_dict(model, opt, state["optimizer"])
    else:  # with "step", one process has a parameter for GradScaler in its groups, which torch's function does not know
        opt.load_state_dict(state["optimizer"])
    assert len(tracker.history) == 3
    assert all(int(opt.state[record.plan.parameter]["step"]) == 3 for record in opt.records)
    train(model, tracker, opt, 3, part=batch_share(rank, size), start=3)
    expected = torch.load(folder(f"from{source}.expected"), weights_only=True)
    for name, value in whole(model).items():
        # Rounding of float64, grown over three steps.
        torch.testing.assert_close(value, expected["model"][name], rtol=1e-9, atol=1e-9)
    assert tracker.ratio == pytest.approx(expected["ratio"], rel=1e-9)


def _go_on_with_another_rank(rank, size, source):
    """What `gradlr.save` has written, a file of one process or a folder of several; k and r are others now."""
    model = placed(rank, size)
    options = OPTIONS | {"momentum_rank": 2, "rank": 4}
    tracker, opt = attach(model, **options) if size > 1 else attach_alone(model, **options)
    assert gradlr.load(folder(f"from{source}.gradlr"), model=model, optimizer=opt) == {"epoch": 1}
    assert len(tracker.history) == 3
    state = opt.state_dict()["state"]
    known = [state[record.index]["P"] for record in opt.records if record.plan.kind == "matrix"]
    assert all(one.shape[1] == 2 and one[:, 0].any() and not one[:, 1].any() for one in known)
    train(model, tracker, opt, 1, part=batch_share(rank, size), start=3)
    after = opt.state_dict()["state"]
    assert all(after[record.index]["P"][:, 1].any() for record in opt.records if record.plan.kind == "matrix")
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    gradlr.load(folder(f"from{source}.gradlr"), model=model)
    assert not any(map(torch.equal, weights, model.parameters()))


@check(1, 2, 4)
def training_goes_on_from_any_number_of_processes(rank, size):
    for source in (1, 2, 4):
        _go_on(rank, size, source)


@check(1, 2, 4)
def training_goes_on_with_another_rank(rank, size):
    for source in (1, 2, 4):
        _go_on_with_another_rank(rank, size, source)


@check(2, 4)
def whole_state_dicts_are_those_of_one_process(rank, size):
    """full_state_dict=True: what rank 0 writes is a checkpoint of one process."""
    model, reference = placed(rank, size), net(seed=9)
    tracker, opt = attach(model, **OPTIONS)
    reference_tracker, reference_opt = attach_alone(reference, **OPTIONS)
    train(model, tracker, opt, 2, part=batch_share(rank, size))
    train(reference, reference_tracker, reference_opt, 2)
    options = StateDictOptions(full_state_dict=True)
    got = get_optimizer_state_dict(model, opt, options=options)
    expected = reference_opt.state_dict()
    for record in reference_opt.records:
        for key, value in expected["state"][record.index].items():
            if key != "R":  # columns of P and R may both change their sign
                torch.testing.assert_close(got["state"][record.plan.name][key].abs(), value.abs(), rtol=1e-9, atol=1e-9)
    reference_opt.load_state_dict(got)
    model_state = whole(model)
    reference.load_state_dict(model_state)
    train(model, tracker, opt, 2, part=batch_share(rank, size), start=2)
    train(reference, reference_tracker, reference_opt, 2, start=2)
    for name, value in whole(model).items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-9, atol=1e-9)
    # And back.
    set_optimizer_state_dict(model, opt, got, options=options)
    assert all(int(opt.state[record.plan.parameter]["step"]) == 2 for record in opt.records)


@check(2, 4)
def folders_are_written_whole(rank, size):
    """A second save replaces the first; one that fails, or is cut off, leaves it."""
    model = placed(rank, size)
    tracker, opt = attach(model, **OPTIONS)
    path = folder(f"whole{size}")
    for epoch in (1, 2):
        gradlr.save(path, model=model, optimizer=opt, epoch=epoch)
        train(model, tracker, opt, 1, part=batch_share(rank, size), start=epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "save", _no_space if rank == 1 else lambda *_, **__: None)
        with pytest.raises(OSError if rank == 1 else gradlr.ParallelError, match="no space"):
            gradlr.save(path, model=model, optimizer=opt, epoch=3)
    assert gradlr.load(path, model=model, optimizer=opt) == {"epoch": 2}
    distributed.barrier()
    if rank == 0:
        os.rename(path, path + ".old")  # as where a process was killed before it has given the new one its name
    distributed.barrier()
    assert gradlr.load(path, model=model, optimizer=opt) == {"epoch": 2}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(opt, "_load", _not_this_one)
        with pytest.raises(gradlr.CheckpointError if rank == 1 else gradlr.ParallelError, match="not this one") as told:
            gradlr.load(path, model=model, optimizer=opt)
        assert ("Nothing was changed" in str(told.value)) == (rank == 1)
    distributed.barrier()
    if rank == 0:
        rest = torch.load(path + ".old/gradlr.pt", weights_only=True)
        torch.save({**rest, "gradlr": 2}, path + ".old/gradlr.pt")
    distributed.barrier()
    with pytest.raises(gradlr.CheckpointError, match="has format 2"):
        gradlr.load(path, model=model, optimizer=opt)
    distributed.barrier()
    if rank == 0:
        os.remove(path + ".old/gradlr.pt")
    distributed.barrier()
    with pytest.raises(gradlr.CheckpointError, match="damaged, cut off"):
        gradlr.load(path, model=model, optimizer=opt)
    with pytest.MonkeyPatch.context() as patch:  # a disk that not all of them see
        patch.setattr("gradlr.checkpoint.file.is_folder", lambda path: rank != 1)
        with pytest.raises(gradlr.ParallelError, match=r"on rank 1, what is at .*: nothing; on rank 0: a folder"):
            gradlr.load(path, model=model, optimizer=opt)


@check(2, 4)
def what_has_the_shape_of_a_shard_is_loaded_as_it_was(rank, size):
    """R, of n x k numbers, may look like the shard."""
    options = {"rank": gradlr.ByLoss(8), "momentum_rank": 8, "apply": "step"}
    model, other = (shard_one(torch.nn.Linear(8, 8 * size, bias=False), seed) for seed in (0, 1))
    tracker, opt = attach(model, **options)
    for step in range(2):
        tracker(model(torch.randn(16, 8, generator=torch.Generator().manual_seed(step))).square().mean()).backward()
        opt.step()
    gradlr.save(folder(f"shape{size}"), model=model, optimizer=opt)
    _, other_opt = attach(other, **options)
    gradlr.load(folder(f"shape{size}"), model=other, optimizer=other_opt)
    (expected,), (found,) = opt.state.values(), other_opt.state.values()
    assert expected["R"].shape == model.weight.to_local().shape
    assert expected.keys() == found.keys()
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())


@check(2, 4)
def what_is_trained_beside_frozen_shards_is_saved(rank, size):
    model, other = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(2))
    for one in (model, other):
        parallelize_module(one, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(output_layouts=Replicate())})
        one[0].requires_grad_(False)
        torch.nn.init.eye_(one[1].weight)
        torch.nn.init.zeros_(one[1].bias)
    (tracker, opt), (_, other_opt) = attach(model), attach(other)
    tracker(model(torch.ones(4, 8)).square().mean()).backward()
    gradlr.save(folder(f"beside{size}"), model=model, optimizer=opt)
    gradlr.load(folder(f"beside{size}"), model=other, optimizer=other_opt)
    assert not torch.equal(model[1].weight, torch.eye(8)) and torch.equal(model[1].weight, other[1].weight)


def shard_one(layer, seed):
    torch.manual_seed(seed)
    torch.nn.init.normal_(layer.weight)
    return fully_shard(layer)


def _not_this_one(state_dict):
    raise gradlr.CheckpointError("not this one")


def _no_space(*_, **__):
    raise OSError("no space left on the disk")


@check(2, 4)
def whole_state_dicts_are_broadcast_to_a_fresh_optimizer(rank, size):
    """Torch's loader takes lists apart and drops what the other ranks' fresh optimizer lacks, such as losses."""
    model, other = placed(rank, size), placed(rank, size)
    tracker, opt = attach(model, **OPTIONS)
    train(model, tracker, opt, 2, part=batch_share(rank, size))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, opt, options=options)
    other_tracker, other_opt = attach(other, **OPTIONS)
    set_optimizer_state_dict(other, other_opt, saved if rank == 0 else {}, options=options)
    assert other_tracker.history == distributed_from_first(tracker.history) and other_tracker.ratio == tracker.ratio
    assert all(int(other_opt.state[record.plan.parameter]["step"]) == 2 for record in other_opt.records)


def distributed_from_first(value):
    told = [value]
    distributed.broadcast_object_list(told)
    return told[0]


@check(2, 4)
def a_checkpoint_without_a_parameter_changes_nothing(rank, size):
    model = placed(rank, size)
    tracker, opt = attach(model, **OPTIONS)
    train(model, tracker, opt, 1, part=batch_share(rank, size))
    state = opt.state_dict()
    before = {record.plan.name: opt.state[record.plan.parameter]["step"].item() for record in opt.records}
    damaged = {**state, "state": {key: value for key, value in state["state"].items() if key != 0}}
    with pytest.raises(gradlr.CheckpointError if rank == 0 else gradlr.ParallelError, match="lacks its state"):
        opt.load_state_dict(damaged if rank == 0 else state)
    assert before == {record.plan.name: opt.state[record.plan.parameter]["step"].item() for record in opt.records}
    distributed.barrier()
    assert loss_of(model, tokens_of(0)).isfinite() and isinstance(model, Net)
