"""`python -m gradlr finetune` from the data file to the model that transformers and peft load."""

import argparse
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from finetune.tiny import WORDS, jsonl_file, llama, text_file, texts, tokenizer

import gradlr
from gradlr import GradlrWarning
from gradlr.apps.bench.pretrain import load_pretrained
from gradlr.apps.cli import main
from gradlr.apps.finetune import add_arguments, fits, loop

pytestmark = [
    # A model this small; gradlr's own advice.
    pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would"),
    # peft speaks of a base model that is not on the hub.
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    # peft asks transformers under a name that is going out of use.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

SHORT = ["--length", "16", "--batch-size", "4", "--steps", "4", "--log-every", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    return text_file(tmp_path / "data.txt")


def finetune(model, data, out, *options):
    try:
        return main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", *options])
    except SystemExit as stop:  # argparse
        return stop.code


def logged(out, key):
    return [entry[key] for line in (out / "log.jsonl").read_text().splitlines() if key in (entry := json.loads(line))]


def test_from_the_file_to_the_model_and_the_adapter(tmp_path, model, data, capsys):
    out, adapter = tmp_path / "deep" / "out", tmp_path / "adapter"
    sizes = ["--length", "32", "--batch-size", "4", "--epochs", "3", "--eval-every", "10", "--lr", "0.008"]
    options = [*sizes, "--lora-out", str(adapter)]
    assert finetune(model, data, out, *options, "--lora-rank", "32") == 0
    printed = capsys.readouterr().out
    before, *_, after = logged(out, "validation_loss")
    assert after < before - 0.5
    assert f"validation loss {before:.4f} before, {after:.4f} after" in printed and "tokens/s, peak memory" in printed
    assert "training on 38 documents" in printed and "validating on 2 documents (drawn with --seed 0)" in printed
    assert logged(out, "lr")[0] > logged(out, "lr")[-1] > 0
    assert {"loss", "rank", "rate", "memory", "tokens", "skipped"} <= json.loads(
        (out / "log.jsonl").read_text().splitlines()[1]
    ).keys()
    trained = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert len(transformers.AutoTokenizer.from_pretrained(out / "model")) == len(tokenizer())
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in trained.state_dict().items())
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    ids = torch.tensor([tokenizer()(" ".join(WORDS)).input_ids])
    # Full rank: what is left is float32 rounding of W + BA, on logits of a few units.
    torch.testing.assert_close(adapted(ids).logits, trained(ids).logits, atol=1e-4, rtol=0)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl", "model", "run.json"]


def test_a_finished_run_is_only_written_again(tmp_path, model, data, capsys):
    finetune(model, data, tmp_path / "out", *SHORT)
    first = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "model")
    capsys.readouterr()
    assert finetune(model, data, tmp_path / "out", *SHORT) == 0
    assert "going on from step 4 of 4" in capsys.readouterr().out
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == first
    assert logged(tmp_path / "out", "loss") == logged(tmp_path / "out", "loss")[:4]


