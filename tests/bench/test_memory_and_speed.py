"""The memory and speed benchmarks count what they say they count."""

import json

import pytest
import torch

from gradlr.apps.bench import head, int8, memory, speed
from gradlr.apps.cli import main

WIDTH, DEPTH, TOKENS = 256, 4, 16
PARAMETERS = 4 * WIDTH**2 * DEPTH


def test_a_known_allocation_is_counted_at_its_worst_moment():
    def work():
        kept = torch.ones(1000, 1000)
        temporary = torch.ones(500, 1000)
        del temporary
        return kept

    # 4 MB and 2 MB at once; the allocator rounds to 64 bytes.
    assert memory.peak_bytes(work) == pytest.approx(6_000_000, abs=1024)


def test_the_peaks_are_in_the_order_that_their_buffers_demand():
    ours = ("backward", "backward_no_residual", "step")
    compared = [one for one in memory.methods(rank=8) if one.name in ("no_optimizer", "adamw_fused", "adamw_foreach", *ours)]
    found = {baseline.name: memory.training_peak(baseline, WIDTH, DEPTH, TOKENS, "cpu") for baseline in compared}
    # Everything a method must hold at once, from its definition: gradients 1, AdamW's moments 2, foreach's temporaries 1.
    assert found["no_optimizer"][0] > PARAMETERS
    assert found["adamw_fused"][0] > 3 * PARAMETERS
    assert found["adamw_foreach"][0] > found["adamw_fused"][0]
    assert found["adamw_fused"][1] == 2 * PARAMETERS
    for name in ours:
        assert found[name][0] < found["no_optimizer"][0]
        assert found[name][1] == 0


SMALL = {"width": 64, "tokens": 8}
COMMANDS = {
    "memory": (["memory"], memory, "measure", SMALL | {"rank": 4, "depth": 2}),
    "head": (["head"], head, "measure", SMALL | {"vocabulary": 64, "rounds": 1}),
    "int8": (["int8"], int8, "measure", SMALL | {"rank": 4, "depth": 2}),
    "linear": (["speed"], speed, "measure", SMALL | {"rank": 4, "rounds": 2}),
    "half precision": (["speed", "--dtype", "bfloat16"], speed, "measure", SMALL | {"rank": 4, "rounds": 2}),
    "transformer": (["speed", "--model", "transformer"], speed, "measure_transformer", SMALL | {"rank": 4, "rounds": 2}),
    "crossover": (["crossover", "--ranks", "2", "40"], speed, "measure_crossover", SMALL | {"rounds": 2}),
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_commands_write_json_and_a_table(command, tmp_path, capsys, monkeypatch):
    words, module, function, small = COMMANDS[command]
    real = getattr(module, function)
    monkeypatch.setattr(module, function, lambda **options: real(**(options | small)))
    out = tmp_path / "report.json"
    assert main(["bench", *words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["bench"] == words[0]
    assert report["environment"]["python"]
    assert report["workload"]["width"] == 64
    assert module.table(report) in capsys.readouterr().out


def test_the_reference_of_a_ratio_is_the_first_row():
    report = speed.measure_transformer(**SMALL, rank=4, rounds=2, depth=1)
    assert report["results"][0]["name"] == "sgd" and report["results"][0]["ratio"] == 1
    assert {"adamw", "hook", "adaptor", "one_sided"} <= {row["name"] for row in report["results"]}
