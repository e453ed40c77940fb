"""gradlr.integrations.transformers: a tiny Llama through the real Trainer, on the CPU."""

import copy

import pytest
import torch
import transformers
from torch import nn

import gradlr
from gradlr import ArgumentError, AttachError, GradlrWarning, LossError
from gradlr.integrations.accelerate import unwrap
from gradlr.integrations.transformers import Trainer

pytestmark = [
    # torch's loader, asked for pinned memory by Trainer whether or not there is a device.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
    # A model this small; gradlr's own advice.
    pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would"),
]

VOCABULARY, LENGTH = 40, 12


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, use_cache=False, bos_token_id=None, eos_token_id=None,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(count=32):
    """Sequences that count upwards, with labels of different lengths."""
    rows = []
    for index in range(count):
        ids = (torch.arange(LENGTH) * (1 + index % 3) + index) % VOCABULARY
        labels = torch.where(torch.arange(LENGTH) < 4 + index % 9, ids, -100)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trainer_of(path, model=None, *, options=None, optimizer=None, cls=Trainer, data=None, eval_data=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "seed": 1, **arguments,
    }  # fmt: skip
    chosen = {"optimizers": (optimizer, None)} if optimizer is not None else {"gradlr": options or {"momentum_rank": 2}}
    return cls(
        model=llama() if model is None else model,
        args=transformers.TrainingArguments(output_dir=str(path), **arguments),
        train_dataset=texts() if data is None else data,
        eval_dataset=eval_data,
        **chosen,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def tracker_of(trainer):
    return unwrap(trainer.optimizer).tracker


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one, other, atol=0.0):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Watched(Trainer):
    """Writes down each micro-batch's mean loss and the true norm of each step's gradients, from a copy of the model."""

    def __init__(self, *args, **kwargs):
        self.losses, self.norms, self.total = [], [], None
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        twin = copy.deepcopy(model.to("cpu"))
        self.losses.append(twin(**inputs).loss.item())
        twin(**inputs, num_items_in_batch=num_items_in_batch).loss.backward()
        gradients = [parameter.grad for parameter in twin.parameters()]
        self.total = gradients if self.total is None else [a + b for a, b in zip(self.total, gradients, strict=True)]
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        self.norms.append(torch.stack([gradient.norm() for gradient in self.total]).norm().item())
        self.total = None
        return super()._clip_grad_norm(model)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_tracker_sees_true_losses_and_the_log_true_norms(tmp_path, steps):
    trainer = trainer_of(
        tmp_path, cls=Watched, options={"rank": 1.0}, max_steps=3, gradient_accumulation_steps=steps,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    # Means over different numbers of tokens, one rounding each: float32.
    assert tracker_of(trainer).history == pytest.approx(trainer.losses, rel=1e-5)
    assert len(trainer.losses) == 3 * steps
    # At full rank gradients wait as they are, and their sum has the true norm.
    assert logged(trainer, "grad_norm") == pytest.approx(trainer.norms, rel=1e-5)
    assert min(trainer.norms) > 0.1


def test_four_micro_batches_are_one_batch(tmp_path):
    results = []
    for steps in (1, 4):
        trainer = trainer_of(
            tmp_path, options={"rank": 1.0}, gradient_accumulation_steps=steps, per_device_train_batch_size=8 // steps,
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.model), logged(trainer, "loss")))
    # Sums in another order, in float32; the polar factor enlarges their rounding where singular values are small:
    # up to 470-fold. 1.3e-5 was measured, of weights that move by 1e-2 a step.
    assert_same(results[0][0], results[1][0], atol=5e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_a_micro_batch_without_labels_counts_for_nothing(tmp_path):
    data = texts()
    for row in data[1::2]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = trainer_of(
        tmp_path, data=data, per_device_train_batch_size=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential"
    )
    trainer.train()
    history = tracker_of(trainer).history
    assert history[1::2] == [0.0] * 4 and min(history[::2]) > 1
    assert history[::2] == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    assert unwrap(trainer.optimizer).skipped == 0


def by_hand(model, opt, steps, batch=8):
    scheduler = transformers.get_linear_schedule_with_warmup(opt, 0, steps)
    rows = texts()
    for step in range(steps):
        chosen = rows[batch * step : batch * (step + 1)]
        inputs = {key: torch.stack([row[key] for row in chosen]) for key in ("input_ids", "labels")}
        count = inputs["labels"][:, 1:].ne(-100).sum()
        opt.tracker(model(**inputs, num_items_in_batch=count).loss).backward()
        opt.step()
        scheduler.step()


SLOW = pytest.mark.slow
CLIPPING = [("hook", 1.0), ("adaptor", 0.01), ("hook", 0.0)]
CLIPPING += [pytest.param(*pair, marks=SLOW) for pair in (("adaptor", 1.0), ("hook", 0.01), ("adaptor", 0.0))]


@pytest.mark.parametrize(("capture", "max_grad_norm"), CLIPPING)
def test_clipping_is_that_of_attach(tmp_path, capture, max_grad_norm):
    options = {"momentum_rank": 2, "rank": 4, "capture": capture}
    # 1.0 is what TrainingArguments have by themselves.
    arguments = {} if max_grad_norm == 1.0 else {"max_grad_norm": max_grad_norm}
    trainer = trainer_of(tmp_path, options=options, train_sampling_strategy="sequential", **arguments)
    trainer.train()
    model = llama()
    opt = gradlr.attach(model, gradlr.LossTracker(), lr=1e-2, apply="step", max_grad_norm=max_grad_norm or None, **options)
    by_hand(model, opt, 4)
    assert_same(weights(model), weights(trainer.model))
    assert logged(trainer, "grad_norm")[-1] == pytest.approx(opt.grad_norm, rel=1e-6)
    assert min(logged(trainer, "grad_norm")) > 1.0  # so that the default clips


def test_the_rate_follows_the_scheduler_and_the_loss_falls(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20, lr_scheduler_type="linear", learning_rate=5e-2, weight_decay=0.1)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert rates[0] == pytest.approx(5e-2) and rates[-1] == pytest.approx(5e-2 / 20)
    opt = unwrap(trainer.optimizer)
    assert {group["kind"]: group["weight_decay"] for group in opt.param_groups} == {
        "matrix": 0.1,
        "embedding": 0.1,
        "vector": 0.0,
    }
    assert opt.skipped == 0
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.9 * losses[0]


def test_evaluation_is_not_shown(tmp_path):
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2, eval_data=texts(8))
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2
    assert len(tracker_of(trainer).history) == 4
    assert tracker_of(trainer).max_loss == max(tracker_of(trainer).history)


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}])
def test_bfloat16_and_checkpointing_train_alike(tmp_path, options):
    plain = trainer_of(tmp_path, max_steps=6, gradient_accumulation_steps=options.get("gradient_accumulation_steps", 1))
    plain.train()
    other = trainer_of(tmp_path, max_steps=6, **options)
    other.train()
    if "bf16" in options:
        # Autocast rounds to 8 bits.
        assert logged(other, "loss") == pytest.approx(logged(plain, "loss"), rel=2e-2)
        dtypes = {value.dtype for state in other.optimizer.state.values() for value in state.values()}
        assert dtypes == {torch.float32, torch.int64}
        assert logged(other, "loss") != logged(plain, "loss")
    else:
        assert other.model.is_activation_checkpointing
        assert_same(weights(plain.model), weights(other.model))


