"""The demo: what it leaves behind, and that an interrupted run ends where an uninterrupted one does."""

import contextlib
import io
import json
import signal

import pytest
import torch

import gradlr
import gradlr.apps.demo
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.pretrain import load_pretrained
from gradlr.apps.bench.transformer import evaluate
from gradlr.apps.cli import main
from gradlr.apps.demo import training


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Validate on one batch and save every other step."""
    few = FineTuning().validation()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "validation", lambda workload: few)
        patch.setattr(training, "SAVE_EVERY", 2)
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


def only(monkeypatch, index):
    """One method instead of both."""
    monkeypatch.setattr(gradlr.apps.demo, "METHODS", training.METHODS[index : index + 1])


def assert_same_model(one, other, name):
    left, right = (load_pretrained(folder / f"{name}-fine-tuned.pt").state_dict() for folder in (one, other))
    assert all(torch.equal(left[key], right[key]) for key in left)


def ratios(losses):
    return [loss / max(losses[: index + 1]) for index, loss in enumerate(losses)]


def decide_for(ratio):
    return gradlr.ByLoss(64)(gradlr.RankInputs(ratio, current=64, limit=128))


def interrupt_at(monkeypatch, method, step):
    """Ctrl-C, as the terminal sends it, in the middle of the run of one method."""
    real = training._step

    def step_and_interrupt(train_step, record, compute):
        if record.method == method and len(record.losses) == step:
            monkeypatch.setattr(training, "_step", real)
            signal.raise_signal(signal.SIGINT)
        real(train_step, record, compute)

    monkeypatch.setattr(training, "_step", step_and_interrupt)


def test_it_leaves_report_results_and_models(straight):
    folder, printed = straight
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    adamw, ours = results["records"]
    assert (len(adamw["losses"]), len(ours["losses"]), len(ours["ranks"])) == (5, 5, 5)
    assert adamw["losses"][0] == pytest.approx(ours["losses"][0], abs=1e-6)  # same model, same first batch
    assert [step for step, _ in ours["validation"]] == [0, 2, 4, 5]
    assert all(rank == decide_for(ratio) for rank, ratio in zip(ours["ranks"], ratios(ours["losses"]), strict=True))
    assert len(set(ours["ranks"])) > 1  # the rank follows the loss
    assert adamw["state_numbers"] == 2 * adamw["weights"]
    assert 40 * ours["state_numbers"] < adamw["state_numbers"]  # a fortieth
    assert ours["peak_bytes"] < adamw["peak_bytes"]
    model = load_pretrained(folder / "gradlr-fine-tuned.pt")
    assert evaluate(model, FineTuning().validation()) == pytest.approx(ours["validation"][-1][1], abs=1e-6)
    assert "1/44 of its state" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "adamw-fine-tuned.pt", "gradlr-fine-tuned.pt", "report.png", "results.json",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_and_ends_bit_for_bit_the_same(straight, tmp_path, monkeypatch, capsys):
    for method, step in (("adamw", 1), ("gradlr", 3)):
        interrupt_at(monkeypatch, method, step)
        assert demo(tmp_path) == 130
        assert f"after {step + 1} of 5 steps" in capsys.readouterr().out
    assert demo(tmp_path) == 0
    for name in ("adamw", "gradlr"):
        assert_same_model(straight[0], tmp_path, name)


def test_ctrl_c_outside_the_steps_is_told_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_measure_peak", interrupt)
    assert demo(tmp_path) == 130
    assert "The same command continues" in capsys.readouterr().out


def test_a_crash_goes_on_from_the_last_saved_step(straight, tmp_path, monkeypatch):
    only(monkeypatch, 1)
    real = training._step

    def crash(train_step, record, compute):
        if len(record.losses) == 3:
            raise MemoryError
        real(train_step, record, compute)

    monkeypatch.setattr(training, "_step", crash)
    with pytest.raises(MemoryError):
        demo(tmp_path)
    monkeypatch.setattr(training, "_step", real)
    assert demo(tmp_path) == 0
    assert_same_model(straight[0], tmp_path, "gradlr")


def test_fresh_and_other_settings_start_anew(tmp_path, monkeypatch, capsys):
    only(monkeypatch, 0)
    interrupt_at(monkeypatch, "adamw", 2)
    demo(tmp_path)
    assert demo(tmp_path, "--seed", "1") == 0
    assert "belongs to another run" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--steps", "0"], ["--device", "nonsense"], ["--seed", "-1"]])
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, options):
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert "gradlr:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unreadable_resume_file_names_the_way_out(tmp_path, capsys):
    (tmp_path / "adamw-resume.pt").write_bytes(b"no checkpoint")
    assert demo(tmp_path) == 2
    assert "--fresh" in capsys.readouterr().err
