"""The demo: what it leaves behind."""

import contextlib
import io
import json

import pytest

import gradlr
from gradlr.apps import demo as command
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.pretrain import load_pretrained
from gradlr.apps.bench.transformer import evaluate
from gradlr.apps.cli import main


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Validate on one batch, every other step."""
    few = FineTuning().validation()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "validation", lambda workload: few)
        patch.setattr(command, "VALIDATE_EVERY", 2)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing has interrupted, and what it has printed."""
    folder, printed = tmp_path_factory.mktemp("straight"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo(folder) == 0
    return folder, printed.getvalue()


def demo(folder, *options):
    return main(["demo", "--steps", "5", "--out", str(folder), *options])


def decided(losses):
    """The rank at each loss, by those before it."""
    tracker, found = gradlr.LossTracker(), []
    for loss in losses:
        tracker(loss)
        inputs = gradlr.RankInputs(tracker.ratio, current=80, limit=128, progress=tracker.progress)
        found.append(gradlr.ByProgress(80)(inputs))
    return found


def test_it_leaves_report_results_and_models(straight):
    folder, printed = straight
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    adamw, ours = results["records"]
    assert (len(adamw["losses"]), len(ours["losses"]), len(ours["ranks"])) == (5, 5, 5)
    assert adamw["losses"][0] == pytest.approx(ours["losses"][0], abs=1e-6)  # same model, same first batch
    assert [step for step, _ in ours["validation"]] == [0, 2, 4, 5]
    assert ours["ranks"] == decided(ours["losses"])  # all alike, as long as the losses' noise says nothing
    assert adamw["state_numbers"] == 2 * adamw["weights"]
    assert 40 * ours["state_numbers"] < adamw["state_numbers"]  # a fortieth
    assert ours["peak_bytes"] < adamw["peak_bytes"]
    model = load_pretrained(folder / "gradlr-fine-tuned.pt")
    assert evaluate(model, FineTuning().validation()) == pytest.approx(ours["validation"][-1][1], abs=1e-6)
    assert "1/120 of its state" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "adamw-fine-tuned.pt", "gradlr-fine-tuned.pt", "report.png", "results.json",
    ]  # fmt: skip


def test_ctrl_c_is_told_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_step", interrupt)
    assert demo(tmp_path) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--steps", "0"], ["--device", "nonsense"], ["--seed", "-1"]])
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, options):
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert "gradlr:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
