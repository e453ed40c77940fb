"""What finetune says that it needs is what it takes; and what there is."""

import argparse

import pytest
from finetune.tiny import llama, text_file

from gradlr.apps import free_memory
from gradlr.apps.bench.memory import peak_bytes
from gradlr.apps.finetune import add_arguments

pytest.importorskip("trl")

from gradlr.apps.finetune.finetune_cli import _trainer
from gradlr.apps.finetune.run_folder import RunFolder
from gradlr.apps.finetune.task import Task


def task_of(tmp_path, model, *options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    data = text_file(tmp_path / "data.txt")
    given = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), *options]
    arguments, arguments.further = parser.parse_known_args([*given, "--use-cpu", "--length", "64", "--steps", "2"])
    return Task(arguments, tmp_path / "out" / "checkpoints")


# A model this small; gradlr's own advice.
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
@pytest.mark.parametrize(
    "options",
    [["--weights", "int8", "--capture", "adaptor", "--checkpointing"],
     pytest.param([], marks=pytest.mark.slow),
     pytest.param(["--accumulate", "2", "--weights", "bfloat16"], marks=pytest.mark.slow),
     pytest.param(["--packing-strategy", "bfd_split", "--batch-size", "2"], marks=pytest.mark.slow)],
    ids=["int8", "plain", "accumulated", "packed"],
)  # fmt: skip
def test_it_is_the_measured_peak(tmp_path, options):
    model = llama(tmp_path / "model", positions=64, width=128)
    task = task_of(tmp_path, model, "--batch-size", "8", *options)
    found = task.required_memory()
    folder = RunFolder(tmp_path / "out")
    trainer = _trainer(task, folder)
    task.config.eval_strategy, task.config.save_strategy, task.config.eval_on_start = "no", "no", False
    measured = found.weights + peak_bytes(trainer.train)
    # Of recomputed blocks the state of random numbers is not counted, 5 KiB each, nor what Trainer itself keeps.
    assert found.peak == pytest.approx(measured, rel=0.05)


def test_free_memory_is_no_more_than_the_machine_has():
    room = free_memory.available_bytes("cpu")
    assert room is None or 0 < room < 2**50


def test_a_control_group_limits_what_is_free(tmp_path):
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 600\ninactive_file 50\n")):
        (tmp_path / name).write_text(content)
    paths = [tmp_path / name for name in ("max", "current", "stat")]
    assert free_memory._room(*paths) == 350
    (tmp_path / "max").write_text("max")
    assert free_memory._room(*paths) is None
