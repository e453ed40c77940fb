"""What one update asks of a GPU, counted: the numbers that must hold, and that the counter counts right."""

import json

import pytest
import torch
from torch import nn

from gradlr.__main__ import main
from gradlr.apps.bench.counts import FORMS, Counter, Form, Subject, count

SQUARE, LARGE = Subject("matrix", (512, 512)), Subject("matrix", (4096, 4096))
TALL, TABLE = Subject("matrix", (4096, 11008)), Subject("embedding", (128_000, 4096))
MIB = 2**20


@pytest.mark.parametrize(
    ("form", "subject", "most"),
    [
        ("hook", SQUARE, 49),
        ("hook_no_residual", SQUARE, 40),
        ("adaptor", SQUARE, 50),
        ("adaptor_no_residual", SQUARE, 42),
        ("step", SQUARE, 50),
        ("hook", LARGE, 49),
        ("adaptor", Subject("matrix", (4096, 4096), tokens=256), 50),
        ("hook", Subject("vector", (4096,)), 7),
        ("hook", TABLE, 13),
        ("step", Subject("vector", (4096,)), 15),
    ],
    ids=str,
)
def test_launches_of_one_update(form, subject, most):
    found = count(FORMS[form], subject)
    assert 0 < found.launches <= most, found.calls
    assert found.waits == 0


@pytest.mark.parametrize(
    ("form", "subject", "most"), [("hook", LARGE, 24), ("hook_no_residual", LARGE, 10), ("step", LARGE, 14), ("hook", TABLE, 9)]
)
def test_bytes_of_one_update(form, subject, most):
    """bfloat16: AdamW moves 14 a number."""
    assert count(FORMS[form], subject).bytes / subject.numel <= most


@pytest.mark.parametrize(
    ("form", "subject", "most"), [("hook", TALL, 32), ("step", TALL, 24), ("hook", TABLE, 4), ("step", TABLE, 6)]
)
def test_memory_of_one_update_beside_gradient_and_state(form, subject, most):
    assert count(FORMS[form], subject).workspace <= most * MIB


@pytest.mark.parametrize(("capture", "launches", "most"), [("hook", 13, 4), ("adaptor", 704, 34)])
def test_a_head_of_its_own(capture, launches, most):
    """Of kind "embedding": under adaptors its gradient is made and written in 63 blocks, each once."""
    options = {"capture": capture, "groups": [{"match": "*", "kind": "embedding"}]}
    found = count(Form("head", "", options, forms_gradient=capture == "hook"), Subject("matrix", TABLE.shape))
    assert 0 < found.launches <= launches and found.waits == 0, found.calls
    assert found.workspace <= most * MIB and found.calls.get("mm", 0) in (0, 63)


def test_launches_of_a_step_of_llama_7b():
    """32 blocks of seven matrices and two vectors, a last vector, an embedding and a head."""
    h, f, v = 4096, 11008, 32_000
    shapes = {(h, h): 4 * 32, (f, h): 2 * 32, (h, f): 32, (v, h): 1}
    launches = sum(times * count(FORMS["hook"], Subject("matrix", shape)).launches for shape, times in shapes.items())
    launches += 65 * count(FORMS["hook"], Subject("vector", (h,))).launches
    launches += count(FORMS["hook"], Subject("embedding", (v, h))).launches
    assert launches < 12_000


def test_a_view_is_no_launch_and_what_is_written_in_place_counts_twice():
    x, layer = torch.ones(4, 4), nn.Linear(4, 4, bias=False)
    with Counter() as counter, torch.no_grad():
        x.mT.contiguous()[1:].add_(1)
        assert (counter.counts.launches, counter.counts.bytes) == (2, 4 * (16 + 16) + 4 * (12 + 12))  # a copy, and the sum
        float(layer.weight.sum())
    assert (counter.counts.launches, counter.counts.waits) == (3, 1)


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    out = tmp_path / "counts.json"
    assert main(["bench", "counts", "--shapes", "64x96", "--rank", "8", "--tokens", "32", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["bench"] == "counts" and [row["shape"] for row in report["results"]] == [[64, 96]] * len(FORMS)
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in report["results"])
    assert main(["bench", "counts", "--shapes", "64"]) == 2
    assert "--shapes 64: write rows and columns as 4096x11008" in capsys.readouterr().err
