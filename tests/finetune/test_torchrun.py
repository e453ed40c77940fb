"""finetune under torchrun: replicas train what one process does, stop together and go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from finetune.sameness import assert_same, logged
from finetune.tiny import llama, text_file

import gradlr
from gradlr.apps.cli import main

ROOT = Path(gradlr.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow  # each start imports transformers and TRL in two processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("data") / "data.txt")


def command(model, data, out, *options):
    short = ["--length", "16", "--steps", "8", "--save-every", "3", "--eval-every", "4", "--log-every", "1", "--lr", "0.004"]
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--use-cpu", *short, *options]


def torchrun(arguments, log, port, program=("-m", "gradlr")):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *program]
    with log.open("w") as file:
        return subprocess.Popen([*launch, *arguments], env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)


def weights(out):
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


def test_two_processes_train_what_one_does_and_one_of_them_speaks(model, data, tmp_path):
    both, log = tmp_path / "both", tmp_path / "log"
    with torchrun(command(model, data, both, "--batch-size", "2"), log, 29541) as process:
        assert process.wait() == 0, log.read_text()
    assert log.read_text().count("training on 38 documents") == 1
    assert main(command(model, data, tmp_path / "one", "--batch-size", "4", "--max-grad-norm", "1e9")) == 0
    one = weights(tmp_path / "one")
    for name, weight in weights(both).items():
        # Sums in another order, in float32, which the polar factor enlarges: 5.2e-5 was measured, of weights that move by up to
        # 4e-3 a step, eight times.
        torch.testing.assert_close(weight, one[name], atol=2e-4, rtol=0)
    assert logged(both, "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-4)


def test_shards_train_what_one_process_does_and_are_written_whole(model, data, tmp_path):
    both, log, options = tmp_path / "both", tmp_path / "log", ["--rank", "1.0", "--lora-rank", "4"]
    shards = command(
        model, data, both, "--batch-size", "2", "--ddp-backend", "gloo", "--lora-out", str(tmp_path / "adapter"), *options
    )
    for _ in range(2):  # the second time all steps are taken, and it is only written again
        with torchrun(shards, log, 29545, [Path(__file__).with_name("as_on_gpus.py")]) as process:
            assert process.wait() == 0, log.read_text()
    assert main(command(model, data, tmp_path / "one", "--batch-size", "4", *options)) == 0
    one = weights(tmp_path / "one")
    for name, weight in weights(both).items():
        # As above: 6.5e-5 was measured.
        torch.testing.assert_close(weight, one[name], atol=2e-4, rtol=0)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_stopped_in_one_process_both_stop_and_started_again_they_end_the_same(model, data, tmp_path):
    straight, stopped, log = tmp_path / "straight", tmp_path / "stopped", tmp_path / "log"
    options = ["--batch-size", "2", "--steps", "40", "--save-every", "50"]
    with torchrun(command(model, data, straight, *options), log, 29542) as process:
        assert process.wait() == 0, log.read_text()
    with torchrun(command(model, data, stopped, *options), log, 29543) as process:
        while process.poll() is None and "steps on" not in log.read_text():
            time.sleep(0.01)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)
        assert process.wait() != 0
    assert "all of it saved in" in log.read_text()
    with torchrun(command(model, data, stopped, *options), log, 29544) as process:
        assert process.wait() == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert_same(straight, stopped)
