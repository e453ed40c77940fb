"""`repr(opt)` and the forms of `opt.report()`: one table, one figure, scalars."""

import math
import subprocess
import sys

import matplotlib
import pytest
from models import attached, train

import gradlr
from gradlr import ArgumentError

matplotlib.use("Agg")


def observed(model=None):
    model, tracker, opt = attached(model, rank=gradlr.ByLoss(8), weight_decay=0.01)
    with opt.observe():
        train(model, opt, tracker, 2)
    return opt.report()


def test_text_is_one_aligned_table_with_totals():
    report = observed()
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["parameter", "shape", "rank/most", "k", "energy"]
    row = next(line for line in lines if line.startswith("2.weight"))
    first = next(row for row in report.rows if row.name == "2.weight")
    place = lines[0].index("energy")
    assert row[place:].startswith(f"{first.numbers['energy']:.1%}")
    assert f"{first.numbers['rank']}/8" in row and "16 x 16" in row
    vectors = next(line for line in lines if line.startswith("3 vectors"))
    assert "384 B" in vectors and "48" in vectors  # two moments of 3 x 16 numbers
    assert "of AdamW's 6.4 KiB" in lines[5] and "captured energy" in lines[5]


def test_figure_shows_ranks_shares_and_updates():
    report = observed()
    figure = report.plot()
    ranks, energy, updates = figure.axes
    rows = {row.name: row.numbers for row in report.rows if "rank" in row.numbers}
    assert [label.get_text() for label in ranks.get_yticklabels()] == list(rows)
    widths = [bar.get_width() for bar in ranks.patches]
    assert widths == [row[name] for name in ("largest_rank", "rank") for row in rows.values()]
    shares = [bar.get_width() for bar in energy.patches][len(rows) :]
    assert shares == pytest.approx([100 * row["energy"] for row in rows.values()])
    assert [bar.get_width() for bar in updates.patches] == pytest.approx([100 * row["relative_update"] for row in rows.values()])
    matplotlib.pyplot.close(figure)


def test_figure_of_what_was_not_observed():
    opt = attached()[2]
    figure = opt.report().plot()
    assert len(figure.axes) == 1
    matplotlib.pyplot.close(figure)
    opt.detach()
    opt = attached(rule="adam")[2]
    with pytest.raises(ArgumentError, match="no parameter has a rank"):
        opt.report().plot()


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'gradlr\[notebook\]'"):
        attached()[2].report().plot()


def test_scalars_are_flat_finite_floats():
    report = observed()
    scalars, first = report.scalars(), report.rows[0].numbers
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert scalars["gradlr/rank/0.weight"] == first["rank"]
    assert scalars["gradlr/energy/0.weight"] == first["energy"]
    assert scalars["gradlr/state_bytes"] == report.totals["state_bytes"]
    assert {"gradlr/state_share", "gradlr/rank_mean", "gradlr/energy", "gradlr/gradient_norm"} <= scalars.keys()
    assert "gradlr/rank/0.bias" not in scalars and "gradlr/update_norm/0.bias" in scalars
    assert not any(name in scalars for name in ("gradlr/weights", "gradlr/steps/0.weight", "gradlr/largest_rank/0.weight"))


def test_matplotlib_is_not_imported_unless_used():
    code = (
        "import sys, torch, gradlr\n"
        "opt = gradlr.attach(torch.nn.Linear(4, 4), gradlr.LossTracker())\n"
        "str(opt.report()), opt.report().scalars()\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_repr_shows_decay_and_limits_where_they_are_set():
    assert "decay" not in repr(attached()[2]) and "max" not in repr(attached()[2]).splitlines()[0]
    opt = attached(weight_decay=0.01, apply="step", max_grad_norm=1.0)[2]
    lines = repr(opt).splitlines()
    assert lines[0] == 'GradLR(apply="step", max_grad_norm=1)'
    place = lines[1].index("decay")
    cells = {line.split()[0]: line[place:].split()[0] for line in lines[2:-1]}
    assert cells["0.weight"] == "0.01" and cells["0.bias"] == "128"  # vectors have none: the next column, bytes
