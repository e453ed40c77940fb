"""gradlr.integrations.lightning: a small module through the real Trainer, on the CPU."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from models import mlp, regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradlr
from gradlr import ArgumentError, AttachError, GradlrWarning
from gradlr.integrations.lightning import ShowLosses
from gradlr.rules import LowRankPolar

pytestmark = [
    # The data lie in memory; advice about loaders.
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    # Lightning itself still calls its own old name of torch's.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

PLAIN = {"lr": 1e-2, "rank": 4, "momentum_rank": 2, "rule": LowRankPolar(residual=0), "apply": "step"}
EXACT = {"lr": 1e-2, "rank": 1.0, "momentum_rank": 2, "apply": "step"}


class Regression(lightning.LightningModule):
    """Automatic optimization, by the book."""

    def __init__(self, options=PLAIN, *, dtype=torch.float32, seed=0):
        super().__init__()
        self.net = mlp(16, 3, dtype=dtype, seed=seed)
        self.options, self.losses, self.bad_batch = options, [], None

    def configure_optimizers(self):
        opt = gradlr.attach(self, gradlr.LossTracker(), **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def loss_of(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, index):
        loss = self.loss_of(batch)
        self.losses.append(loss.item())
        return {"loss": loss}


class Manual(Regression):
    """The same in manual optimization, two batches to a step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        opt = self.optimizers()
        loss = self.loss_of(batch)
        self.losses.append(loss.item())
        self.manual_backward(opt.tracker(loss) / 2)
        if index % 2:
            self.clip_gradients(opt, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
            opt.step()
            opt.zero_grad()
            self.lr_schedulers().step()


def trainer_of(path, *, callbacks=(), **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    arguments = {"accelerator": "cpu", "max_epochs": 1, **quiet, **arguments}
    return lightning.Trainer(default_root_dir=str(path), callbacks=[ShowLosses(), *callbacks], **arguments)


def loader(batch=16, *, dtype=torch.float32):
    return DataLoader(TensorDataset(*regression(16, dtype=dtype)), batch_size=batch)


def fit(path, module=None, *, batch=16, dtype=torch.float32, options=PLAIN, **arguments):
    """(module, optimizer, trainer) after fitting."""
    module = Regression(options, dtype=dtype) if module is None else module
    trainer = trainer_of(path, **arguments)
    trainer.fit(module, loader(batch, dtype=dtype))
    return module, trainer.optimizers[0], trainer


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_same(one, other, atol=0.0):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_hand(*, batch=16, dtype=torch.float32, options=PLAIN, **more):
    model, tracker = mlp(16, 3, dtype=dtype), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, **options, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    x, y = regression(16, dtype=dtype)
    for rows in torch.arange(64).split(batch):
        tracker(nn.functional.mse_loss(model(x[rows]), y[rows])).backward()
        opt.step()
        scheduler.step()
    return weights(model), opt


def test_fitting_is_a_plain_loop(tmp_path):
    module, opt, _ = fit(tmp_path)
    assert_same(weights(module), by_hand()[0])
    assert opt.tracker.history == module.losses and len(module.losses) == 4
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-2 / 5)


def test_accumulated_batches_are_one_batch_and_losses_are_true(tmp_path):
    module, opt, _ = fit(tmp_path, batch=4, dtype=torch.float64, options=EXACT, accumulate_grad_batches=4)
    # Sums in another order, in float64.
    assert_same(weights(module), by_hand(options=EXACT, dtype=torch.float64)[0], atol=1e-9)
    assert opt.tracker.history == module.losses and len(module.losses) == 16


def test_gradient_clip_val_is_max_grad_norm(tmp_path):
    module, opt, _ = fit(tmp_path, dtype=torch.float64, gradient_clip_val=1e-3)
    expected, limited = by_hand(dtype=torch.float64, max_grad_norm=1e-3)
    assert_same(weights(module), expected, atol=1e-12)  # the factor is read back from a quotient of norms
    assert limited.grad_norm > 1e-3
    assert opt.grad_norm == pytest.approx(1e-3, rel=1e-2)  # clipped before step() looks
    _, free, _ = fit(tmp_path, dtype=torch.float64)
    assert free.grad_norm > 1e-3


def test_updates_in_backward_work_as_well(tmp_path):
    module, opt, _ = fit(tmp_path, options={**PLAIN, "apply": "backward"})
    expected, _ = by_hand(options={**PLAIN, "apply": "backward"})
    assert_same(weights(module), expected)
    assert opt.tracker.history == module.losses


def test_manual_optimization(tmp_path):
    module, opt, _ = fit(tmp_path, Manual(EXACT, dtype=torch.float64), batch=8, dtype=torch.float64)
    expected, _ = by_hand(options=EXACT, dtype=torch.float64, max_grad_norm=1e-3)
    assert_same(weights(module), expected, atol=1e-9)  # sums in another order, in float64
    assert opt.tracker.history == module.losses and len(module.losses) == 8


def test_validation_is_not_shown(tmp_path):
    class Validated(Regression):
        def validation_step(self, batch, index):
            return 100 * self.loss_of(batch)

    module, trainer = Validated(), trainer_of(tmp_path)
    trainer.fit(module, loader(), loader())
    assert trainer.optimizers[0].tracker.history == module.losses and len(module.losses) == 4


def test_bfloat16_autocast_trains_and_state_stays_wide(tmp_path):
    options = {**PLAIN, "lr": 5e-2}
    module, opt, _ = fit(tmp_path, options=options, precision="bf16-mixed", max_epochs=5)
    plain, _, _ = fit(tmp_path, options=options, max_epochs=5)
    assert module.losses[-1] < 0.95 * module.losses[0]
    assert module.losses != plain.losses
    assert module.losses == pytest.approx(plain.losses, rel=2e-2)  # autocast rounds to 8 bits
    assert {value.dtype for state in opt.state.values() for value in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("kind", [Regression, Manual])
def test_resuming_is_bit_for_bit(tmp_path, kind):
    arguments = {"batch": 8, **({"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3} if kind is Regression else {})}
    saved = tmp_path / "half.ckpt"
    _, _, trainer = fit(tmp_path, kind(), max_epochs=2, **arguments)
    trainer.save_checkpoint(saved)
    whole, opt, _ = fit(tmp_path, kind(), max_epochs=3, **arguments)
    resumed, batch = kind(seed=3), arguments.pop("batch")
    again = trainer_of(tmp_path, max_epochs=3, **arguments)
    again.fit(resumed, loader(batch), ckpt_path=str(saved), weights_only=True)
    assert_same(weights(whole), weights(resumed))
    assert whole.losses[16:] == resumed.losses
    assert opt.tracker.history == again.optimizers[0].tracker.history


def test_a_step_that_a_scaler_skips_leaves_nothing_over(tmp_path):
    class Overflowing(Regression):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)["loss"]
            if index == 1:
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    # What precision="16-mixed" does on a CUDA device.
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = Overflowing()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [saving]}  # right after each step, the one left out included
    _, opt, _ = fit(tmp_path, module, plugins=[plugin], limit_train_batches=2, gradient_clip_val=1e-3, **options)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    once, _, _ = fit(tmp_path, Overflowing(), limit_train_batches=1, gradient_clip_val=1e-3)
    # The second step changed nothing; float16 autocast has 11 bits.
    assert_same(weights(module), weights(once), atol=1e-3)
    assert opt.skipped == 1 and plugin.scaler.get_scale() == 2.0**9


def test_a_module_can_be_fitted_again_and_is_left_as_it_was(tmp_path):
    module, first, _ = fit(tmp_path)
    assert "training_step" not in vars(module)
    before = weights(module)
    module.net(torch.ones(2, 16)).sum().backward()  # an ordinary module again: gradients stay
    assert module.net[0].weight.grad is not None
    module.zero_grad()
    assert_same(before, weights(module))
    _, second, _ = fit(tmp_path, module)
    assert second is not first and len(second.tracker.history) == 4


def test_after_an_exception_a_module_is_given_back_too(tmp_path):
    class Failing(Regression):
        is_failing = True

        def training_step(self, batch, index):
            if self.is_failing:
                raise MemoryError
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(MemoryError):
        trainer_of(tmp_path).fit(module, loader())
    assert "training_step" not in vars(module)
    module.is_failing = False
    trainer_of(tmp_path).fit(module, loader())
    assert len(module.losses) == 4


def test_what_does_not_fit_is_refused(tmp_path):
    class Adam(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    with pytest.raises(ArgumentError, match="configure_optimizers returned Adam"):
        fit(tmp_path, Adam())
    with pytest.raises(ArgumentError, match="by value"):
        fit(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    immediate = {**PLAIN, "apply": "backward"}
    for option in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(ArgumentError, match='apply="step"'):
            fit(tmp_path, options=immediate, **option)


def test_several_devices_are_refused():
    class Two:
        optimizers = [gradlr.attach(mlp(), gradlr.LossTracker())]  # noqa: RUF012
        strategy = DDPStrategy()

    with pytest.raises(AttachError, match="DDPStrategy"):
        ShowLosses().on_fit_start(Two(), Regression())


class Tunable(Regression):
    """With the attributes that tuners set, and a loader of its own."""

    def __init__(self, options=PLAIN, **kwargs):
        super().__init__(options, **kwargs)
        self.lr, self.batch_size, self.tried = 1e-2, 4, []

    def configure_optimizers(self):
        self.options = {**self.options, "lr": self.lr}
        return super().configure_optimizers()

    def train_dataloader(self):
        return loader(self.batch_size)

    def training_step(self, batch, index):
        self.tried.append(len(batch[0]))
        return super().training_step(batch, index)


class Unscheduled(Tunable):
    """Made without a scheduler, and so without its groups' "initial_lr", which a finder's own brings."""

    def configure_optimizers(self):
        return gradlr.attach(self, gradlr.LossTracker(), **self.options)


FINDING = {"num_training_steps": 6, "min_lr": 1e-4, "max_lr": 1e-1, "early_stop_threshold": None}


def assert_trains_as_if_nothing_was_found(module, trainer, found, **options):
    """The finder has left weights, state and losses as they were: the rest is a plain fit with what it found."""
    plain = type(module)(**options)
    plain.lr, plain.batch_size = found
    again = trainer_of(trainer.default_root_dir, accumulate_grad_batches=trainer.accumulate_grad_batches)
    again.fit(plain)
    assert_same(weights(module), weights(plain))
    assert trainer.optimizers[0].tracker.history == again.optimizers[0].tracker.history == plain.losses


@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_tuner_finds_a_rate(tmp_path, accumulated):
    module, trainer = Tunable(), trainer_of(tmp_path, accumulate_grad_batches=accumulated)
    before = weights(module)
    finder = Tuner(trainer).lr_find(module, num_training=3, early_stop_threshold=None, update_attr=False)
    assert len(finder.results["loss"]) == 3 and len(module.losses) == 3 * accumulated
    assert_same(before, weights(module))
    assert {"training_step", "optimizers"}.isdisjoint(vars(module)) and "optimizer_state" not in vars(trainer.strategy)
    trainer.fit(module)
    assert_trains_as_if_nothing_was_found(module, trainer, (1e-2, 4))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_finder_among_the_callbacks_may_stand_before_or_behind(tmp_path, is_first):
    """Before this callback it trains as soon as `fit` starts."""
    finder, quiet = LearningRateFinder(**FINDING, update_attr=False), {"enable_checkpointing": False, "logger": False}
    callbacks = [finder, ShowLosses()] if is_first else [ShowLosses(), finder]
    module = Tunable() if is_first else Unscheduled()
    trainer = lightning.Trainer(
        default_root_dir=str(tmp_path), callbacks=callbacks, accelerator="cpu", max_epochs=1, enable_progress_bar=False,
        enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(module)
    assert len(module.losses) == 6 + 16
    assert_trains_as_if_nothing_was_found(module, trainer, (1e-2, 4))


@pytest.mark.parametrize("apply", ["step", pytest.param("backward", marks=pytest.mark.slow)])
def test_the_batch_size_that_fits_is_found(tmp_path, apply):
    class Small(Tunable):
        def loss_of(self, batch):
            loss = super().loss_of(batch)
            if len(batch[0]) > 16:
                loss.register_hook(no_memory)
            return loss

    def no_memory(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {**PLAIN, "apply": apply}
    module, finder = Small(options), BatchSizeFinder(steps_per_trial=2, init_val=4)
    trainer = trainer_of(tmp_path, callbacks=[finder])
    trainer.fit(module)
    assert finder.optimal_batch_size == module.batch_size == 16 and max(module.tried) == 32
    assert_trains_as_if_nothing_was_found(module, trainer, (1e-2, 16), options=options)


class SaveAt(lightning.Callback):
    """What ModelCheckpoint does after some minutes, wherever training is."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_within_a_window_leaves_out_what_waits_and_says_so(tmp_path):
    arguments = {"batch": 4, "accumulate_grad_batches": 4}
    plain, opt, _ = fit(tmp_path, **arguments)
    with pytest.warns(GradlrWarning, match="saved while the gradients of 6 parameters wait"):
        module, saving, _ = fit(tmp_path, callbacks=[SaveAt(tmp_path / "in.ckpt", 9)], **arguments)
    assert_same(weights(module), weights(plain))  # what waited is still there
    assert saving.tracker.history == opt.tracker.history
    fit(tmp_path, callbacks=[SaveAt(tmp_path / "between.ckpt", 7)], **arguments)
    window, between = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("in", "between"))
    states = [saved["optimizer_states"][0]["state"] for saved in (window, between)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    resumed = trainer_of(tmp_path, accumulate_grad_batches=4)
    resumed.fit(Regression(seed=3), loader(4), ckpt_path=str(tmp_path / "in.ckpt"), weights_only=True)
    assert resumed.global_step == 4 and resumed.optimizers[0].skipped == 0


def test_after_an_exception_within_a_window_lightning_saves(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, index):
            if index == 6:
                raise MemoryError
            return super().training_step(batch, index)

    saving = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True)
    trainer = trainer_of(tmp_path, callbacks=[saving], accumulate_grad_batches=4, enable_checkpointing=True)
    with pytest.raises(MemoryError):
        trainer.fit(Failing(), loader(4))
    assert list(tmp_path.glob("*.ckpt"))


def test_of_ones_own_asking_a_window_is_still_refused(tmp_path):
    class Asking(Regression):
        def on_train_batch_end(self, outputs, batch, index):
            self.trainer.optimizers[0].state_dict()

    with pytest.raises(gradlr.CheckpointError, match="gradients wait for step"):
        trainer_of(tmp_path, accumulate_grad_batches=4).fit(Asking(), loader(4))


class Thawing(BaseFinetuning):
    """Trains the head alone at first."""

    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(module.net[0])


@pytest.mark.parametrize("apply", ["step", "backward"])
def test_what_is_frozen_after_attaching_thaws_and_trains(tmp_path, apply):
    class AttachedWhole(Regression):
        """`configure_optimizers` comes after the callback has frozen: the hooks of what will thaw are set here."""

        def configure_optimizers(self):
            frozen = [parameter for parameter in self.parameters() if not parameter.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            made = super().configure_optimizers()
            for parameter in frozen:
                parameter.requires_grad_(False)
            return made

    class Watch(lightning.Callback):
        changed = ()

        def on_train_epoch_start(self, trainer, module):
            self.before = weights(module)

        def on_train_epoch_end(self, trainer, module):
            now = [not torch.equal(a, b) for a, b in zip(self.before, weights(module), strict=True)]
            self.changed = (*self.changed, now)

    watch = Watch()
    fit(tmp_path, AttachedWhole({**PLAIN, "apply": apply}), callbacks=[Thawing(), watch], max_epochs=2)
    assert watch.changed == ([False, False, True, True, True, True], [True] * 6)


def test_adding_what_has_thawed_is_an_error(tmp_path):
    class Adding(Thawing):
        def finetune_function(self, module, epoch, optimizer):
            self.unfreeze_and_add_param_group(module.net[0], optimizer)

    module = Regression()
    with pytest.raises(ArgumentError, match="groups are fixed once attached"):
        trainer_of(tmp_path, callbacks=[Adding()]).fit(module, loader())
    assert "training_step" not in vars(module)


def test_the_wrapper_of_manual_optimization_is_the_optimizer(tmp_path):
    class Asking(Manual):
        def on_train_start(self):
            wrapper, opt = self.optimizers(), self.trainer.optimizers[0]
            assert wrapper is not opt and repr(wrapper) == repr(opt) and 'apply="step"' in repr(wrapper)
            wrapper.load_state_dict(wrapper.state_dict())
            assert wrapper.param_groups is opt.param_groups and wrapper.state is opt.state
            with pytest.raises(ArgumentError, match="groups are fixed"):
                wrapper.add_param_group({"params": [nn.Parameter(torch.ones(2))]})

        def on_train_end(self):
            wrapper, opt = self.optimizers(), self.trainer.optimizers[0]
            assert wrapper.grad_norm == opt.grad_norm > 0
            wrapper.detach()
            with pytest.raises(AttachError, match="after opt.detach"):
                opt.step()

    saved = tmp_path / "half.ckpt"
    _, _, trainer = fit(tmp_path, Manual(), batch=8)
    trainer.save_checkpoint(saved)
    module, again = Asking(), trainer_of(tmp_path, max_epochs=2)
    again.fit(module, loader(8), ckpt_path=str(saved), weights_only=True)
    rates = [group["lr"] for group in again.optimizers[0].param_groups]
    assert rates[0] == pytest.approx(1e-2 / 9)  # the scheduler's, after four and four steps
