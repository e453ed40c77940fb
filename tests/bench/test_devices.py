"""Several processes side by side: the report has what it says, and the bytes are those that the documents tell."""

import json
import operator
import time
from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed import _functional_collectives as functional
from torch.multiprocessing import ProcessRaisedException

from gradlr.apps.bench import devices, quality
from gradlr.apps.bench.baselines import baseline
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.spawn import group_of_one, in_processes
from gradlr.apps.bench.transformer import ByteTransformer
from gradlr.apps.cli import main
from gradlr.apps.collectives import Traffic, sent_bytes
from gradlr.errors import ArgumentError, ParallelError

WIDTH, DEPTH, LENGTH, RANK = 64, 2, 8, 4
MODEL = ByteTransformer(WIDTH, DEPTH, 1, context=LENGTH)
PARAMETERS = sum(p.numel() for p in MODEL.parameters())
IN_BLOCKS = sum(p.numel() for p in MODEL.blocks.parameters())


@pytest.fixture
def group():
    yield group_of_one()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "devices.json"
    sizes = ["--width", str(WIDTH), "--depth", str(DEPTH), "--tokens", str(4 * LENGTH), "--rank", str(RANK), "--rounds", "2"]
    assert main(["bench", "devices", *sizes, "--baselines", *devices.DEFAULT[1:], "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_command_writes_json_with_all_that_is_told(report):
    assert report["bench"] == "devices"
    assert report["environment"] | {"processes": 2, "threads": 1, "backend": "gloo"} == report["environment"]
    assert report["workload"]["parameters"] == PARAMETERS
    rows = report["results"]
    assert [row["name"] for row in rows] == list(devices.DEFAULT)
    assert rows[0]["ratio"] == rows[0]["sent_ratio"] == 1
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert len(devices.table(report).splitlines()) == 2 + len(rows)


def test_the_bytes_are_those_of_the_formulas(report):
    moved = {row["name"]: row["bytes"] for row in report["results"]}
    assert moved["ddp"] == {"all-reduce": 4 * PARAMETERS}
    # The blocks' weights are gathered for forward and again for backward, the root's stay.
    assert moved["fsdp"] == {"all-gather": 4 * (PARAMETERS + IN_BLOCKS), "reduce-scatter": 4 * PARAMETERS}
    assert moved["group"] == moved["group_adaptor"] == {"all-reduce": bytes_of_sketches()}


def bytes_of_sketches():
    """Formula of docs/devices.md, for two processes."""
    named = dict(MODEL.named_parameters())
    tables = [named.pop("token.weight"), named.pop("position.weight")]  # tied to the head; every position is used
    matrices = sum(RANK * sum(p.shape) for p in named.values() if p.ndim == 2)
    vectors = sum(p.numel() for p in named.values() if p.ndim == 1)
    header = 2 + 2 * 2 + len(named) + len(tables)
    return 8 * header + 4 * (matrices + vectors + sum(p.numel() for p in tables)) + sum(map(len, tables))


def test_what_a_ring_sends(report):
    sent = {row["name"]: row["sent_bytes"] for row in report["results"]}
    assert sent["ddp"] == 4 * PARAMETERS
    assert sent["fsdp"] == 2 * (PARAMETERS + IN_BLOCKS) + 2 * PARAMETERS
    # Worked by hand: of 12 bytes each of three processes passes two thirds on, in an all-reduce twice.
    assert sent_bytes({"all-reduce": 12}, 3) == 16
    assert sent_bytes({"all-gather": 12, "reduce-scatter": 12, "broadcast": 12}, 3) == 24


def test_every_collective_counts_as_its_whole_tensor(group):
    x, parts = torch.ones(6), [torch.ones(6)]
    with Traffic() as traffic:
        distributed.all_reduce(x)
        distributed.all_gather(parts, x)
        distributed.reduce_scatter(x, parts)
        distributed.broadcast(x.double(), 0)
        functional.all_reduce(x, "sum", group).wait()
        distributed.barrier()
    distributed.all_reduce(x)
    kinds = ["all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-reduce"]
    assert traffic.calls == [(kind, 48 if kind == "broadcast" else 24) for kind in kinds]
    assert traffic.bytes()["all-reduce"] == 48


def test_a_collective_that_it_does_not_know_is_not_passed_over(group):
    with pytest.raises(ArgumentError, match="scatter_ is no collective that is counted"), Traffic():
        distributed.scatter(torch.ones(6), [torch.ones(6)])


def test_a_process_that_fails_ends_all_with_its_traceback():
    with pytest.raises(ProcessRaisedException, match="Process 0 terminated(.|\n)*ZeroDivisionError"):
        in_processes(partial(operator.truediv, 1), 2)


@pytest.mark.slow
def test_processes_that_do_not_end_are_ended():
    start = time.monotonic()
    with pytest.raises(ParallelError, match="2 processes have not come to their end in 0.5 seconds"):
        in_processes(partial(operator.pow, 1), 2, patience=0.5)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--processes", "1"], "--processes 1"),
        (["--width", "200"], "--width 200"),
        (["--tokens", "3"], "--tokens 3"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_options_are_refused(options, told, capsys):
    assert main(["bench", "devices", *options]) == 2
    assert told in capsys.readouterr().err


def test_an_unknown_way_is_refused():
    with pytest.raises(ArgumentError, match="no baseline 'horovod'"):
        devices.measure(names=["horovod"])


def test_a_contender_in_a_group_of_one_exchanges_sketches(group):
    tiny = FineTuning(steps=2, batch_size=2, length=32, validation_windows=16)
    with Traffic() as traffic:
        first, second = (quality.train(baseline("k4_r16_group"), 1e-3, seed=0, workload=tiny) for _ in range(2))
    assert first.loss == second.loss < tiny.evaluate(tiny.model(0, "cpu"))["loss"]
    # Any number of processes take the steps of one.
    assert first.loss == quality.train(baseline("k4_r16_step"), 1e-3, seed=0, workload=tiny).loss
    assert traffic.bytes()["all-reduce"] > 0
