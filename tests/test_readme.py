"""The README is a contract: its code runs, its tables are the committed results."""

import json
import re
from pathlib import Path

import pytest

import gradlr
from gradlr.bench import memory, quality, speed

ROOT = Path(gradlr.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "gradlr" / "bench" / "results"


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_its_python_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})


TABLES = [("quality", quality), ("quality-small-batches", quality), ("memory", memory), ("speed", speed)]


@pytest.mark.parametrize(("name", "module"), TABLES)
def test_its_tables_are_those_of_the_committed_results(name, module):
    (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, flags=re.DOTALL)
    assert shown == module.table(results(name))


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_it_shows_the_two_commands(command):
    assert command in README


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def losses(name):
    rows = {row["name"]: row for row in results("quality")["results"]}
    return rows[name]


@pytest.mark.parametrize("name", ["k4_by_loss", "k4_r64_fixed", "k4_r64_no_residual", "k4_r64_products", "k1_r64"])
def test_little_state_beats_adamw_on_every_seed(name):
    assert losses(name)["matrix_state_per_weight"] <= 0.05
    for reference in ("adamw", "adamw_slow_tables"):
        assert all(ours < theirs for ours, theirs in zip(losses(name)["losses"], losses(reference)["losses"], strict=True))


def test_small_batches_change_nothing_of_that():
    rows = {row["name"]: row for row in results("quality-small-batches")["results"]}
    for name in ("k1_r64", "k4_r64_fixed"):
        assert all(ours < theirs for ours, theirs in zip(rows[name]["losses"], rows["adamw"]["losses"], strict=True))


def test_a_fifth_of_a_number_per_weight_is_within_three_percent_of_muon():
    assert losses("k16_r64")["matrix_state_per_weight"] <= 0.2
    assert losses("k16_r64")["mean"] <= 1.03 * losses("muon")["mean"]


def test_the_peak_above_the_parameters_is_below_30_mib_in_both_modes():
    rows = {row["name"]: row["peak_mib"] for row in results("memory")["results"]}
    assert results("memory")["workload"]["parameters_mib"] == 100
    assert max(rows[name] for name in ("backward", "backward_no_residual", "step")) <= 30
    assert rows["adamw_foreach"] >= 300


def test_the_hook_costs_a_tenth_without_and_a_seventh_with_the_residual():
    rows = {row["name"]: row["ratio"] for row in results("speed")["results"]}
    assert rows["no_residual"] <= 1.10
    assert rows["residual"] <= 1.15


def test_the_adaptor_is_faster_than_sgd_and_leaner_than_a_hook():
    times = {row["name"]: row["ratio"] for row in results("speed")["results"]}
    peaks = {row["name"]: row["peak_mib"] for row in results("memory")["results"]}
    assert times["adaptor"] <= 0.80 * times["sgd"]
    assert peaks["adaptor"] <= peaks["backward"]
