"""The quality benchmark: what it reports is what it measured."""

import json

import pytest

from gradlr.bench import quality
from gradlr.bench.contenders import CONTENDERS
from gradlr.cli import main

TINY = quality.Workload(steps=2, batch_size=2, validation_windows=16)


@pytest.mark.parametrize(
    ("name", "matrix_state"),
    [
        ("adamw", 2.0),
        ("muon", 1.0),
        # k(m + n) for qkv 384 x 128, out 128 x 128, mlp 512 x 128 and 128 x 512, over their weights.
        ("k4_by_loss", 4 * (512 + 256 + 640 + 640) / (128 * (384 + 128 + 512 + 512))),
        ("k16_r64", 16 * (512 + 256 + 640 + 640) / (128 * (384 + 128 + 512 + 512))),
    ],
)
def test_state_per_weight_is_counted_from_the_optimizers_own_state(name, matrix_state):
    run = quality.fine_tune(CONTENDERS[name], 1e-3, seed=0, workload=TINY)
    assert run.matrix_state_per_weight == pytest.approx(matrix_state)
    assert run.validation_loss > 0


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_contender_trains_and_repeats_to_the_bit(name):
    first, second = (quality.fine_tune(CONTENDERS[name], 1e-3, seed=0, workload=TINY) for _ in range(2))
    assert first.validation_loss == second.validation_loss
    other = quality.fine_tune(CONTENDERS[name], 1e-3, seed=1, workload=TINY)
    assert first.validation_loss != other.validation_loss


def test_the_grid_grows_while_the_best_rate_lies_at_its_edge():
    def runs(losses):
        return {lr: quality.Run("x", lr, 0, loss, 0.0, 0.0) for lr, loss in losses.items()}

    assert quality._beyond_the_edge(runs({1.0: 3.0, 2.0: 2.0, 4.0: 1.0})) == [8.0]
    assert quality._beyond_the_edge(runs({1.0: 1.0, 2.0: 2.0, 4.0: 3.0})) == [0.5]
    assert quality._beyond_the_edge(runs({1.0: 2.0, 2.0: 1.0, 4.0: 3.0})) == []


def test_the_command_writes_json_with_the_environment(tmp_path, capsys):
    out = tmp_path / "quality.json"
    options = ["--contenders", "adamw", "k1_r64", "--seeds", "2", "--steps", "1", "--batch-size", "1", "--jobs", "1"]
    assert main(["bench", "quality", *options, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"]
    assert [row["name"] for row in report["results"]] == ["adamw", "k1_r64"]
    for row in report["results"]:
        assert len(row["losses"]) == 2
        assert min(row["sweep"].values()) == row["losses"][0]
        assert row["mean"] == pytest.approx(sum(row["losses"]) / 2, abs=1e-5)
    assert "TrackedMomentum k1 r64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["quality", "--seeds", "0"],
        ["quality", "--steps", "0"],
        ["memory", "--out", "missing/x.json"],
        ["speed", "--device", "nonsense"],
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, capsys, monkeypatch):
    monkeypatch.setattr(quality, "measure", None)
    assert main(["bench", *options]) == 2
    assert options[1] in capsys.readouterr().err
