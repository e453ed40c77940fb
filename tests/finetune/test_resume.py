"""A run that was stopped or killed at any moment ends bit for bit as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune.sameness import assert_same, history
from finetune.tiny import llama, text_file

import gradlr
from gradlr.apps.cli import main
from gradlr.apps.finetune import loop
from gradlr.apps.finetune.run_folder import RunFolder

ROOT = Path(gradlr.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}

# A model this small; gradlr's own advice.
pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("data") / "data.txt")


def command(model, data, out, *options):
    short = ["--length", "16", "--batch-size", "4", "--steps", "10", "--save-every", "3", "--eval-every", "4", "--log-every", "1"]
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", *short, *options]


@pytest.fixture(scope="module")
def server():
    """Starts commands in forked processes and kills them; see tiny.py."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "finetune.tiny"], **pipes, env=ENVIRONMENT, cwd=ROOT) as process:
        yield process
        process.stdin.close()


def forked(server, arguments, out, **kill):
    log = out.with_suffix(".log")
    request = {"arguments": arguments, "out": str(out), "log": str(log), "kill": kill}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline()), log


@pytest.fixture(scope="module")
def straight(server, model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    assert forked(server, command(model, data, out), out)[0] == 0
    return out


def assert_killed_ends_the_same(server, arguments, straight, killed, moments):
    statuses = [forked(server, arguments, killed, **moment)[0] for moment in moments]
    assert statuses[:2] == [-signal.SIGKILL] * 2  # once before the first checkpoint, once while it is written
    status, log = forked(server, arguments, killed)
    assert status == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert_same(straight, killed)
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "log.jsonl", "model", "run.json"]


def test_killed_before_the_first_checkpoint_and_while_it_is_written_it_ends_the_same(server, straight, model, data, tmp_path):
    killed = tmp_path / "killed"
    moments = [{"step": 1}, {"is_writing": True}, {"step": 5}]
    assert_killed_ends_the_same(server, command(model, data, killed), straight, killed, moments)


@pytest.mark.slow
def test_killed_often_and_at_random_it_ends_the_same(server, straight, model, data, tmp_path):
    killed, draw = tmp_path / "killed", random.Random(0)
    moments = [{"step": 1}, {"is_writing": True}, {"step": 5}, {"is_writing": True}, {"seconds": draw.uniform(0.1, 1)}]
    assert_killed_ends_the_same(server, command(model, data, killed), straight, killed, moments)


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(server, model, data, tmp_path):
    out = tmp_path / "out"
    found, log = forked(server, command(model, data, out, "--steps", "2000"), out, step=1, by=int(signal.SIGTERM))
    assert found == 128 + signal.SIGTERM, log.read_text()
    step = torch.load(out / "checkpoint.pt", weights_only=True)["more"]["done"]["value"]["step"]
    saved = f"stopped after step {step} of 2000, all of it saved in {out / 'checkpoint.pt'}. The same command goes on"
    assert saved in log.read_text()
    assert history(out)[-1]["step"] == step


@pytest.mark.slow
def test_the_command_itself_killed_and_started_again(data, tmp_path):
    """As a user does it: python -m gradlr, kill -9, and the same line again."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(command("builtin", data, straight)) == 0
    line = [sys.executable, "-m", "gradlr", *command("builtin", data, killed)]
    with subprocess.Popen(line, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert subprocess.run(line, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=True).returncode == 0
    assert_same(straight, killed)


def stop_at(monkeypatch, step, number):
    """Ctrl-C as the terminal sends it, or SIGTERM, in the middle of a step."""
    real = loop._step

    def stopped(run):
        if run.done.step == step:
            monkeypatch.setattr(loop, "_step", real)
            signal.raise_signal(number)
        return real(run)

    monkeypatch.setattr(loop, "_step", stopped)


@pytest.mark.parametrize(
    "options",
    [
        ["--accumulate", "2", "--max-grad-norm", "1", "--bf16"],
        pytest.param(["--capture", "one_sided", "--checkpointing"], marks=pytest.mark.slow),
    ],
    ids=["accumulated", "one-sided"],
)
def test_every_way_of_training_goes_on_bit_for_bit(model, data, tmp_path, monkeypatch, capsys, options):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(command(model, data, straight, *options)) == 0
    for step, number, status in ((1, signal.SIGINT, 130), (4, signal.SIGTERM, 143)):
        stop_at(monkeypatch, step, number)
        assert main(command(model, data, stopped, *options)) == status
        assert f"stopped after step {step + 1} of 10" in capsys.readouterr().out
    assert main(command(model, data, stopped, *options)) == 0
    assert_same(straight, stopped)


@pytest.fixture
def _python_hears_ctrl_c():
    """As in a terminal: processes that run tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_hears_ctrl_c")
def test_a_second_ctrl_c_stops_at_once(model, data, tmp_path, monkeypatch, capsys):
    def twice(run):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_step", twice)
    assert main(command(model, data, tmp_path / "out")) == 130
    assert "goes on from the last checkpoint, if there is one" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_or_data_that_changed_is_no_longer_this_run(data, tmp_path, capsys):
    folder = llama(tmp_path / "model")
    main(command(folder, data, tmp_path / "out"))
    moved = text_file(tmp_path / "moved.txt")
    assert main(command(folder, moved, tmp_path / "out")) == 0  # the same content
    assert main(command(folder, text_file(tmp_path / "more.txt", count=41), tmp_path / "out")) == 2
    assert "\n  data: " in capsys.readouterr().err
    llama(folder, positions=128)
    assert main(command(folder, data, tmp_path / "out")) == 2
    assert "\n  model: " in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(model, data, tmp_path, capsys):
    pytest.importorskip("fcntl")
    other = RunFolder(tmp_path / "out")
    other.open({}, is_overwritten=False)
    assert main(command(model, data, tmp_path / "out", "--overwrite")) == 2
    assert "another process is training here" in capsys.readouterr().err
    other.close()
    assert main(command(model, data, tmp_path / "out", "--overwrite")) == 0


def test_an_unreadable_note_names_the_way_out(model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("[")
    assert main(command(model, data, tmp_path / "out")) == 2
    assert "run.json: cannot be read" in capsys.readouterr().err
    assert main(command(model, data, tmp_path / "out", "--overwrite")) == 0
