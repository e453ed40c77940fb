"""The script for a GPU, run on a CPU with tiny models: nothing in it may break on the day that there is one."""

import json
import time

import pytest
import torch
from torch import nn

from gradlr.__main__ import main
from gradlr.apps.bench import gpu, speed
from gradlr.apps.bench.llama import Llama, LlamaShape, random_llama
from gradlr.apps.bench.peers import Peer
from gradlr.engine.compiled_updates import CompiledUpdates

OURS = {"adamw", "hook", "adaptor", "adaptor_no_residual", "step", "compiled"}
FIELDS = {"ms", "ratio", "tokens_per_s", "weights_mib", "peak_mib", "above_least_mib", "visit_s"}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """One visit of two steps each, a compiler that makes nothing, tests that are one."""
    for name, value in {"_WARM": 1, "_TIMED": 1, "_ROUNDS": 1, "TESTS": tmp_path / "tests"}.items():
        monkeypatch.setattr(gpu, name, value)
    gpu.TESTS.mkdir()
    (gpu.TESTS / "test_one.py").write_text("def test_one():\n    assert True\n")
    real = speed.measure_host
    monkeypatch.setattr(speed, "measure_host", lambda **options: real(**options, layers=2))
    monkeypatch.setattr(CompiledUpdates.__init__, "__defaults__", ("eager",))
    return tmp_path / "gpu.json"


def run(out, *words):
    assert main(["bench", "gpu", "--device", "cpu", "--out", str(out), *words]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("is_whole", [False, True])
def test_all_of_it_runs(is_whole, quick, capsys, monkeypatch):
    settings = gpu.SETTINGS["cpu"][0]
    if not is_whole:  # without packages, whose imports take longest, and what has no state
        settings = settings[1:]
        monkeypatch.setitem(gpu.SETTINGS, "cpu", [settings, []])
        methods = [one for one in gpu.methods() if not isinstance(one, Peer) and one.name not in ("sgd", "muon")]
        monkeypatch.setattr(gpu, "methods", lambda: methods)
        monkeypatch.setattr(gpu, "_COUNTED", ("hook", "adaptor"))
    report = run(quick, "--minutes", "10")
    assert report["environment"].keys() >= {"torch", "commit", "driver"}
    assert report["tests"]["passed"] and "1 passed" in report["tests"]["said"][0]
    assert all(row["seen"] >= row["counted"] > 0 for row in report["launches"])  # a CPU has no kernels of ours
    assert {row["name"] for row in report["host"]["results"]} >= {"muon", "hook"}
    names = {one.name for one in gpu.methods()} | {"compiled"}
    assert {row["name"] for row in report["results"]} == names >= OURS
    assert len(report["results"]) == len(settings) * len(names) - (len(settings) - 1)  # compiled in the first setting only
    for row in report["results"]:
        assert "error" not in row and row.keys() >= FIELDS, row
        assert row["peak_mib"] > 0 and row["ms"] > 0
    peaks = {row["name"]: row["above_least_mib"] for row in report["results"] if row["tokens"] == settings[0].tokens}
    assert peaks["adamw"] > peaks["dropped"] == 0 < peaks["hook"]
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in report["results"])


@pytest.mark.slow
def test_what_fails_or_has_no_time_left_is_told_in_its_place_and_the_rest_goes_on(quick, monkeypatch):
    monkeypatch.setattr(gpu, "TESTS", quick.parent / "nowhere")
    monkeypatch.setattr(gpu, "SUBJECTS", {"cpu": []})

    def broken(model, lr):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    plain, slow = gpu.Baseline("plain", "plain", gpu.dropped), gpu.Baseline("slow", "slow", lambda model, lr: time.sleep(60))
    monkeypatch.setattr(gpu, "methods", lambda: [plain, gpu.Baseline("broken", "broken", broken), slow])
    real = gpu._Run.__init__
    monkeypatch.setattr(gpu._Run, "__init__", lambda run, minutes, *rest: real(run, 20 / 60, *rest))
    report = run(quick)
    assert "is not there: run this in a checkout" in report["tests"]["error"]
    found = {(row["name"], row["tokens"]): row.get("error", "") for row in report["results"]}
    assert found["broken", 32] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert found["plain", 32] == "" and found["slow", 32] == found["plain", 64] == found["compiled", 32] == "no time left"


def test_the_largest_models_are_what_their_names_say():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in Llama(setting.shape).parameters()) for setting in gpu.SETTINGS["cuda"][0][:2]]
    assert sizes[0] == 1_235_814_400  # Llama 3.2 1B, by its model card 1.23 billion
    assert sizes[1] == 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32_000 * 4096 + 4096


def test_the_model_sees_no_later_tokens_and_knows_their_order():
    model = random_llama(LlamaShape(32, 48, 2, 4, 2, 64), "cpu", torch.float64)
    assert isinstance(model.head, nn.Linear) and model.head.weight is not model.embedding.weight
    tokens = torch.randint(64, (1, 8))
    changed, turned = tokens.clone(), tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 64
    turned[0, [0, 1]] = tokens[0, [1, 0]]
    with torch.no_grad():
        logits, others, swapped = model(tokens), model(changed), model(turned)
    torch.testing.assert_close(logits[:, :5], others[:, :5])
    assert not torch.allclose(logits[:, 5:], others[:, 5:])
    assert tokens[0, 0] == tokens[0, 1] or not torch.allclose(logits[:, 7], swapped[:, 7])
