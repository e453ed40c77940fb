"""The examples of docs/trainers.md run with the trainers' own packages; what an example leaves open, a tiny stand-in fills."""

import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate_states import fresh_accelerate

import gradlr

ROOT = Path(gradlr.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))
_, *_PARTS = re.split(r"^## (.*)$", (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
CODE = {
    title: "\n".join(re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL))
    for title, body in zip(_PARTS[::2], _PARTS[1::2], strict=True)
}

pytestmark = [
    pytest.mark.usefixtures(fresh_accelerate.__name__),
    # torch's loader, asked for pinned memory by Trainer whether or not there is a device.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
    # What the trainers themselves still call by its old name, and advice about loaders.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(title, **names):
    exec(CODE[title], names)
    return names


def test_every_example_is_run_here():
    assert sorted(title for title, code in CODE.items() if code) == ["Lightning", "TRL", "diffusers", "sentence-transformers"]


def test_trl():
    pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import llama, trainable, unmoved, word_tokenizer, words

    model = llama()
    before = trainable(model)
    texts = Dataset.from_dict({"text": [words(*range(index, index + 6)) for index in range(16)]})
    ran = run("TRL", model=model, texts=texts, tokenizer=word_tokenizer())
    assert unmoved(before, model) == [] and len(ran["trainer"].optimizer.optimizer.tracker.history) == 8


def test_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from tiny import bag_of_words, trainable, unmoved, words

    encoder = bag_of_words()
    before = trainable(encoder)
    pairs = {
        "a": [words(index) for index in range(32)],
        "b": [words(2 * index) for index in range(32)],
        "label": [0, 1, 2, 1] * 8,
    }
    ran = run("sentence-transformers", encoder=encoder, pairs=datasets.Dataset.from_dict(pairs))
    assert unmoved(before, encoder) == []
    assert {"loss.classifier.weight", "loss.classifier.bias"} < {
        one.plan.name for one in ran["trainer"].optimizer.optimizer.records
    }


def test_diffusers():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ran = run("diffusers")
    tracker, opt = ran["tracker"], ran["optimizer"].optimizer
    assert len(tracker.history) == 8 and opt.skipped == 0 and ran["lr_scheduler"].get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert opt.grad_norm == pytest.approx(min(1.0, opt.grad_norm), rel=1e-5)  # clipped before step() looks
    assert {record.plan.kind for record in opt.records} == {"matrix", "vector"}
    assert all(int(opt.state[record.plan.parameter]["step"]) == 4 for record in opt.records)


def test_lightning():
    ran = run("Lightning")
    tracker = ran["trainer"].optimizers[0].tracker
    assert len(tracker.history) == 16 and ran["trainer"].global_step == 4
