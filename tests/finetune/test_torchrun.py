"""`torchrun -m gradlr finetune --shard`: two processes train what one does, and end the same however often they are killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from finetune.sameness import assert_same, history
from finetune.tiny import WORDS, jsonl_file, llama, logged_step
from safetensors.torch import load_file

import gradlr
from gradlr import ArgumentError
from gradlr.apps.bench.pretrain import load_pretrained
from gradlr.apps.cli import main
from gradlr.apps.finetune.task import require_divisible

ROOT = Path(gradlr.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 12
PATIENCE = 120  # seconds until something that was to happen counts as hanging

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Completions of all lengths, so that the processes have different numbers of tokens to learn."""
    draw = random.Random(0)

    def some(most):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    records = [{"prompt": some(30), "completion": f" {some(9)}"} for _ in range(60)]
    return jsonl_file(tmp_path_factory.mktemp("data") / "data.jsonl", records)


def command(data, out, *options):
    # With full rank, directions of rounding errors would count as much as any other, and differ with the number of processes.
    short = ["--length", "16", "--batch-size", "4", "--rank", "4", "--steps", str(STEPS), "--save-every", "3"]
    every = ["--eval-every", "6", "--log-every", "1", "--device", "cpu", "--shard", "dp"]
    return ["finetune", "--model", "builtin", "--data", str(data), "--out", str(out), *short, *every, *options]


class Launched:
    """torchrun with two processes; ended with all of them."""

    def __init__(self, arguments, log, *options):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        self._log = log
        with log.open("w") as output:
            line = [*launch, "-m", "gradlr", *arguments]
            self.process = subprocess.Popen(line, env=ENVIRONMENT, stdout=output, stderr=output)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        workers = self.workers()  # before torchrun goes, whose children they are
        self.process.kill()
        self.process.wait()
        for process in workers.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def workers(self):
        """Rank → process, of those that live."""
        if self.process.poll() is not None:
            return {}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                rank = re.search(rb"\0RANK=(\d+)", (entry / "environ").read_bytes()) if parent == self.process.pid else None
            except OSError:  # ended meanwhile, or somebody else's
                continue
            if rank:
                found[int(rank[1])] = int(entry.name)
        return found

    def wait_for(self, is_reached):
        """Until something has happened; an error where the run has ended before."""
        deadline = time.monotonic() + PATIENCE
        while not is_reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.told()
            time.sleep(0.001)

    def end(self):
        """torchrun's exit status, and what it and the processes have printed."""
        return self.process.wait(timeout=PATIENCE), self.told()

    def told(self):
        return self._log.read_text()


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    with Launched(command(data, out), out.with_suffix(".log")) as run:
        status, told = run.end()
    assert status == 0, told
    assert "Warning" not in told
    return out, told


def test_two_processes_train_what_one_does_and_one_of_them_speaks(straight, data, tmp_path, monkeypatch):
    out, told = straight
    assert "2 processes (--shard dp), each with 2 of each 4 sequences; for each of them, memory about" in told
    assert told.count(f"wrote {out / 'model'}") == told.count("model builtin") == told.count("before training") == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(command(data, tmp_path / "one")) == 0
    assert not torch.distributed.is_initialized()
    for one, two in zip(history(tmp_path / "one"), history(out), strict=True):
        # Sums of float32 in another order, grown over twelve steps.
        assert {**one, "loss": 0, "validation_loss": 0} == {**two, "loss": 0, "validation_loss": 0}
        assert [one.get(key) for key in ("loss", "validation_loss")] == [
            pytest.approx(two[key], rel=1e-4) if key in two else None for key in ("loss", "validation_loss")
        ]


def stopped_and_saved(out, told):
    """The step after which both have ended, none waiting for the other."""
    step = torch.load(out / "checkpoint.pt", weights_only=True)["more"]["done"]["value"]["step"]
    assert f"stopped after step {step} of {STEPS}, all of it saved in {out / 'checkpoint.pt'}" in told, told
    assert 0 < step < STEPS and history(out)[-1]["step"] == step and "gradlr: " not in told
    return step


def stop_one(run, out, step):
    """One process is told to stop, and both do; torchrun starts them again. The step after which they stopped."""
    # An earlier run may have come as far: its log is cut back to the checkpoint, and grows again.
    reached = max(step, logged_step(out) + 1)
    run.wait_for(lambda: logged_step(out) >= reached)
    os.kill(run.workers()[1], signal.SIGTERM)
    run.wait_for(lambda: "stopped after" in run.told())
    return stopped_and_saved(out, run.told())


@pytest.mark.slow
def test_stopped_in_one_process_both_stop_and_started_again_they_end_the_same(straight, data, tmp_path):
    out = tmp_path / "out"
    with Launched(command(data, out, "--overwrite"), tmp_path / "log", "--max-restarts", "1") as run:
        step = stop_one(run, out, 2)
        status, told = run.end()
    assert status == 0, told
    assert told.count("going on from step") == 1 and f"going on from step {step} of {STEPS}" in told
    assert_same(straight[0], out)


