"""gradlr's Trainer in front of TRL's: SFT, DPO and GRPO of a tiny Llama, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import datasets
import peft
import transformers
import trl
from tiny import llama, trainable, unmoved, word_tokenizer, words

import gradlr
from gradlr import LossError
from gradlr.integrations.accelerate import unwrap
from gradlr.integrations.transformers import Trainer

pytestmark = [
    # torch's loader, asked for pinned memory by Trainer whether or not there is a device.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
    # TRL itself still calls names of transformers' that have become old.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


class SFT(Trainer, trl.SFTTrainer):
    pass


class DPO(Trainer, trl.DPOTrainer):
    pass


class GRPO(Trainer, trl.GRPOTrainer):
    pass


def rewards(completions, **_):
    return [float(completion.count("w1")) for completion in completions]


TEXTS = [words(*range(index, index + 4 + index % 5)) for index in range(32)]
PAIRS = {
    "prompt": [words(1, 2)] * 32,
    "chosen": [words(index, index + 1) for index in range(32)],
    "rejected": [words(index + 7, index) for index in range(32)],
}
# What each is made with: its arguments' class, its data, and what it needs besides.
KINDS = {
    SFT: (trl.SFTConfig, {"text": TEXTS}, {"max_length": 32}, dict),
    DPO: (trl.DPOConfig, PAIRS, {"max_length": 32}, lambda: {"ref_model": llama()}),
    GRPO: (trl.GRPOConfig, {"prompt": [words(1, 2), words(3, 4)] * 8},
           {"num_generations": 4, "max_completion_length": 6}, lambda: {"reward_funcs": rewards}),
}  # fmt: skip


def trainer_of(path, kind=SFT, model=None, *, options=None, given=None, **arguments):
    config, data, needed, more = KINDS[kind if kind in KINDS else SFT]
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-2, "seed": 1, **needed, **arguments,
    }  # fmt: skip
    chosen = {"gradlr": options or {"rank": 4}} if given is None else given
    return kind(
        model=llama() if model is None else model,
        args=config(str(path), **arguments),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=word_tokenizer(),
        **more(),
        **chosen,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def history(trainer):
    return unwrap(trainer.optimizer).tracker.history


def assert_same(one, other, atol=0.0):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_is_trained_with_accumulation_and_clipping(tmp_path, kind):
    trainer = trainer_of(tmp_path, kind, gradient_accumulation_steps=2)
    before = trainable(trainer.model)
    trainer.train()
    assert unmoved(before, trainer.model) == []
    opt = unwrap(trainer.optimizer)
    assert opt.clipper.max_norm == 1.0 and opt.skipped == 0
    assert min(logged(trainer, "grad_norm")) > 0
    # Two micro-batches a step, each in its own true size: of tokens in SFT, of pairs in DPO, of groups in GRPO.
    shown = history(trainer)
    means = [(a + b) / 2 for a, b in zip(shown[::2], shown[1::2], strict=True)]
    closeness = (
        {"abs": 0.1} if kind is SFT else {"abs": 1e-6}
    )  # where micro-batches have different numbers of tokens, they weigh so
    assert logged(trainer, "loss") == pytest.approx(means, **closeness) and len(means) == 4


def test_four_micro_batches_are_one_batch(tmp_path):
    models = []
    for steps in (1, 4):
        trainer = trainer_of(
            tmp_path, options={"rank": 1.0}, gradient_accumulation_steps=steps, per_device_train_batch_size=8 // steps
        )
        trainer.train()
        models.append(trainer.model)
    # Sums in another order, in float32, which the polar factor enlarges up to 470-fold where singular values are small: 3.5e-5
    # was measured, of weights that move by 1e-2 a step.
    assert_same(*models, atol=5e-5)


def test_fine_tuning_is_the_plain_loop_with_the_trainers_clipping(tmp_path):
    options = {"rank": 4, "momentum_rank": 2}
    trainer = trainer_of(tmp_path, options=options, max_grad_norm=0.3, train_sampling_strategy="sequential")
    trainer.train()
    model, batches = llama(), iter(trainer.get_train_dataloader())
    opt = gradlr.attach(model, gradlr.LossTracker(), lr=1e-2, apply="step", max_grad_norm=0.3, **options)
    scheduler = transformers.get_scheduler(trainer.args.lr_scheduler_type, opt, 0, 4)
    norms = []
    for _ in range(4):
        opt.tracker(model(**next(batches)).loss).backward()
        opt.step()
        norms.append(opt.grad_norm)
        scheduler.step()
    # TRL computes the same loss without logits: another rounding, in float32.
    assert history(trainer) == pytest.approx(opt.tracker.history, rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4) and min(norms) > 0.3
    assert_same(trainer.model, model, atol=1e-5)


def test_resuming_is_bit_for_bit(tmp_path):
    arguments = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "options": {"rank": 4, "momentum_rank": 2},
    }  # fmt: skip
    whole = trainer_of(tmp_path, **arguments)
    whole.train()
    resumed = trainer_of(tmp_path, model=llama(seed=5), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(whole.model, resumed.model)
    assert history(whole) == history(resumed) and len(history(whole)) == 12


def test_of_a_peft_model_the_adapters_are_trained_and_nothing_else(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_of(tmp_path, given={"gradlr": {"rank": 2}, "peft_config": lora}, gradient_accumulation_steps=2)
    before, frozen = trainable(trainer.model), trainer.model.base_model.model.lm_head.weight.detach().clone()
    assert len(before) == 4
    trainer.train()
    assert unmoved(before, trainer.model) == []
    assert len(unwrap(trainer.optimizer).records) == 4
    assert torch.equal(frozen, trainer.model.base_model.model.lm_head.weight)


@pytest.mark.slow
def test_completions_may_serve_several_steps(tmp_path):
    """GRPO with several iterations: the loss is zero by construction in the first alone."""
    trainer = trainer_of(tmp_path, GRPO, num_iterations=2, gradient_accumulation_steps=1)
    before = trainable(trainer.model)
    trainer.train()
    assert unmoved(before, trainer.model) == [] and len(history(trainer)) == 4


def test_the_stock_trainer_with_an_optimizer_of_gradlr_tells_the_way(tmp_path):
    model = llama()
    opt = gradlr.attach(model, gradlr.LossTracker(), apply="step")
    before = trainable(model)
    trainer = trainer_of(tmp_path, kind=trl.SFTTrainer, model=model, given={"optimizers": (opt, None)})
    with pytest.raises(LossError, match=r"gradlr\.integrations\.transformers\.Trainer"):
        trainer.train()
    assert len(unmoved(before, model)) == len(before)
