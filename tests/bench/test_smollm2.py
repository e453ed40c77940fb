"""SmolLM2 in its cut of two layers, and the file that runs are kept in."""

import dataclasses
import importlib.util
import json
import math

import pytest
import torch

from gradlr.apps.bench import quality, smollm2
from gradlr.apps.bench.baselines import baseline
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.workloads import WORKLOADS

TINY = FineTuning(steps=2, batch_size=2, length=16, validation_windows=16)


def run_of(name="default", lr=1e-3, seed=0, loss=1.5):
    return quality.Run(name, lr, seed, {"loss": loss, "general": 2.5}, 10, 0.0, None, 20, 3.0)


def test_runs_are_read_again_as_they_were_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    store = quality.RunStore(path, TINY, "cpu")
    runs = [run_of(), run_of(lr=2e-3, loss=math.inf), run_of(seed=1), run_of("adamw")]
    for run in runs:
        store.add(run)
    again = quality.RunStore(path, TINY, "cpu")
    assert list(again) == runs == list(store)
    assert again("default", 1e-3, 1) == runs[2] and again("default", 4e-3, 0) is None
    assert again.sweep("default", 0) == {1e-3: runs[0], 2e-3: runs[1]}


def test_runs_of_another_workload_size_or_device_are_left_alone(tmp_path):
    path = tmp_path / "runs.jsonl"
    quality.RunStore(path, TINY, "cpu").add(run_of())
    assert list(quality.RunStore(path, dataclasses.replace(TINY, steps=3), "cpu")) == []
    assert list(quality.RunStore(path, TINY, "cuda")) == []
    assert len(path.read_text().splitlines()) == 1


def test_a_report_of_a_store_tells_sweep_spread_and_what_is_forgotten():
    store = quality.RunStore(None, TINY, "cpu")
    for run in (run_of(), run_of(lr=2e-3, loss=1.25), run_of(lr=2e-3, seed=1, loss=1.75), run_of("muon", seed=1)):
        store.add(run)
    found = quality.report([baseline("default"), baseline("muon")], [0, 1, 2], store, TINY)
    (row,) = found["results"]  # nothing of muon at the first seed
    assert row["best_lr"] == 2e-3 and row["losses"] == [1.25, 1.75] and row["mean"] == 1.5 and row["step_ms"] == 3.0
    assert row["sweep"] == {"0.001": 1.5, "0.002": 1.25} and row["general_sweep"] == {"0.001": 2.5, "0.002": 2.5}
    assert "general loss" in quality.table(found) and json.dumps(found)


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    path, rates = tmp_path / "runs.jsonl", baseline("default").rates
    store = quality.RunStore(path, TINY, "cpu")
    for lr in rates:
        store.add(run_of(lr=lr, loss=1.0 + abs(lr - rates[1])))
    monkeypatch.setattr(quality, "_step_times", lambda names, workload, device: dict.fromkeys(names, 7.0))
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Immediate)
    report = quality.measure(["default"], [0], TINY, resume=path)
    assert report["results"][0]["best_lr"] == rates[1] and report["results"][0]["step_ms"] == 7.0
    assert len(path.read_text().splitlines()) == len(rates)


class Immediate:
    """An executor whose work is done by the time that it is asked for; training is none of it."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, work, *args):
        assert work is not quality._train_by_name
        result = work(*args)
        return type("Done", (), {"result": lambda self: result})()


needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in smollm2.NEEDED),
    reason=f"needs {', '.join(smollm2.NEEDED)}: pip install 'gradlr[bench]'",
)


@needs_model
@pytest.mark.parametrize("name", ["smollm2", pytest.param("smollm2-chat", marks=pytest.mark.slow)])
def test_its_cut_of_two_layers_trains(name):
    workload = WORKLOADS[name](steps=3, layers=2, length=48, validation_windows=4)
    before = workload.evaluate(workload.model(0, "cpu"))
    run = quality.train(baseline("default"), 4e-4, 0, workload)
    # Two of thirty layers know nothing: the loss falls by nats at once.
    assert run.metrics["loss"] < before["loss"] - 0.5 and run.metrics["general"] != before["general"]
    assert run.matrix_state_per_weight == 0 and run.state_bytes > 0 and run.peak_bytes > 0 and run.step_ms > 0


@needs_model
def test_what_is_learned_what_is_held_out_and_what_is_general_differ():
    learned, held_out = smollm2.messages()
    assert not {english for _, english, _ in learned} & {english for _, english, _ in held_out}
    assert {language for language, _, _ in held_out} == set(smollm2.LANGUAGES)
    (inputs, targets), _ = WORKLOADS["smollm2-chat"]().data()
    text = smollm2.tokenizer().decode(inputs[0])
    answer = smollm2.tokenizer().decode(targets[0][targets[0] >= 0])
    assert "Translate into Danish" in text and answer.endswith("<|im_end|>") and "Translate" not in answer
    assert torch.equal(smollm2.general_windows(64)[0][:, 1:], smollm2.general_windows(64)[1][:, :-1])