@pytest.mark.slow
def test_killed_stopped_and_started_again_they_end_the_same(straight, data, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    with Launched(command(data, out), log) as run:  # all of them killed while a checkpoint is written
        run.wait_for(lambda: logged_step(out) >= 2)
        run.wait_for(lambda: list(out.glob("checkpoint.pt.*.part")))
    with Launched(command(data, out), log) as run:  # the signal that torchrun hands on to all
        run.wait_for(lambda: logged_step(out) >= 4)
        run.process.send_signal(signal.SIGTERM)
        status, told = run.end()
    assert status != 0
    stopped_and_saved(out, told)
    with Launched(command(data, out, "--save-every", "5"), log, "--max-restarts", "2") as run:
        step = stop_one(run, out, 6)
        run.wait_for(lambda: logged_step(out) >= step + 2)
        os.kill(run.workers()[1], signal.SIGKILL)
        status, told = run.end()
    assert status == 0, told
    assert told.count("going on from step") == 3 and f"going on from step {step} of {STEPS}" in told
    assert_same(straight[0], out)


def sharded(data, out, *options):
    return command(data, out, "--steps", "8", "--save-every", "2", "--shard", "fsdp", *options)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
def test_shards_train_what_one_process_does(data, tmp_path, is_killed):
    """`--shard fsdp`; where one of the processes is killed, torchrun starts both again."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    with Launched(sharded(data, out), tmp_path / "log", "--max-restarts", "1") as run:
        if is_killed:
            run.wait_for(lambda: logged_step(out) >= 3)
            os.kill(run.workers()[1], signal.SIGKILL)
        status, told = run.end()
    assert status == 0, told
    assert told.count("going on from step") == is_killed
    line = [one for one in sharded(data, alone) if one not in ("--shard", "dp", "fsdp")]
    assert main(line) == 0
    for one, two in zip(history(alone), history(out), strict=True):
        # Sums of float32 in another order, grown over eight steps.
        assert [one.get(key) for key in ("step", "loss", "validation_loss")] == [
            pytest.approx(two[key], rel=1e-4) if key in two else None for key in ("step", "loss", "validation_loss")
        ]
    trained, other = (load_pretrained(path / "model" / "byte-transformer.pt").state_dict() for path in (out, alone))
    before = load_pretrained().state_dict()
    # Softmax knows no bias of keys: its gradient is rounding, which Adam makes large.
    for name in (name for name in trained if not name.endswith("qkv.bias")):
        # A weak direction turns by rounding: half a percent of what eight steps have changed was seen, in an MLP's weight.
        assert (trained[name] - other[name]).norm() < 0.02 * (trained[name] - before[name]).norm(), name


@pytest.mark.slow
def test_shards_are_killed_and_started_again_and_end_the_same(data, tmp_path):
    """Bit for bit: killed while shards are written, and straight through."""
    folder = str(llama(tmp_path / "llama"))
    results = []
    for name in ("straight", "killed"):
        out = tmp_path / name
        line = sharded(data, out, "--model", folder)
        if name == "killed":
            with Launched(line, tmp_path / "log") as run:
                run.wait_for(lambda: logged_step(out) >= 3)  # noqa: B023 (called at once)
                run.wait_for((out / "checkpoints.part").exists)
        with Launched(line, tmp_path / "log") as run:
            status, told = run.end()
        assert status == 0, told
        assert ("going on from step" in told) == (name == "killed") and "Warning" not in told
        results.append((load_file(out / "model" / "model.safetensors"), history(out)))
    (straight, log), (killed, other_log) = results
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)
    losses = [one["loss"] for one in log if "loss" in one]
    assert log == other_log and losses[-1] < losses[0]


def refusal(capsys, data, tmp_path, *options):
    assert main(command(data, tmp_path / "out", *options)) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_one_without_the_other_is_told(data, tmp_path, monkeypatch, capsys):
    assert "torchrun --standalone --nproc-per-node GPUS -m gradlr finetune ... --shard dp" in refusal(capsys, data, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [one for one in command(data, tmp_path / "out") if one not in ("--shard", "dp")]
    assert main(arguments) == 2
    assert "torchrun has started 2 processes, which would each train alone" in (error := capsys.readouterr().err)
    assert "add --shard dp" in error


def test_a_batch_that_does_not_divide_is_told():
    with pytest.raises(ArgumentError, match=r"--batch-size 5 is that of all 2 processes together.*: give 4"):
        require_divisible(5, 2)
    with pytest.raises(ArgumentError, match=r"--batch-size 1 .*: give 4"):
        require_divisible(1, 4)
