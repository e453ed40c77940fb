"""The demo: what it leaves behind, and that an interrupted run ends where an uninterrupted one does."""

import json
import signal

import pytest
import torch

import gradlr
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.pretrain import load_pretrained
from gradlr.apps.bench.transformer import evaluate
from gradlr.apps.cli import main
from gradlr.apps.demo import training


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Validate on one batch and save every other step."""
    few = FineTuning().validation()[:1]
    monkeypatch.setattr(FineTuning, "validation", lambda workload: few)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)


def demo(folder, *options):
    return main(["demo", "--steps", "5", "--out", str(folder), *options])


def models(folder):
    return [load_pretrained(folder / f"{name}-fine-tuned.pt").state_dict() for name in ("adamw", "gradlr")]


def ratios(losses):
    return [loss / max(losses[: index + 1]) for index, loss in enumerate(losses)]


def decide_for(ratio):
    return gradlr.ByLoss(64)(gradlr.RankInputs(ratio, current=64, limit=128))


def interrupt_at(monkeypatch, method, step):
    """Ctrl-C, as the terminal sends it, in the middle of the run of one method."""
    real = training._step

    def step_and_interrupt(model, train_step, record, inputs, targets):
        if record.method == method and len(record.losses) == step:
            monkeypatch.setattr(training, "_step", real)
            signal.raise_signal(signal.SIGINT)
        real(model, train_step, record, inputs, targets)

    monkeypatch.setattr(training, "_step", step_and_interrupt)


def test_it_leaves_report_results_and_models(tmp_path, capsys):
    assert demo(tmp_path) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    adamw, ours = results["records"]
    assert (len(adamw["losses"]), len(ours["losses"]), len(ours["ranks"])) == (5, 5, 5)
    assert adamw["losses"][0] == pytest.approx(ours["losses"][0], abs=1e-6)  # same model, same first batch
    assert [step for step, _ in ours["validation"]] == [0, 2, 4, 5]
    assert all(rank == decide_for(ratio) for rank, ratio in zip(ours["ranks"], ratios(ours["losses"]), strict=True))
    assert len(set(ours["ranks"])) > 1  # the rank follows the loss
    assert adamw["state_numbers"] == 2 * adamw["weights"]
    assert 40 * ours["state_numbers"] < adamw["state_numbers"]  # a fortieth
    assert ours["peak_bytes"] < adamw["peak_bytes"]
    model = load_pretrained(tmp_path / "gradlr-fine-tuned.pt")
    assert evaluate(model, FineTuning().validation()) == pytest.approx(ours["validation"][-1][1], abs=1e-6)
    assert "1/44 of its state" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adamw-fine-tuned.pt", "gradlr-fine-tuned.pt", "report.png", "results.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "step"), [("adamw", 1), ("gradlr", 3)])
def test_an_interrupted_run_goes_on_and_ends_bit_for_bit_the_same(tmp_path, monkeypatch, capsys, method, step):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    demo(straight)
    interrupt_at(monkeypatch, method, step)
    assert demo(broken) == 130
    assert f"after {step + 1} of 5 steps" in capsys.readouterr().out
    assert demo(broken) == 0
    for one, other in zip(models(straight), models(broken), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_ctrl_c_outside_the_steps_is_told_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_measure_peak", interrupt)
    assert demo(tmp_path) == 130
    assert "The same command continues" in capsys.readouterr().out


def test_a_crash_goes_on_from_the_last_saved_step(tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    demo(straight)
    real = training._step

    def crash(model, train_step, record, inputs, targets):
        if record.method == "gradlr" and len(record.losses) == 3:
            raise MemoryError
        real(model, train_step, record, inputs, targets)

    monkeypatch.setattr(training, "_step", crash)
    with pytest.raises(MemoryError):
        demo(broken)
    monkeypatch.setattr(training, "_step", real)
    assert demo(broken) == 0
    one, other = models(straight)[1], models(broken)[1]
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_fresh_and_other_settings_start_anew(tmp_path, monkeypatch, capsys):
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