def test_resuming_is_bit_for_bit(tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trainer_of(tmp_path, options={"rank": 4, "momentum_rank": 2}, **arguments)
    whole.train()
    resumed = trainer_of(tmp_path, llama(seed=5), options={"rank": 4, "momentum_rank": 2}, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole.model), weights(resumed.model))
    one, other = (unwrap(trainer.optimizer).state_dict() for trainer in (whole, resumed))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    assert one["gradlr"]["tracker"]["count"] == other["gradlr"]["tracker"]["count"] == 12
    assert logged(whole, "grad_norm") == logged(resumed, "grad_norm")


class Overflowing(Trainer):
    """With fp16=True, which accelerate refuses on the CPU, and infinite gradients in one step."""

    bad_step = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.state.global_step == self.bad_step:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


def test_a_step_that_a_scaler_skips_leaves_nothing_over(tmp_path):
    results = []
    for bad_step, data in ((2, texts()), (None, texts()[:16] + texts()[24:])):
        steps = 4 if bad_step else 3
        trainer = trainer_of(
            tmp_path, cls=Overflowing, data=data, max_steps=steps, train_sampling_strategy="sequential", save_steps=1,
            save_strategy="steps", lr_scheduler_type="constant", gradient_accumulation_steps=2, per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.bad_step = bad_step
        trainer.train()
        results.append((weights(trainer.model), logged(trainer, "grad_norm")))
        assert unwrap(trainer.optimizer).skipped == (1 if bad_step else 0)
        assert trainer.accelerator.scaler.get_scale() == (2.0**9 if bad_step else 2.0**10)
    # After the overflow the scale is half as large, which changes nothing but what is subnormal in float16.
    assert_same(results[0][0], results[1][0], atol=1e-4)
    norms = results[0][1]
    assert not norms[2] < float("inf")
    assert norms[:2] + norms[3:] == pytest.approx(results[1][1], rel=1e-4)
    assert max(results[1][1]) < 10  # unscaled


class Lossless(Trainer):
    """A subclass of the user's own that computes its loss itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return (loss, {"logits": logits}) if return_outputs else loss


def test_a_loss_of_the_users_own_is_shown_as_well(tmp_path):
    trainer = trainer_of(tmp_path, cls=Lossless, max_steps=2, gradient_accumulation_steps=2)
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    history = tracker_of(trainer).history
    assert len(history) == 4
    assert history[0] == pytest.approx(torch.log(torch.tensor(float(VOCABULARY))).item(), rel=0.05)  # of a fresh model
    assert logged(trainer, "loss")[0] == pytest.approx((history[0] + history[1]) / 2, rel=1e-6)


def test_an_optimizer_of_the_users_own(tmp_path):
    model = llama()
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, lr=1e-2, momentum_rank=2, apply="step")
    trainer = trainer_of(tmp_path, model, optimizer=opt)
    trainer.train()
    made = trainer_of(tmp_path)
    made.train()
    assert_same(weights(model), weights(made.model))
    assert unwrap(trainer.optimizer) is opt and opt.clipper.max_norm == 1.0 and len(tracker.history) == 4
    trainer.train()  # again, with the same optimizer
    assert len(tracker.history) == 8


def test_updates_in_backward_need_neither_clipping_nor_accumulation(tmp_path):
    options = {"apply": "backward", "momentum_rank": 2}
    with pytest.raises(ArgumentError, match="max_grad_norm=0"):
        trainer_of(tmp_path, options=options).train()
    with pytest.raises(gradlr.BackwardError, match='apply="step"'):
        trainer_of(tmp_path, options=options, max_grad_norm=0, gradient_accumulation_steps=2).train()
    trainer = trainer_of(tmp_path, options=options, max_grad_norm=0, max_steps=16, learning_rate=5e-2)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] and logged(trainer, "grad_norm") == []


def test_what_does_not_fit_is_refused(tmp_path):
    model = llama()
    with pytest.raises(ArgumentError, match="AdamW; make it with gradlr"):
        trainer_of(tmp_path, model, optimizer=torch.optim.AdamW(model.parameters())).train()
    with pytest.raises(ArgumentError, match="leave one out"):
        Trainer(
            model=model, args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), gradlr={},
            optimizers=(gradlr.attach(model, gradlr.LossTracker()), None),
        )  # fmt: skip


def test_a_gradient_that_is_not_finite_is_told(tmp_path):
    class Spoiled(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    trainer = trainer_of(tmp_path, cls=Spoiled)
    with pytest.warns(GradlrWarning, match="left out whole: loss number 2 is nan"):
        trainer.train()
    assert unwrap(trainer.optimizer).skipped == 1


def test_transformers_own_default_rate_is_not_passed_on_and_that_is_told(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=5e-5, max_steps=1)
    with pytest.warns(GradlrWarning, match="default of 5e-5, which is AdamW's"):
        trainer.train()
    assert unwrap(trainer.optimizer).param_groups[0]["initial_lr"] == 1e-4
    trainer_of(tmp_path, options={"lr": 5e-5}, learning_rate=5e-5, max_steps=1).train()


class Projected(transformers.Trainer):
    """A trainer of somebody's own: a second head that the model knows nothing of, and rates and decays by groups."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep(nn.Linear(VOCABULARY, VOCABULARY))
        self.is_choosy = False

    def keep(self, head):
        torch.nn.init.eye_(head.weight)
        self.heads = {"second": head}

    @property
    def head(self):
        return self.heads["second"]

    def create_optimizer(self):
        body = dict(self.model.named_parameters())
        table = body.pop("model.embed_tokens.weight")
        groups = [
            {"params": [*body.values()][: 2 if self.is_choosy else None], "weight_decay": 0.1},
            {"params": [table], "weight_decay": 0.0},
            {"params": [*self.head.parameters()], "lr": 3 * self.args.learning_rate, "weight_decay": 0.1},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = self.head(model(**inputs).logits[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class GradlrProjected(Trainer, Projected):
    pass


class Hidden(Projected):
    """Keeps its head where nobody finds it."""

    def keep(self, head):
        super().keep(head)
        self.heads = {"second": lambda: head}

    @property
    def head(self):
        return self.heads["second"]()


class GradlrHidden(Trainer, Hidden):
    pass


def test_what_a_subclass_would_optimize_is_trained_at_its_rates_and_decays(tmp_path):
    trainer = trainer_of(
        tmp_path, cls=GradlrProjected, weight_decay=0.1, gradient_accumulation_steps=2, lr_scheduler_type="constant"
    )
    assert trainer.loss_is_scaled_for_ga is None
    before = weights(trainer.model) + weights(trainer.head)
    trainer.train()
    after = weights(trainer.model) + weights(trainer.head)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    groups = unwrap(trainer.optimizer).param_groups
    rates = [group["lr"] * group["lr_scale"] for group in groups]
    found = {
        name: (rate, group["weight_decay"]) for rate, group in zip(rates, groups, strict=True) for name in group["param_names"]
    }
    assert len(found) == len(before)
    assert found["heads.second.weight"] == (pytest.approx(3e-2), 0.1)
    assert found["heads.second.bias"] == (pytest.approx(3e-2), 0.0)  # a vector's decay
    assert found["model.embed_tokens.weight"] == (pytest.approx(1e-2 / 8), 0.0)  # an embedding's share of the rate
    assert found["model.layers.0.mlp.up_proj.weight"] == (pytest.approx(1e-2), 0.1)


def test_ones_own_groups_come_before_those_of_the_subclass(tmp_path):
    options = {"groups": [{"match": "heads.second.weight", "lr": 1e-3, "rank": 2}]}
    trainer = trainer_of(tmp_path, cls=GradlrProjected, options=options, lr_scheduler_type="constant", max_steps=1)
    trainer.train()
    records = {record.plan.name: record for record in unwrap(trainer.optimizer).records}
    groups = unwrap(trainer.optimizer).param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert records["heads.second.weight"].largest_rank == 2
    assert (rates["heads.second.weight"], rates["heads.second.bias"]) == pytest.approx((1e-3, 3e-2))


def test_what_gradlr_would_not_train_as_the_subclass_does_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path, cls=GradlrHidden)
    message = (
        r"GradlrHidden.create_optimizer\(\) would also train 2 parameters \(of shapes \(40, 40\), \(40,\)\).*self.head = head"
    )
    with pytest.raises(AttachError, match=message):
        trainer.train()
    trainer = trainer_of(tmp_path, cls=GradlrProjected)
    trainer.is_choosy = True
    with pytest.raises(AttachError, match=r"would train 5 of 14 trainable parameters, and 'model.*freeze"):
        trainer.train()
    trainer.model.requires_grad_(False)
    trainer.model.model.embed_tokens.requires_grad_(True)
    trainer.train()
    assert len(unwrap(trainer.optimizer).records) == 3  # the table, and the head's two


def test_gradlrs_class_must_stand_in_front():
    with pytest.raises(ArgumentError, match=r"gradlr's comes first: class Wrong\(Trainer, Projected\)"):

        class Wrong(Projected, Trainer):
            pass


@pytest.mark.parametrize("apply", ["step", "backward"])
def test_a_stock_trainer_tells_the_way(tmp_path, apply):
    model = llama()
    before, opt = weights(model), gradlr.attach(model, gradlr.LossTracker(), apply=apply)
    trainer = trainer_of(tmp_path, model, cls=transformers.Trainer, optimizer=opt)
    with pytest.raises(LossError, match=r"In a trainer.*gradlr\.integrations\.transformers\.Trainer.*Nothing was changed"):
        trainer.train()
    assert_same(before, weights(model))


def test_a_stock_trainer_that_shows_its_losses_trains_and_clips_nothing(tmp_path):
    class Showing(transformers.Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return unwrap(self.optimizer).tracker(loss) if model.training else loss

    model = llama()
    opt = gradlr.attach(model, gradlr.LossTracker(), lr=1e-2, apply="step")
    trainer = trainer_of(tmp_path, model, cls=Showing, optimizer=opt, max_steps=2)
    with pytest.warns(GradlrWarning, match="clip_grad_norm_ finds no gradient of"):
        trainer.train()
    assert len(opt.tracker.history) == 2 and opt.grad_norm > 1.0
    assert logged(trainer, "grad_norm") == [0.0, 0.0]  # what docs/trainers.md warns of


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "adafactor"])
def test_another_optimizer_in_the_arguments_is_a_contradiction(tmp_path, optim):
    with pytest.raises(ArgumentError, match=f"optim='{optim}' asks for another optimizer"):
        trainer_of(tmp_path, optim=optim)


def test_another_optimizers_class_is_a_contradiction(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ArgumentError, match="optimizer_cls_and_kwargs asks for another optimizer"):
        Trainer(model=llama(), args=args, optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    trainer_of(tmp_path, optim="adamw_torch")


def no_memory(gradient):
    raise RuntimeError("CUDA out of memory.")


class Small(Trainer):
    """The backward of large batches breaks in its middle, as it does where memory ends."""

    sizes = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.sizes = (*self.sizes, len(inputs["input_ids"]))
        if self.sizes[-1] < 8:
            return super().training_step(model, inputs, num_items_in_batch)
        with model.model.layers[0].self_attn.q_proj.weight.register_hook(no_memory):
            return super().training_step(model, inputs, num_items_in_batch)


def test_a_batch_that_does_not_fit_is_tried_again_smaller_and_leaves_nothing_over(tmp_path):
    trainer = trainer_of(tmp_path, cls=Small, options={"rank": 4}, auto_find_batch_size=True)
    trainer.train()
    assert trainer.sizes == (8, 7, 7, 7, 7)
    plain = trainer_of(tmp_path, options={"rank": 4}, per_device_train_batch_size=7)
    plain.train()
    assert_same(weights(trainer.model), weights(plain.model))


@SLOW
def test_where_it_has_changed_weights_before_it_broke_that_is_told(tmp_path):
    trainer = trainer_of(tmp_path, cls=Small, options={"apply": "backward"}, auto_find_batch_size=True, max_grad_norm=0)
    with pytest.warns(GradlrWarning, match="the backward of loss number 1 did not come to its end.* were updated before it"):
        trainer.train()
    assert trainer.sizes == (8, 7, 7, 7, 7)


def test_without_logits_trainer_accumulates_evaluates_and_logs_the_same(tmp_path):
    runs = []
    for is_chunked in (False, True):
        model = gradlr.chunk_head_(llama()) if is_chunked else llama()
        arguments = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        trainer = trainer_of(tmp_path, model, eval_data=texts(8), options={"capture": "adaptor", "rank": 2}, **arguments)
        trainer.train()
        runs.append(logged(trainer, "loss") + logged(trainer, "eval_loss"))
    assert len(runs[1]) == 6 and runs[1] == pytest.approx(runs[0], rel=1e-4)
