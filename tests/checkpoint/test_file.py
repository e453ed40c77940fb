"""save and load: one file, whole or not at all, and a run that goes on as if nothing had happened."""

import copy
import os
import random
import subprocess
import sys
import warnings
from collections import defaultdict, namedtuple
from pathlib import Path

import killed_writer
import pytest
import torch
from damage import damaged, is_refused, listed
from models import attached, mlp, regression
from safetensors.torch import load_file, save_file
from torch import nn

import gradlr
from gradlr import ArgumentError, CheckpointError
from gradlr.checkpoint.atomic import _prefix

WRITER = Path(killed_writer.__file__)
pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- killed at any moment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_moments_leaves_the_old_or_the_new_checkpoint(rounds, tmp_path):
    path, moments = tmp_path / "run.pt", random.Random(0)
    model, opt = killed_writer.checkpointed()
    gradlr.save(path, model=model, optimizer=opt, counter=0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WRITER), str(path)]
    counters, leftovers = [0], 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        # On a busy machine until it has written something, and was killed in the middle of a file.
        while len(counters) <= rounds or not (counters[-1] > 3 and leftovers):
            assert len(counters) < 200
            process.stdin.write(f"{counters[-1]} {moments.uniform(0.01, 0.12)}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"
            found = gradlr.load(path, model=model, optimizer=opt)
            counters.append(found["counter"])
            assert counters[-1] == 0 or {value.item() for p in model.parameters() for value in p.unique()} == {counters[-1]}
            leftovers += any(entry.suffix == ".part" for entry in tmp_path.iterdir())
        process.stdin.close()
    assert counters == sorted(counters)  # never back
    gradlr.save(path, model=model, optimizer=opt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


def test_files_of_the_living_are_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mine, living = (tmp_path / f"{_prefix(path, process)}abc.part" for process in (os.getpid(), other.pid))
        elsewhere = tmp_path / f"{path.name}.another_host-{2**22 + 1}.abc.part"  # no such process here, but perhaps there
        for file in (mine, living, elsewhere):
            file.touch()
        model, _, opt = attached()
        gradlr.save(path, model=model, optimizer=opt)
        assert mine.exists() and living.exists() and elsewhere.exists()
        other.communicate(b"\n")
    gradlr.save(path, model=model, optimizer=opt)
    assert mine.exists() and not living.exists() and elsewhere.exists()


def test_a_target_that_is_a_folder_leaves_nothing_behind(tmp_path):
    model, _, opt = attached()
    (tmp_path / "run.pt").mkdir()
    with pytest.raises(OSError, match="run.pt"):
        gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model, _, opt = attached()
    path = tmp_path / "run.pt"
    gradlr.save(path, model=model, optimizer=opt, epoch=1)
    before = path.read_bytes()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gradlr.save(path, model=model, optimizer=opt, epoch=2)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# -- goes on bit for bit -----------------------------------------------------------------------------------------------

RUNS = {
    "backward": {},
    "step": {"apply": "step"},
    "adaptor": {"capture": "adaptor"},
    "adaptor_step": {"capture": "adaptor", "apply": "step"},
    "one_sided": {"capture": "one_sided"},
    "one_sided_step": {"capture": "one_sided", "apply": "step"},
    "clipped": {"apply": "step", "max_grad_norm": 1e-2},
    "narrow_state": {"state_dtype": torch.bfloat16},
    "factors": {"rule": "factor_moments"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(RUNS))
def test_an_interrupted_run_ends_as_the_uninterrupted_one(name, dtype, tmp_path):
    def start(seed):
        options = {"rank": gradlr.ByLoss(8), "weight_decay": 0.1, **RUNS[name]}
        model, tracker, opt = attached(mlp(16, 3, dtype=dtype, seed=seed), seed=seed, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
        is_scaled = opt.apply == "step" and dtype == torch.float32
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2, enabled=is_scaled)
        return model, tracker, opt, scheduler, scaler

    def run(parts, steps):
        model, tracker, opt, scheduler, scaler = parts
        x, y = regression(16, dtype=dtype)
        for step in steps:
            opt.zero_grad()
            rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
            scaler.scale(tracker(nn.functional.mse_loss(model(x[rows]), y[rows]))).backward()
            scaler.step(opt)
            scaler.update()
            scheduler.step()

    one = start(0)
    run(one, range(4))
    path = tmp_path / "run.pt"
    gradlr.save(path, model=one[0], optimizer=one[2], scheduler=one[3], scaler=one[4], epoch=7)
    run(one, range(4, 8))
    other = start(5)
    found = gradlr.load(path, model=other[0], optimizer=other[2], scheduler=other[3], scaler=other[4])
    assert found == {"epoch": 7}
    run(other, range(4, 8))
    assert_same(weights(one[0]), weights(other[0]))
    assert str(one[2].state_dict()["gradlr"]) == str(other[2].state_dict()["gradlr"])
    assert one[4].state_dict() == other[4].state_dict()


CHANGES = [{"rank": 8}, {"momentum_rank": 4}, {"momentum_rank": 1}, {"state_dtype": torch.bfloat16}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_other_ranks_and_dtypes_go_on(changes, tmp_path):
    model, tracker, opt = attached(mlp(16, 3))
    x, y = regression(16)
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    for dtype in (torch.float32, torch.bfloat16):
        other, other_tracker, other_opt = attached(mlp(16, 3, dtype=dtype, seed=1), **changes)
        gradlr.load(tmp_path / "run.pt", model=other, optimizer=other_opt)
        assert_same([value.to(dtype) for value in weights(model)], weights(other))
        kept = min(changes.get("momentum_rank", 2), 2)
        for record in other_opt.records:
            if record.plan.kind == "matrix":
                old = dict(zip([s.plan.name for s in opt.records], opt.records, strict=True))[record.plan.name].plan.parameter
                new_r, old_r = other_opt.state[record.plan.parameter]["R"], opt.state[old]["R"]
                torch.testing.assert_close(new_r[:, :kept], old_r[:, :kept].to(new_r.dtype), rtol=0, atol=0)
                assert not new_r[:, kept:].any()
        other_tracker(nn.functional.mse_loss(other(x.to(dtype)), y.to(dtype))).backward()


# -- what is in it -----------------------------------------------------------------------------------------------------


def leaves(value):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from (*leaves(key), *leaves(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


@pytest.mark.parametrize("name", list(RUNS))
def test_a_state_dict_is_plain_and_its_tensors_fit_into_safetensors(name, tmp_path):
    model, tracker, opt = attached(mlp(16, 2), **RUNS[name])
    x, y = regression(16)
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    opt.step()
    state = opt.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {torch.Tensor, int, float, str, bool, type(None)}
    tensors = {f"{index}.{key}": value for index, entries in state["state"].items() for key, value in entries.items()}
    save_file(tensors, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(read[key], value) for key, value in tensors.items())
    torch.save(state, tmp_path / "state.pt")
    opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_plain_values_come_back_and_others_are_refused(tmp_path):
    model, _, opt = attached()
    values = {"epoch": 3, "name": "run", "best": 0.5, "order": torch.arange(3), "nested": {"a": [1, (2, None)]}}
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt, **values)
    found = gradlr.load(tmp_path / "run.pt", model=model, optimizer=opt)
    assert torch.equal(found.pop("order"), values.pop("order")) and found == values

    class Table(dict):
        pass

    pair = namedtuple("Pair", "a b")(1, 2)
    strangers = {"PosixPath": Path("/"), "Pair": pair, "defaultdict": defaultdict(int), "Table": Table()}
    for name, value in strangers.items():
        with pytest.raises(ArgumentError, match=f"'where' holds a {name}"):
            gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt, where=value)
    with pytest.raises(CheckpointError, match="'epoch' was saved as a plain value"):
        gradlr.load(tmp_path / "run.pt", model=model, optimizer=opt, epoch=0)


def test_a_model_that_fails_to_load_leaves_the_optimizer_as_it_was(tmp_path):
    class Picky(nn.Linear):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            raise ValueError("no")

    model, tracker, opt = attached(Picky(16, 16))
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    tracker(model(torch.randn(4, 16)).square().mean()).backward()
    with pytest.raises(ValueError, match="no"):
        gradlr.load(tmp_path / "run.pt", model=model, optimizer=opt)
    assert tracker.count == 1 and int(opt.state[model.weight]["step"]) == 1


def test_the_weights_alone_are_loaded_without_an_optimizer(tmp_path):
    model, _, opt = attached()
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    other = mlp(seed=3)
    gradlr.load(tmp_path / "run.pt", model=other)
    assert_same(weights(model), weights(other))
    with pytest.raises(FileNotFoundError, match="no folder .*missing; make it first"):
        gradlr.save(tmp_path / "missing" / "run.pt", model=model, optimizer=opt)


# -- refusals, and nothing changed -------------------------------------------------------------------------------------


def test_gradients_that_wait_are_refused(tmp_path):
    model, tracker, opt = attached(apply="step")
    x, y = regression(16)
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    with pytest.raises(CheckpointError, match=r"6 gradients wait for step\(\) \('0.weight' first\)"):
        gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt)
    assert not list(tmp_path.iterdir())


def remove(path):
    path.unlink()


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def replace_by_text(path):
    path.write_text("hello")


def replace_by_weights(path):
    torch.save(mlp().state_dict(), path)


FILES = {
    "missing": (remove, "there is no such file"),
    "cut off": (cut_off, "damaged, cut off"),
    "text": (replace_by_text, "damaged, cut off, or no checkpoint of gradlr.save"),
    "weights alone": (replace_by_weights, "no checkpoint of gradlr.save"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_files_that_are_no_checkpoint_are_named(name, tmp_path):
    spoil, message = FILES[name]
    model, _, opt = attached()
    path = tmp_path / "run.pt"
    gradlr.save(path, model=model, optimizer=opt)
    spoil(path)
    with pytest.raises(CheckpointError, match=f"run.pt: {message}"):
        gradlr.load(path, model=model, optimizer=opt)


OTHERS = {
    "fewer parameters": (lambda: (mlp(16, 2), {}), r"has, unlike the model, '4.bias' \(2 in all\)"),
    "more parameters": (lambda: (mlp(16, 4), {}), r"lacks '6.bias' \(2 in all\)"),
    "another shape": (lambda: (mlp(8, 3), {}), r"'0.weight' has shape \(16, 16\), the model's is \(8, 8\)"),
    "another rule": (lambda: (mlp(16, 3), {"rule": "factor_moments"}), "saved with rule 'low_rank_polar', attached with"),
    "another kind": (lambda: (mlp(16, 3), {"groups": [{"match": "*.weight", "kind": "table"}]}), "group"),
    "a frozen layer": (lambda: (frozen(), {}), "'0.weight' for one"),
}


def frozen():
    model = mlp(16, 3)
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_does_not_fit_is_named_and_nothing_is_changed(name, tmp_path):
    model, tracker, opt = attached(mlp(16, 3, seed=1))
    x, y = regression(16)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    tracker(nn.functional.mse_loss(model(x), y)).backward()
    scheduler.step()
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt, scheduler=scheduler)

    make, message = OTHERS[name]
    other, options = make()
    _, _, other_opt = attached(other, **options)
    other_scheduler = torch.optim.lr_scheduler.StepLR(other_opt, 1)
    before = copy.deepcopy((weights(other), other_opt.state_dict(), other_scheduler.state_dict()))
    with pytest.raises(CheckpointError, match=f"run.pt: .*({message})"):
        gradlr.load(tmp_path / "run.pt", model=other, optimizer=other_opt, scheduler=other_scheduler)
    assert_same(before[0], weights(other))
    assert str(before[1:]) == str((other_opt.state_dict(), other_scheduler.state_dict()))


def test_an_object_that_was_not_saved_is_named(tmp_path):
    model, _, opt = attached()
    gradlr.save(tmp_path / "run.pt", model=model, optimizer=opt, epoch=1)
    with pytest.raises(CheckpointError, match="no object was saved as 'scheduler'; there is epoch"):
        gradlr.load(tmp_path / "run.pt", model=model, optimizer=opt, scheduler=torch.optim.lr_scheduler.StepLR(opt, 1))


# -- the file itself ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX's")
def test_links_stay_links_and_modes_are_the_users(tmp_path):
    model, _, opt = attached()
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "run.pt", tmp_path / "run.pt"
    link.symlink_to(target)
    umask = os.umask(0o027)
    try:
        gradlr.save(link, model=model, optimizer=opt)
        assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
        target.chmod(0o604)
        gradlr.save(link, model=model, optimizer=opt)
    finally:
        os.umask(umask)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o604
    assert [entry.name for entry in target.parent.iterdir()] == ["run.pt"]


def test_no_flipped_bit_is_loaded(tmp_path):
    """Torch's own reader takes two thirds of them for weights, also where somebody has turned its checksums off."""
    model, _, opt = attached()
    path, generator = tmp_path / "run.pt", random.Random(0)
    torch.serialization.set_crc32_options(False)
    try:
        gradlr.save(path, model=model, optimizer=opt, epoch=3)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        flipped, place = bytearray(whole), generator.randrange(8 * len(whole))
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        other = mlp(seed=1)
        if is_refused(lambda: gradlr.load(path, model=other)):  # noqa: B023 (called at once)
            refused += 1
        else:  # the bit was in the gaps between the parts
            assert_same(weights(model), weights(other))
    assert refused > 40


def test_a_file_with_any_entry_damaged_is_refused_whole_or_loaded(tmp_path):
    path, taken, refused = tmp_path / "run.pt", 0, 0

    def start():
        model, _, opt = attached(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)))
        return {"model": model, "optimizer": opt, "scheduler": torch.optim.lr_scheduler.StepLR(opt, 1)}

    gradlr.save(path, **start(), epoch=3)
    content, things = torch.load(path, weights_only=True), start()
    optimizer = content.pop("optimizer")  # its own entries: tests/engine/test_state_dict.py
    before = listed([thing.state_dict() for thing in things.values()])
    for where, index, spoiled in list(damaged(content))[::3]:  # a third: reading a file takes its time
        torch.save({"optimizer": optimizer, **spoiled}, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_refused(lambda: gradlr.load(path, **things)):  # noqa: B023 (called at once)
                refused += 1
                assert listed([thing.state_dict() for thing in things.values()]) == before, (where, index)
                continue
        taken, things = taken + 1, start()
        before = listed([thing.state_dict() for thing in things.values()])
    assert refused > taken > 0


def test_a_scheduler_that_is_forgotten_or_another_one_is_told(tmp_path):
    schedulers = torch.optim.lr_scheduler
    model, _, opt = attached()
    path = tmp_path / "run.pt"
    gradlr.save(path, model=model, optimizer=opt, scheduler=schedulers.StepLR(opt, 1), epoch=1)
    with pytest.warns(gradlr.GradlrWarning, match=r"'scheduler' \(StepLR\) was saved and is not given.*scheduler=None"):
        gradlr.load(path, model=model, optimizer=opt)
    assert gradlr.load(path, model=model, optimizer=opt, scheduler=None) == {"epoch": 1}
    with pytest.raises(CheckpointError, match="saved as a StepLR and is a ExponentialLR now.*Nothing was changed"):
        gradlr.load(path, model=model, optimizer=opt, scheduler=schedulers.ExponentialLR(opt, 0.9))
    content = torch.load(path, weights_only=True)
    del content["more"]["scheduler"]["class"]  # as written before classes were
    torch.save(content, path)
    gradlr.load(path, model=model, optimizer=opt, scheduler=schedulers.StepLR(opt, 1))
