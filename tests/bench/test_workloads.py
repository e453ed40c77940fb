"""Every workload is the same for everybody: model and data depend on the seed alone, and validation is held out."""

import importlib.util

import pytest
import torch

from gradlr.apps.bench import classification, pretrain, smollm2
from gradlr.apps.bench.baselines import baseline
from gradlr.apps.bench.quality import choose
from gradlr.apps.bench.workloads import WORKLOADS, rate_factor
from gradlr.errors import ArgumentError

CUT = {"layers": 2, "length": 48, "validation_windows": 4}
SMALL = {
    "pretrained": {"validation_windows": 16},
    "scratch": {"validation_windows": 16},
    "small-batches": {"validation_windows": 16},
    "wide": {"validation_windows": 16, "width": 32},
    "minilm": {"batch_size": 2, "length": 16, "training_examples": 8, "validation_examples": 1},
    "digits": {},
    "smollm2": CUT,
    "smollm2-chat": CUT,
}
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in smollm2.NEEDED),
    reason=f"needs {', '.join(smollm2.NEEDED)}: pip install 'gradlr[bench]'",
)
each_workload = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_smollm2 if SMALL[name] is CUT else ()) for name in WORKLOADS]
)


@pytest.fixture(scope="module", autouse=True)
def briefly_pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "cache_folder", lambda: folder)
        patch.setattr(pretrain, "BRIEF_STEPS", 2)
        yield


def make(name, **more):
    return WORKLOADS[name](**{"steps": 2, **SMALL[name], **more})


def losses(workload, model_seed, data_seed):
    model = workload.model(model_seed, "cpu")
    torch.manual_seed(0)
    return [compute().item() for compute in workload.losses(model, data_seed)]


@each_workload
def test_the_seed_alone_decides(name):
    workload = make(name)
    first, again, other = (losses(workload, 0, seed) for seed in (1, 1, 2))
    assert len(first) == workload.steps
    assert first == again != other


@each_workload
def test_validation_is_fixed_finite_and_leaves_the_model_in_training(name):
    workload = make(name)
    model = workload.model(0, "cpu")
    found = workload.evaluate(model)
    assert found == workload.evaluate(model)
    # Two layers out of thirty are sure of what is wrong.
    assert 0 < found["loss"] < (50 if SMALL[name] is CUT else 7)
    assert 0 <= found.get("accuracy", 0) <= 1
    assert model.training


@each_workload
def test_the_schedule_warms_up_and_decays_to_a_tenth(name):
    workload = WORKLOADS[name]()
    factors = [rate_factor(workload, step) for step in range(workload.steps)]
    assert factors[0] == pytest.approx(1 / workload.warmup)
    assert max(factors) == factors[workload.warmup - 1]
    # Linear: one step before the end of the decay.
    assert factors[-1] == pytest.approx(0.1, abs=1 / workload.steps)


def test_digits_are_split_once_for_all():
    (train, train_labels), (held_out, labels) = classification.Digits().data()
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.shape[1:] == (1, 8, 8) and train.min() >= 0 and train.max() == 1
    assert set(labels.tolist()) == set(train_labels.tolist()) == set(range(10))


def test_an_epoch_sees_every_example_once():
    workload = make("digits", steps=22, batch_size=64)
    model = workload.model(0, "cpu")
    seen = torch.cat([compute.args[1] for compute in workload.losses(model, 0)])
    images = torch.stack([row.flatten() for row in seen])
    assert len(images.unique(dim=0)) >= 22 * 64 - 5  # a few of the images are twins


def test_sources_are_balanced_and_validation_comes_from_the_end_of_each_module():
    workload = make("minilm", training_examples=4, validation_examples=2)
    (tokens, labels), (held_out, held_out_labels) = workload.data()
    assert tokens.shape == (80, 16) and held_out.shape == (40, 16)
    assert labels.bincount().tolist() == [4] * 20
    assert held_out_labels.bincount().tolist() == [2] * 20
    assert not {tuple(row) for row in tokens.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_padding_does_not_change_the_answer():
    model = make("minilm").model(0, "cpu").eval()
    tokens = torch.randint(1000, 2000, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.zeros(1, 8, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        # Attention of masked positions underflows to zero; sums of float32 in another order.
        torch.testing.assert_close(model(tokens), model(padded), rtol=1e-4, atol=1e-4)


def test_adapters_and_flat_packages_stay_away_from_what_they_cannot_train():
    names = ["adamw", "lora", "adalomo", "galore"]
    assert [one.name for one in choose(names, make("pretrained"))] == names
    assert [one.name for one in choose(names, make("scratch"))] == ["adamw", "adalomo", "galore"]
    assert [one.name for one in choose(names, make("digits"))] == ["adamw", "galore"]


@pytest.mark.slow
def test_the_pretrained_encoder_knows_more_than_chance_after_a_few_steps():
    workload = make("minilm", steps=4, batch_size=8, length=48, training_examples=32, validation_examples=2)
    model = workload.model(0, "cpu")
    before = workload.evaluate(model)["loss"]
    train_step = baseline("default").make(model, 4e-3)
    for compute in workload.losses(model, 0):
        train_step.step(compute)
    assert workload.evaluate(model)["loss"] < before


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'gradlr\[bench\]'"):
        classification.pretrained_folder()
