"""The pictures show every row of a report, and tell what they cannot draw."""

import json

import pytest

from gradlr.apps.bench import figures
from gradlr.apps.cli import main
from gradlr.errors import ArgumentError


def report(**more):
    rows = [
        {"name": "adamw", "label": "AdamW", "mean": 1.9, "spread": 0.01, "state_bytes": 8e6, "step_ms": 10.0},
        {"name": "k4_r64", "label": "LowRankPolar k4 r64", "mean": 1.8, "spread": None, "state_bytes": 2e5, "step_ms": 15.0},
        {"name": "x", "label": "Diverged", "mean": None, "spread": None, "state_bytes": 1, "step_ms": 1.0},
    ]
    return {"bench": "quality", "workload": {"name": "pretrained"}, "results": rows, **more}


def test_each_panel_holds_every_row_that_did_not_diverge():
    figure = figures.draw("pareto", [report(), report()])
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts if text.get_text()) == ["AdamW", "k4 r64"]
    state, time = (
        sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o")
        for axes in figure.axes[:2]
    )
    assert state == [(2e5 / 2**20, 1.8), (8e6 / 2**20, 1.9)]
    assert time == [(1.0, 1.9), (1.5, 1.8)]


def test_the_front_holds_what_nothing_beats_in_both():
    points = [(1, 5), (2, 6), (2, 4), (3, 4), (4, 1), (0, 9)]
    assert figures.front(points) == [(0, 9), (1, 5), (2, 4), (4, 1)]
    dominated = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(points) - dominated == set(figures.front(points))


def test_the_command_writes_a_picture(tmp_path):
    source, out = tmp_path / "quality.json", tmp_path / "pareto.png"
    source.write_text(json.dumps(report()))
    assert main(["bench", "pareto", str(source), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content",
    [
        "{", "{}", '{"bench": "memory", "results": [{}]}', '{"bench": "quality", "results": [{}]}',
        json.dumps(report(results=[])), json.dumps(report(workload={})),
        json.dumps(report(results=[*report()["results"], {"name": "y"}])),
    ],
)  # fmt: skip
def test_what_is_no_result_is_named(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=r"x\.json.*bench quality"):
        figures.write("pareto", [path], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_report_of_nothing_but_divergence_is_told():
    with pytest.raises(ArgumentError, match="nothing to draw"):
        figures.draw("pareto", [report(results=report()["results"][2:])])


def grid_report():
    names = {"k1_r16": 1.95, "k1_r64": 1.9, "k4_r64": 1.8, "k4_r16": 1.85, "k4_r64_no_residual": 1.81, "k4_loss90": 1.83}
    rows = [
        {"name": name, "label": name, "mean": mean, "spread": None, "state_bytes": 1, "step_ms": 1.0, "mean_rank": 40.0}
        for name, mean in names.items()
    ]
    return {"bench": "quality", "workload": {"name": "scratch"}, "results": rows}


def test_the_grid_of_ranks_is_read_from_the_names():
    assert figures.grid(grid_report()["results"]) == {1: [(16, 1.95), (64, 1.9)], 4: [(16, 1.85), (64, 1.8)]}
    with pytest.raises(ArgumentError, match="k4_r64"):
        figures.grid([])


def test_the_study_draws_a_line_per_momentum_rank_and_a_point_per_schedule(tmp_path):
    figure = figures.draw("study", [grid_report()])
    lines, schedules = figure.axes
    assert [line.get_label() for line in lines.lines] == ["k = 1", "k = 4"]
    assert [text.get_text() for text in schedules.texts] == [" k4_loss90"]
    assert schedules.lines[-1].get_xydata().tolist() == [[40.0, 1.83]]
    source = tmp_path / "study.json"
    source.write_text(json.dumps(grid_report()))
    assert main(["bench", "study", str(source), "--out", str(tmp_path / "study.png")]) == 0
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_reports_of_one_workload_are_drawn_together():
    one, other = grid_report(), grid_report()
    one["results"], other["results"] = one["results"][:3], other["results"][2:]
    (merged,) = figures.joined([one, other])
    assert [row["name"] for row in merged["results"]] == [row["name"] for row in grid_report()["results"]]
    assert len(figures.joined([one, {**other, "seeds": [0]}])) == 2
