"""The quality benchmark: what it reports is what it measured."""

import dataclasses
import functools
import json
import math

import pytest

from gradlr.apps.bench import quality
from gradlr.apps.bench.baselines import BASELINES, baseline
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.workloads import WORKLOADS
from gradlr.apps.cli import main
from gradlr.errors import ArgumentError

TINY = FineTuning(steps=2, batch_size=2, length=32, validation_windows=16)
BEFORE = TINY.evaluate(TINY.model(0, "cpu"))["loss"]


@pytest.mark.parametrize(
    ("name", "matrix_state"),
    [
        ("adamw", 2.0),
        ("muon", 1.0),
        ("default", 0.0),
        ("muon_b0", 0.0),
        # k(m + n) for qkv 384 x 128, out 128 x 128, mlp 512 x 128 and 128 x 512, over their weights.
        ("k16_r64", 16 * (512 + 256 + 640 + 640) / (128 * (384 + 128 + 512 + 512))),
    ],
)
def test_state_per_weight_is_counted_from_the_optimizers_own_state(name, matrix_state):
    run = quality.train(baseline(name), 1e-3, seed=0, workload=TINY)
    assert run.matrix_state_per_weight == pytest.approx(matrix_state)
    assert run.loss > 0
    assert (run.mean_rank is None) == (not name.startswith(("k16", "default")))


# Forms of others in the list.
VARIANTS = ("adamw_b5", "adamw_slow_tables", "adamw_b0_slow_tables", "muon_b5", "apollo_mini", "factor_moments_adjusted")
ALL = [*BASELINES, "k4_r64_adaptor_step", "k16_r16_no_residual"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in ALL])
def test_every_baseline_trains_and_repeats_to_the_bit(name):
    first, second = (quality.train(baseline(name), 1e-3, seed=0, workload=TINY) for _ in range(2))
    assert first.loss == second.loss < BEFORE


@pytest.mark.parametrize("name", ["adamw", "default"])
def test_another_seed_is_another_run(name):
    one, other = (quality.train(baseline(name), 1e-3, seed=seed, workload=TINY) for seed in range(2))
    assert one.loss != other.loss


def test_a_run_that_diverges_is_infinitely_bad_and_ends_early():
    longer = dataclasses.replace(TINY, steps=6)
    run = quality.train(BASELINES["adamw"], 1e38, seed=0, workload=longer)
    assert run.loss == math.inf


def test_the_grid_grows_while_the_best_rate_lies_at_its_edge():
    def runs(losses):
        return {lr: quality.Run("x", lr, 0, {"loss": loss}, 0, 0.0, None, 0, None) for lr, loss in losses.items()}

    assert quality._beyond_the_edge(runs({1.0: 3.0, 2.0: 2.0, 4.0: 1.0})) == [8.0]
    assert quality._beyond_the_edge(runs({1.0: 1.0, 2.0: 2.0, 4.0: 3.0})) == [0.5]
    assert quality._beyond_the_edge(runs({1.0: 2.0, 2.0: 1.0, 4.0: math.inf})) == []


def test_the_command_writes_json_with_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "pretrained", functools.partial(FineTuning, length=32, validation_windows=16))
    monkeypatch.setattr(quality, "LARGEST_SWEEP", 4)
    out = tmp_path / "quality.json"
    options = ["--baselines", "adamw", "k1_r64", "--seeds", "2", "--steps", "1", "--batch-size", "1", "--jobs", "1"]
    assert main(["bench", "quality", *options, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"]
    assert report["workload"]["name"] == "pretrained"
    assert [row["name"] for row in report["results"]] == ["adamw", "k1_r64"]
    for row in report["results"]:
        assert len(row["losses"]) == 2
        assert min(row["sweep"].values()) == row["losses"][0]
        assert row["mean"] == pytest.approx(sum(row["losses"]) / 2, abs=1e-5)
        assert row["step_ms"] > 0
    assert report["results"][0]["state_bytes"] == 8 * 858_880
    assert "LowRankPolar k1 r64" in capsys.readouterr().out


def test_a_table_tells_of_divergence():
    run = {"label": "X", "best_lr": 1.0, "losses": [None], "mean": None, "spread": None, "state_bytes": 0,
           "matrix_state_per_weight": 0.0, "step_ms": 1.0}  # fmt: skip
    assert "diverged" in quality.table({"results": [run]})


@pytest.mark.parametrize(
    "options",
    [
        ["quality", "--seeds", "0"],
        ["quality", "--steps", "0"],
        ["quality", "--baselines", "k4_x9"],
        ["quality", "--width", "256"],
        ["quality", "--workload", "wide", "--width", "200"],
        ["memory", "--out", "missing/x.json"],
        ["speed", "--device", "nonsense"],
        ["speed", "--model", "transformer", "--width", "200"],
        ["speed", "--model", "transformer", "--tokens", "3"],
        ["memory", "--out", "/"],
        ["pareto", "x.json", "--out", "x.docx"],
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, capsys, monkeypatch):
    monkeypatch.setattr(quality, "measure", None)
    assert main(["bench", *options]) == 2
    assert options[-1] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["k4", "k4_r", "k4_r64_", "k4_r64_nonsense", "r64_k4", "k4_r64_step_x"])
def test_what_no_baseline_is_called_is_refused(name):
    with pytest.raises(ArgumentError, match="no baseline"):
        baseline(name)


def test_baselines_that_cannot_train_the_workload_are_not_an_empty_report():
    with pytest.raises(ArgumentError, match="none of lora can train scratch"):
        quality.measure(["lora"], [0], WORKLOADS["scratch"]())
