"""A run that was stopped or killed at any moment ends bit for bit as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from finetune.sameness import assert_same, history
from finetune.tiny import llama, text_file

import gradlr
from gradlr.apps.cli import main
from gradlr.apps.finetune.training import Finetuner

ROOT = Path(gradlr.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("data") / "data.txt")


def command(model, data, out, *options):
    short = ["--length", "16", "--batch-size", "4", "--steps", "10", "--save-every", "3", "--eval-every", "4", "--log-every", "1"]
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--use-cpu", *short, *options]


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


# At the beginning, in the middle of the first checkpoint, after it, in a later one, and while the model is written.
MOMENTS = ["run.json", "checkpoints/checkpoint-3/config.json", "checkpoints/checkpoint-3/whole",
           "checkpoints/checkpoint-9/optimizer.pt", ".model.part/config.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("moments", "options"),
    [(MOMENTS[1:4:2], []),
     (MOMENTS[2:3], ["--weights", "int8", "--accumulate", "2"]),
     pytest.param(MOMENTS[1:3], ["--weights", "int8", "--lr", "auto"], marks=pytest.mark.slow),
     pytest.param(MOMENTS, ["--weights", "bfloat16", "--capture", "adaptor", "--checkpointing"], marks=pytest.mark.slow),
     pytest.param(MOMENTS, ["--weights", "int8", "--capture", "adaptor"], marks=pytest.mark.slow)],
    ids=["plain", "int8", "found", "adaptor", "both"],
)  # fmt: skip
def test_killed_at_any_moment_it_ends_the_same(server, model, data, tmp_path, moments, options):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    status, log = forked(server, command(model, data, straight, *options), straight)
    assert status == 0, log.read_text()
    arguments = command(model, data, killed, *options)
    statuses = [forked(server, arguments, killed, seen=moment)[0] for moment in moments]
    assert statuses == [-signal.SIGKILL] * len(moments), log.read_text()
    status, log = forked(server, arguments, killed)
    assert status == 0, log.read_text()
    assert_same(straight, killed)
    assert sorted(path.name for path in killed.iterdir()) == [".lock", "checkpoints", "model", "run.json"]


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(server, model, data, tmp_path):
    out = tmp_path / "out"
    seen, by = "checkpoints/checkpoint-3/whole", int(signal.SIGTERM)
    found, log = forked(server, command(model, data, out, "--steps", "2000"), out, seen=seen, by=by)
    assert found == 128 + signal.SIGTERM, log.read_text()
    (last,) = (out / "checkpoints").iterdir()
    step = int(last.name.rpartition("-")[2])
    assert f"stopped after step {step} of 2000, all of it saved in {last}. The same command goes on" in log.read_text()
    assert history(out)[-1]["step"] == step


@pytest.mark.slow
def test_the_command_itself_killed_and_started_again(model, data, tmp_path):
    """As a user does it: python -m gradlr, kill -9, and the same line again."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(command(model, data, straight)) == 0
    line = [sys.executable, "-m", "gradlr", *command(model, data, killed)]
    with subprocess.Popen(line, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(killed.glob("checkpoints/*/whole")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert subprocess.run(line, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=True).returncode == 0
    assert_same(straight, killed)


def stop_at(monkeypatch, step, *numbers):
    """Ctrl-C as the terminal sends it, or SIGTERM, in the middle of a step."""
    real = Finetuner.training_step

    def stopped(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            monkeypatch.setattr(Finetuner, "training_step", real)
            for number in numbers:
                signal.raise_signal(number)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(Finetuner, "training_step", stopped)


def test_ctrl_c_and_sigterm_stop_after_the_step_and_it_goes_on_bit_for_bit(model, data, tmp_path, monkeypatch, capsys):
    options = ["--accumulate", "2", "--max-grad-norm", "1", "--weights", "bfloat16", "--momentum-rank", "2"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(command(model, data, straight, *options)) == 0
    for step, number, status in ((0, signal.SIGINT, 130), (4, signal.SIGTERM, 143)):
        stop_at(monkeypatch, step, number)
        assert main(command(model, data, stopped, *options)) == status
        assert f"stopped after step {step + 1} of 10" in capsys.readouterr().out
    # What takes part in nothing may change.
    assert main(command(model, data, stopped, *options, "--log-every", "1", "--checkpointing")) == 0
    assert "going on from step 5 of 10" in capsys.readouterr().out
    assert_same(straight, stopped)


@pytest.fixture
def _python_hears_ctrl_c():
    """As in a terminal: processes that run tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_hears_ctrl_c")
def test_a_second_ctrl_c_stops_at_once(model, data, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 0, signal.SIGINT, signal.SIGINT)
    assert main(command(model, data, tmp_path / "out")) == 130
    assert "goes on from the last checkpoint, if there is one" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_or_data_that_changed_is_no_longer_this_run(data, tmp_path, capsys):
    folder = llama(tmp_path / "model")
    assert main(command(folder, data, tmp_path / "out")) == 0
    moved = text_file(tmp_path / "moved.txt")
    assert main(command(folder, moved, tmp_path / "out")) == 0  # the same content
    assert main(command(folder, text_file(tmp_path / "more.txt", count=41), tmp_path / "out")) == 2
    assert "\n  data: " in capsys.readouterr().err
    llama(folder, positions=128)
    assert main(command(folder, data, tmp_path / "out")) == 2
    assert "\n  model: " in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main(command(model, data, tmp_path / "out", "--overwrite")) == 2
    assert "another process is training here" in capsys.readouterr().err
    assert main(command(model, data, tmp_path / "out")) == 0


def test_unreadable_settings_name_the_way_out(model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("[")
    assert main(command(model, data, tmp_path / "out")) == 2
    assert "run.json: cannot be read" in capsys.readouterr().err
    assert main(command(model, data, tmp_path / "out", "--overwrite")) == 0