def test_builtin_needs_no_extra(tmp_path, data, monkeypatch, capsys):
    for name in ("transformers", "tqdm", "safetensors", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert finetune("builtin", data, tmp_path / "out", *SHORT, "--bf16", "--checkpointing", "--eval-every", "4") == 0
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert "step 4 of 4: loss" in captured.err
    before, after = logged(tmp_path / "out", "validation_loss")
    assert after < before
    loaded = load_pretrained(tmp_path / "out" / "model" / "byte-transformer.pt").state_dict()
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["model"]
    assert all(value.dtype == torch.bfloat16 and torch.equal(value.float(), loaded[name]) for name, value in saved.items())


def test_a_model_without_transformers_names_the_extra(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gradlr.apps.finetune.pretrained")
    assert finetune(model, data, tmp_path / "out") == 2
    assert "needs transformers, which is not installed: pip install 'gradlr[finetune]'" in capsys.readouterr().err


@pytest.mark.parametrize("is_file", [True, False])
def test_a_config_alone_is_trained_from_scratch_and_said_so(tmp_path, model, data, capsys, is_file):
    bare = model / "config.json"
    if not is_file:
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert finetune(bare, data, tmp_path / "out", *SHORT) == 0
    assert "TRAINING FROM SCRATCH" in capsys.readouterr().out
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_a_completion_is_learned_and_its_prompt_is_not(tmp_path, model, monkeypatch):
    seen = []
    real = loop.cross_entropy
    monkeypatch.setattr(loop, "cross_entropy", lambda logits, targets: (seen.append(targets), real(logits, targets))[1])
    records = [{"prompt": "zebra", "completion": f" and {text}"} for text in texts(length=3)]
    data = jsonl_file(tmp_path / "a.jsonl", records)
    assert finetune(model, data, tmp_path / "out", *SHORT, "--validation-data", str(data)) == 0
    own = tokenizer()
    learned = [own.decode(row[row >= 0].tolist()) for targets in seen for row in targets]
    assert any("<eos> and" in text for text in learned) and not any("z" in text for text in learned)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("is_marked", [True, False])
def test_conversations_follow_the_chat_template(tmp_path, data, capsys, is_marked):
    own = tokenizer()
    marks = ("{% generation %}", "{% endgeneration %}")
    own.chat_template = TEMPLATE if is_marked else TEMPLATE.replace(marks[0], "").replace(marks[1], "")
    talks = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": text}] for text in texts(length=4)]
    data = jsonl_file(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    assert finetune(llama(tmp_path / "model", tokens=own), data, tmp_path / "out", *SHORT) == 0
    printed = capsys.readouterr().out
    assert ("every token of a conversation is learned" in printed) is not is_marked
    size, learned = (int(word.replace(",", "")) for word in printed.split("documents: ")[1].replace(" tokens", "").split()[:2])
    assert (learned == size - 1) is not is_marked and learned > 38


@pytest.mark.parametrize(
    "options",
    [["--capture", "one_sided", "--rank", "0.25", "--checkpointing"],
     ["--accumulate", "2", "--max-grad-norm", "1", "--bf16", "--weight-decay", "0.1", "--momentum-rank", "2"]],
    ids=["one-sided", "accumulated"],
)  # fmt: skip
def test_every_way_of_training_lowers_the_loss(tmp_path, model, data, options):
    assert finetune(model, data, tmp_path / "out", *SHORT, *options, "--steps", "12", "--lr", "0.004") == 0
    before, after = logged(tmp_path / "out", "validation_loss")
    assert after < before - 0.1


def test_accumulation_weighs_every_token_the_same(tmp_path, model, data):
    """The first step's loss is that of one large batch: the model is the same."""
    records = [{"prompt": "the cat sat " * (index % 5), "completion": text} for index, text in enumerate(texts(length=6))]
    records = [record if record["prompt"] else {**record, "prompt": "x"} for record in records]
    data = jsonl_file(tmp_path / "a.jsonl", records)
    finetune(model, data, tmp_path / "one", *SHORT, "--steps", "1")
    finetune(model, data, tmp_path / "four", *SHORT, "--steps", "1", "--batch-size", "1", "--accumulate", "4")
    # Float32 sums in another order.
    assert logged(tmp_path / "four", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), rel=1e-6)


BAD = {
    "json": (lambda p: jsonl_file(p / "a.jsonl", [*['{"text": "x"}'] * 6, "{"]), [], r"a.jsonl:7: broken JSON"),
    "endless number": (lambda p: jsonl_file(p / "a.jsonl", ['{"text": "x", "n": ' + "1" * 5000 + "}"]), [],
                       "a.jsonl:1: broken JSON: Exceeds the limit"),
    "missing data": (lambda p: p / "none.txt", [], "none.txt: there is no such file"),
    "one document": (lambda p: text_file(p / "a.txt", count=1), [], "one more is needed to validate on"),
    "short": (lambda p: text_file(p / "a.txt", count=3, length=1), ["--length", "64"],
              "of them to be learned, and one sequence takes 64"),
    "long": (None, ["--length", "65"], "--length 65: {model} takes at most 64 tokens"),
    "no hub": (None, ["--model", "meta/llama"], "--model meta/llama: there is no such folder or file. gradlr downloads nothing"),
    "no config": (None, ["--model", "{path}"], "no config.json in this folder"),
    "builtin and tokenizer": (None, ["--model", "builtin", "--tokenizer", "x"], "leave --tokenizer out"),
    "memory": (None, ["--memory-limit", "1MiB"],
               "state, {any} for a step; --memory-limit is 1.0 MiB. To need less: --batch-size below 8"),
    "device": (None, ["--device", "nonsense"], "--device nonsense"),
    "rate": (None, ["--lr", "0"], "argument --lr: '0': it must be a number above 0"),
    "steps": (None, ["--steps", "-1"], "argument --steps"),
    "limit": (None, ["--memory-limit", "8 apples"], "give a size such as 8GiB"),
    "validation": (None, ["--validation", "1"], "a number above 0 and below 1"),
    "rank": (None, ["--rank", "1.5"], "argument --rank"),
    "seed": (None, ["--seed", str(2**64)], "argument --seed"),
    "epochs": (None, ["--epochs", "1e308"], "argument --epochs"),
    "field": (None, ["--field", "x"], "leave it out for .txt"),
    "messages": (lambda p: jsonl_file(p / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3), [],
                 "a.jsonl:1: 'messages' need a chat template"),
    "adapter's place": (None, ["--lora-out", "{data}"], "is a file"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_before_any_work(tmp_path, model, data, capsys, make, options, message):
    own = make(tmp_path) if make else data
    (tmp_path / "empty").mkdir()
    filled = [option.format(path=tmp_path / "empty", data=data) for option in options]
    assert finetune(model, own, tmp_path / "out", *filled) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message.replace("{model}", str(model)).split("{any}"))
    assert not (tmp_path / "out").exists()


def broken(model, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    change(folder)
    return folder


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_a_weight(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_few_embeddings(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


BROKEN = {
    "no tokenizer": (without_tokenizer, "no tokenizer that transformers can load"),
    "no end of text": (lambda folder: tokenizer(eos_token=None).save_pretrained(folder), "tokenizer has no end-of-text token"),
    "few embeddings": (with_few_embeddings, "tokens, the model embeddings for 100"),
    "a weight missing": (without_a_weight, "the weights lack 'model.norm.weight' (1 in all)"),
    "weights cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "the weights cannot be loaded"),
    "config broken": (lambda folder: (folder / "config.json").write_text("{"), "transformers cannot read it"),
    "an encoder": (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "no causal language model"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_folder_is_told_before_any_work(tmp_path, model, data, capsys, change, message):
    assert finetune(broken(model, tmp_path, change), data, tmp_path / "out", "--length", "16") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_or_another_run_is_left_alone(tmp_path, model, data, capsys):
    out = tmp_path / "out"
    finetune("builtin", data, out, *SHORT)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert finetune("builtin", data, out, *SHORT, "--lr", "0.01", "--seed", "3") == 2
    error = capsys.readouterr().err
    assert "lr: 0.0001 there, 0.01 now" in error and "seed: 0 there, 3 now" in error and "steps" not in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert finetune("builtin", data, out, *SHORT, "--lr", "0.01", "--overwrite") == 0
    assert logged(out, "lr")[0] == pytest.approx(0.01)
    (out / "run.json").write_text("[1]")
    assert finetune("builtin", data, out, *SHORT) == 2
    assert "run.json: cannot be read (it holds a list)" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert finetune("builtin", data, tmp_path / "mine", *SHORT, "--overwrite") == 2
    assert "holds 'thesis.tex' and no run" in capsys.readouterr().err
    assert finetune("builtin", data, data, *SHORT) == 2
    assert "this is a file" in capsys.readouterr().err
    assert finetune("builtin", data, data / "below", *SHORT) == 2
    assert "is a file" in capsys.readouterr().err
    for adapter in (tmp_path / "new", tmp_path / "new" / "model", tmp_path):
        assert finetune("builtin", data, tmp_path / "new", *SHORT, "--lora-out", str(adapter)) == 2
        assert "--lora-out" in capsys.readouterr().err


def test_a_stop_before_the_first_step_saves_what_it_says(tmp_path, data, monkeypatch, capsys):
    out, validate = tmp_path / "out", loop.Run.validate
    monkeypatch.setattr(loop.Run, "validate", lambda run: (signal.raise_signal(signal.SIGINT), validate(run))[1])
    assert finetune("builtin", data, out, *SHORT) == 130
    assert "stopped after step 0 of 4, all of it saved" in capsys.readouterr().out
    assert (out / "checkpoint.pt").is_file()
    monkeypatch.setattr(loop.Run, "validate", validate)
    assert finetune("builtin", data, out, *SHORT) == 0
    assert "going on from step 0 of 4" in capsys.readouterr().out
    assert len(logged(out, "validation_loss")) == 2


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, data):
    out = tmp_path / "out"
    assert finetune("builtin", data, out, *SHORT) == 0
    log = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(log + b'[1]\n5\n{"loss": 1}\n{"st\xff\n')
    assert finetune("builtin", data, out, *SHORT) == 0
    assert (out / "log.jsonl").read_bytes() == log


def test_a_full_disk_is_told_before_any_work(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**20))
    assert finetune("builtin", data, tmp_path / "out", *SHORT) == 2
    assert "and the disk has 1.0 MiB free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_free_memory_limits_where_no_limit_is_given(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(fits, "_machine_room", lambda: 2**20)
    assert finetune("builtin", data, tmp_path / "out", *SHORT, "--checkpointing", "--bf16") == 2
    error = capsys.readouterr().err
    assert "cpu has free 1.0 MiB" in error and "one_sided" in error and "--checkpointing" not in error and "--bf16" not in error


def diverge(monkeypatch, *, after):
    real, count = loop.cross_entropy, [0]

    def loss(logits, targets):
        count[0] += torch.is_grad_enabled()  # validation stays sound
        return real(logits, targets) * (float("nan") if torch.is_grad_enabled() and count[0] > after else 1)

    monkeypatch.setattr(loop, "cross_entropy", loss)


@pytest.mark.parametrize("options", [[], ["--max-grad-norm", "1"]])
def test_a_run_that_diverges_ends_and_keeps_its_last_weights(tmp_path, data, monkeypatch, capsys, options):
    diverge(monkeypatch, after=3)
    with pytest.warns(GradlrWarning, match="the step was left out whole"):
        assert finetune("builtin", data, tmp_path / "out", *SHORT, *options, "--steps", "20", "--save-every", "2") == 2
    assert "5 steps in a row" in (error := capsys.readouterr().err) and "--lr than 0.0001" in error
    assert "checkpoint.pt keeps the last good weights" in error
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not (tmp_path / "out" / "model").exists()


def test_one_bad_batch_is_left_out_and_counted(tmp_path, data, monkeypatch, capsys):
    real, count = loop.cross_entropy, [0]

    def loss(logits, targets):
        count[0] += torch.is_grad_enabled()
        return real(logits, targets) * (float("nan") if torch.is_grad_enabled() and count[0] == 2 else 1)

    monkeypatch.setattr(loop, "cross_entropy", loss)
    with pytest.warns(GradlrWarning, match="the step was left out whole"):
        assert finetune("builtin", data, tmp_path / "out", *SHORT) == 0
    assert "not finite: 1" in capsys.readouterr().out


def test_the_guide_names_every_option_and_no_other():
    guide = (Path(gradlr.__file__).parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    of_others = {"--local-dir", "--standalone", "--nproc-per-node", "--max-restarts", "--shutdown-timeout"}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", guide)) - of_others == options - {"--help"}
    for option, default in re.findall(r"`(--[a-z-]+) ([\d.]+)`", guide):
        if option not in {"--steps", *of_others}:
            assert parser.get_default(option[2:].replace("-", "_")) == float(default), option
