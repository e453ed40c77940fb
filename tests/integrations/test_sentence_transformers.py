"""gradlr's Trainer in front of sentence-transformers': tiny encoders, losses with weights of their own, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parent))

import datasets
import transformers
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)  # fmt: skip
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import SPECIAL, WORDS, trainable, unmoved, word_tokenizer, words

import gradlr
from gradlr import AttachError
from gradlr.integrations.accelerate import unwrap
from gradlr.integrations.transformers import Trainer

pytestmark = [
    # torch's loader, asked for pinned memory by Trainer whether or not there is a device.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

WIDTH = 16


class ST(Trainer, SentenceTransformerTrainer):
    pass


class CE(Trainer, CrossEncoderTrainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=1, eos_token_id=1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def encoder(folder):
    module = Transformer(folder)
    module.model.pooler.requires_grad_(False)  # mean pooling does without
    return SentenceTransformer(modules=[module, Pooling(WIDTH)], device="cpu")


def softmax(model, seed=1):
    torch.manual_seed(seed)
    return losses.SoftmaxLoss(model, WIDTH, num_labels=3)


def pairs(*columns):
    rows = {
        "a": [words(index, index + 1) for index in range(32)],
        "b": [words(index + 2, index) for index in range(32)],
        "label": [index % 3 for index in range(32)],
        "score": [float(index % 2) for index in range(32)],
    }
    return datasets.Dataset.from_dict({column: rows[column] for column in columns})


def trainer_of(path, model, loss, *, kind=ST, data=None, options=None, given=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "seed": 1, **arguments,
    }  # fmt: skip
    made = CrossEncoderTrainingArguments if kind is CE else SentenceTransformerTrainingArguments
    return kind(
        model=model,
        args=made(str(path), **arguments),
        train_dataset=pairs("a", "b", "label") if data is None else data,
        loss=loss,
        **({"gradlr": options or {"rank": 4}} if given is None else given),
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def names(trainer):
    return {record.plan.name for record in unwrap(trainer.optimizer).records}


def assert_same(one, other, atol=0.0):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_a_loss_with_a_classifier_of_its_own_is_trained_with_the_model(tmp_path, folder):
    model = encoder(folder)
    loss = softmax(model)
    trainer = trainer_of(tmp_path, model, loss, gradient_accumulation_steps=2)
    before = trainable(model, loss)
    trainer.train()
    assert unmoved(before, model, loss) == []
    assert {"loss.classifier.weight", "loss.classifier.bias", "0.model.embeddings.word_embeddings.weight"} <= names(trainer)
    assert len(names(trainer)) == len(before)  # what the loss and the model share is one
    opt = unwrap(trainer.optimizer)
    shown = opt.tracker.history
    assert logged(trainer, "loss") == pytest.approx([(a + b) / 2 for a, b in zip(shown[::2], shown[1::2], strict=True)])
    assert opt.clipper.max_norm == 1.0 < min(logged(trainer, "grad_norm"))  # the default clips


class Seen(ST):
    """Keeps its batches."""

    batches = ()

    def compute_loss(self, model, inputs, **kwargs):
        self.batches = (*self.batches, dict(inputs))
        return super().compute_loss(model, inputs, **kwargs)


def test_it_is_the_plain_loop_over_model_and_classifier_with_the_trainers_clipping(tmp_path, folder):
    options, model = {"rank": 4, "momentum_rank": 2}, encoder(folder)
    loss = softmax(model)
    trainer = trainer_of(
        tmp_path, model, loss, kind=Seen, options=options, max_grad_norm=0.5, lr_scheduler_type="constant", weight_decay=0.1
    )
    trainer.train()
    plain = softmax(encoder(folder))
    opt = gradlr.attach(
        torch.nn.ModuleList([plain.model, plain]), gradlr.LossTracker(), lr=1e-2, apply="step", max_grad_norm=0.5,
        weight_decay=0.1, **options,
    )  # fmt: skip
    norms = []
    for batch in trainer.batches:
        opt.tracker(plain(*trainer.collect_features(batch))).backward()
        opt.step()
        norms.append(opt.grad_norm)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-5) and min(norms) > 0.5 and len(norms) == 4
    assert_same(loss, plain, atol=1e-6)  # the same arithmetic, but for the sum of the norm


@pytest.mark.slow
def test_four_micro_batches_are_one_batch(tmp_path, folder):
    made = []
    for steps in (1, 4):
        model = encoder(folder)
        loss = softmax(model)
        trainer_of(
            tmp_path,
            model,
            loss,
            options={"rank": 1.0},
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
        ).train()
        made.append(loss)
    # Sums in another order, in float32; the polar factor enlarges their rounding where singular values are small.
    assert_same(*made, atol=1e-5)


def test_resuming_is_bit_for_bit_where_the_loss_is_carried_over(tmp_path, folder):
    """The trainer's checkpoints hold the model alone; a loss with weights is the user's to save."""
    arguments = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "options": {"rank": 4, "momentum_rank": 2},
    }  # fmt: skip

    class Keeping(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            if state.global_step == 3:
                torch.save(loss.classifier.state_dict(), tmp_path / "classifier.pt")

    model = encoder(folder)
    loss = softmax(model)
    whole = trainer_of(tmp_path, model, loss, **arguments)
    whole.add_callback(Keeping())
    whole.train()
    again = encoder(folder)
    other = softmax(again, seed=9)
    resumed = trainer_of(tmp_path, again, other, **arguments)
    other.classifier.load_state_dict(torch.load(tmp_path / "classifier.pt"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(loss, other)
    one, two = (unwrap(trainer.optimizer).tracker.history for trainer in (whole, resumed))
    assert one == two and len(one) == 12


def test_a_loss_for_each_dataset(tmp_path, folder):
    model = encoder(folder)
    both = {"nli": softmax(model), "qa": losses.MultipleNegativesRankingLoss(model)}
    data = {"nli": pairs("a", "b", "label"), "qa": pairs("a", "b")}
    trainer = trainer_of(tmp_path, model, both, data=data, max_steps=8)
    before = trainable(model, both["nli"])
    trainer.train()
    assert unmoved(before, model, both["nli"]) == []
    assert "loss.nli.classifier.weight" in names(trainer)


def test_rates_of_parameters_of_their_own_are_followed(tmp_path, folder):
    model = encoder(folder)
    rates = {r"^classifier\.": 5e-2, "embeddings": 0.0}
    trainer = trainer_of(tmp_path, model, softmax(model), learning_rate_mapping=rates, weight_decay=0.1)
    before = trainable(model)
    trainer.train()
    found = {
        name: (group["initial_lr"], group["weight_decay"])
        for group in unwrap(trainer.optimizer).param_groups
        for name in group["param_names"]
    }
    assert found["loss.classifier.weight"] == (pytest.approx(5e-2), 0.1)
    assert found["0.model.encoder.layer.0.output.dense.weight"] == (pytest.approx(1e-2), 0.1)
    assert found["0.model.embeddings.word_embeddings.weight"][0] == 0
    assert all("embeddings" in name for name in unmoved(before, model))


def test_gradients_that_are_cached_come_in_parts(tmp_path, folder):
    """GradCache: the hook on the loss runs a backward for each mini-batch, inside the one that the trainer has begun."""
    made = []
    for loss_of in (
        lambda model: losses.MultipleNegativesRankingLoss(model),
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ):
        model = encoder(folder)
        trainer = trainer_of(tmp_path, model, loss_of(model), data=pairs("a", "b"), options={"rank": 1.0})
        before = trainable(model)
        trainer.train()
        assert unmoved(before, model) == []
        made.append((model, unwrap(trainer.optimizer).tracker.history))
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-4)
    # Sums in another order, in float32; the polar factor enlarges their rounding where singular values are small.
    assert_same(made[0][0], made[1][0], atol=1e-4)


def test_matryoshka_and_cross_encoders(tmp_path, folder):
    model = encoder(folder)
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8, 4])
    trainer = trainer_of(tmp_path, model, loss, data=pairs("a", "b"), max_steps=2)
    before = trainable(model)
    trainer.train()
    assert unmoved(before, model) == []
    cross = CrossEncoder(folder, num_labels=1, device="cpu")
    trainer = trainer_of(tmp_path, cross, BinaryCrossEntropyLoss(cross), kind=CE, data=pairs("a", "b", "score"), max_steps=2)
    before = trainable(cross)
    trainer.train()
    assert unmoved(before, cross) == []


def test_an_optimizer_that_leaves_the_classifier_out_is_refused(tmp_path, folder):
    model = encoder(folder)
    opt = gradlr.attach(model, gradlr.LossTracker(), apply="step")
    loss = softmax(model)
    with pytest.raises(
        AttachError, match=r"2 parameters \(of shapes \(3, 48\), \(3,\)\) that the given optimizer is not attached"
    ):
        trainer_of(tmp_path, model, loss, given={"optimizers": (opt, None)}).train()
    loss.classifier.requires_grad_(False)  # meant so
    trainer_of(tmp_path, model, loss, given={"optimizers": (opt, None)}, max_steps=1).train()
