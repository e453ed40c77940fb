"""The estimate is within five percent of what the allocator tells, measured here and now."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from gradlr.apps import cli
from gradlr.apps.bench import estimate, fits
from gradlr.apps.byte_sizes import parse_bytes

METHODS = ("adamw", "gradlr", "gradlr_step", "gradlr_adaptor")
FAST = {("adamw", False), ("gradlr", True), ("gradlr_step", False), ("gradlr_adaptor", True)}
CASES = [
    pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in itertools.product(METHODS, (False, True))
]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_it_is_the_measured_peak_of_the_byte_transformer(name, checkpointing):
    row = estimate.compare(estimate.CASES["bytes"], name, checkpointing=checkpointing)
    assert row["ratio"] == pytest.approx(1, abs=0.05)
    # In fact to the byte; of recomputed blocks the state of the random numbers is not counted, 5 KiB each.
    missing = row["measured"] - row["estimate"]
    assert 0 <= missing < 32_768 if checkpointing else 0 <= missing <= 64


def test_it_is_the_measured_peak_of_a_llama_under_lora():
    pytest.importorskip("peft")
    row = estimate.compare(estimate.CASES["llama"], "lora", checkpointing=False)
    assert row["ratio"] == pytest.approx(1, abs=0.05)


LLAMAS = [("llama_chunked", "adamw"), ("llama_int8_chunked", "gradlr_adaptor"), ("llama_packed", "gradlr")]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("case", "name"), LLAMAS)
def test_it_knows_int8_weights_heads_without_logits_and_packed_rows(case, name, checkpointing):
    pytest.importorskip("transformers")
    row = estimate.compare(estimate.CASES[case], name, checkpointing=checkpointing)
    # Promised are five percent; as above, recomputed blocks keep random numbers' states.
    assert 0 <= row["measured"] - row["estimate"] < (32_768 if checkpointing else 1024)


@pytest.mark.parametrize("way", ["lora", pytest.param("gradlr_int8", marks=pytest.mark.slow)])
def test_rows_of_the_table_of_cards(way):
    """Of the smallest model, which was run whole for the table: here by the line through two shallow ones."""
    pytest.importorskip("transformers")
    committed = json.loads(Path(fits.__file__).with_name("results").joinpath("fits.json").read_text())["results"]
    (known,) = [row for row in committed if (row["model"], row["way"], row["chunked_head"]) == ("1b", way, True)]
    method, options = fits.WAYS[way]
    how = {"method": method, "tokens": 2048, "checkpointing": True, "chunked_head": True, "device": "cuda"}
    found = fits.peak_by_depth(fits.MODELS["1b"], how | options, most=8)
    # To the tenth that is shown; another torch or transformers may differ by a temporary.
    assert found["peak_gib"] == pytest.approx(known["peak_gib"], abs=0.05)


def test_a_card_keeps_a_gigabyte_free():
    assert [fits.smallest_card(peak) for peak in (7.0, 7.1, 11.0, 79.0, 79.1)] == ["8 GB", "12 GB", "12 GB", "80 GB", "none"]


def test_the_command_prints_a_line_for_each_method(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    arguments = ["estimate", str(tmp_path), "--tokens", "16", "--methods", "adamw", "lora", "gradlr"]
    assert cli.main([*arguments, "--limit", "1GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| peak | fits 1 GiB |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| AdamW (fused)", "| LoRA (AdamW)", "| gradlr"]
    assert all(line.endswith("yes |") for line in lines[2:])
    assert cli.main([*arguments, "--json", "--dtype", "bfloat16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["adamw", "lora", "gradlr"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    buffers = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert rows[0]["weights"] == 2 * sum(weight.numel() for weight in model.parameters()) + 2 * buffers


def test_a_limit_is_a_number_with_a_unit(capsys):
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    with pytest.raises(SystemExit, match="2"):
        cli.main(["estimate", "minilm", "--limit", "24"])
    assert "--limit: '24': give a size such as 8GiB" in capsys.readouterr().err
