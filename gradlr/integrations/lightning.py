"""lightning: a callback that shows every training loss to the tracker; the rest of Lightning works as it is.

    class Module(lightning.LightningModule):
        def configure_optimizers(self):                       # called when the model is on its device
            return gradlr.attach(self, gradlr.LossTracker(), apply="step")

    lightning.Trainer(callbacks=[ShowLosses()], gradient_clip_val=1.0, accumulate_grad_batches=4).fit(Module(), loader)

In manual optimization, show the loss yourself: `self.manual_backward(self.optimizers().tracker(loss))`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy

from ..errors import ArgumentError, AttachError, warn
from ..optimizer import GradLR


class ShowLosses(lightning.Callback):
    """Shows what `training_step` returns to the tracker, undivided by `accumulate_grad_batches`; detaches when `fit` ends.

    From the beginning of `fit` on, so that tuners and finders, which train before it trains, are shown as well. A checkpoint that
    Lightning writes within an accumulation window is written without the gradients that wait.

    Raises (when training begins):
        ArgumentError: no optimizer came from `gradlr.attach`; one updates in backward while Lightning accumulates or clips; or
            gradients should be clipped by value.
        AttachError: several devices.

    Warns:
        GradlrWarning: a checkpoint leaves out gradients that wait.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Put the tracker behind `training_step`, and gradlr's own optimizers behind `optimizers()` and checkpoints."""
        if stage != "fit":
            return
        # In front of the classes' own, until they are given back.
        pl_module.__dict__["optimizers"] = _alive(pl_module.optimizers)
        trainer.strategy.__dict__["optimizer_state"] = _without_waiting(trainer.strategy.optimizer_state)
        if pl_module.automatic_optimization:
            pl_module.__dict__["training_step"] = _shown(pl_module.training_step, trainer)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the trainer's options."""
        _require_fit(trainer, _attached(trainer))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count steps from where a checkpoint has left off."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Drop what a step that a GradScaler left out has left over: Lightning does so at the next batch, after checkpoints."""
        if pl_module.automatic_optimization and trainer.global_step != self._steps:
            self._steps = trainer.global_step
            trainer.optimizers[0].zero_grad()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the module back as it was: its own `training_step`, and no hooks, so that it can be fitted again."""
        if stage == "fit":
            _give_back(trainer, pl_module)

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """The same, where `fit` ends by an exception: what waits for a step is dropped with it."""
        for opt in _attached(trainer):
            opt.zero_grad()
        _give_back(trainer, pl_module)


def _shown(training_step: Any, trainer: lightning.Trainer) -> Any:
    @wraps(training_step)
    def shown(*args: Any, **kwargs: Any) -> Any:
        output = training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is not None:
            attached = _attached(trainer)
            _require_attached(trainer, attached)
            attached[0].tracker(loss)
        return output

    return shown


def _alive(optimizers: Any) -> Any:
    """`LightningModule.optimizers`, whose wrappers run gradlr's methods on themselves: what these set, the optimizer has not."""

    @wraps(optimizers)
    def alive(*args: Any, **kwargs: Any) -> Any:
        wrapped = optimizers(*args, **kwargs)
        for wrapper in wrapped if isinstance(wrapped, list) else [wrapped]:
            if isinstance(wrapper, LightningOptimizer) and isinstance(wrapper.optimizer, GradLR):
                own = wrapper.optimizer
                methods = {name for name in dir(GradLR) if not name.startswith("_")} - set(dir(LightningOptimizer))
                wrapper.__dict__ |= {name: getattr(own, name) for name in methods if callable(getattr(GradLR, name))}
                wrapper.__dict__["_is_built"] = True  # of the class, it would be False
        return wrapped

    return alive


def _without_waiting(optimizer_state: Any) -> Any:
    """`Strategy.optimizer_state`, which saves the optimizer as it was before the window of accumulation under way."""

    @wraps(optimizer_state)
    def saved(optimizer: Any) -> Any:
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(own, GradLR):
            return optimizer_state(own)
        with _set_aside(own):
            return optimizer_state(own)

    return saved


@contextmanager
def _set_aside(optimizer: GradLR) -> Iterator[None]:
    gradients = optimizer.pending.gradients
    waiting = dict(gradients)
    gradients.clear()
    if waiting:
        warn(
            f"a checkpoint is saved while the gradients of {len(waiting)} parameters wait for step() and are left out: a run "
            "that goes on from it takes its first step from the window's other batches. To save between steps, let "
            "accumulate_grad_batches divide the number of batches between two checkpoints or validations"
        )
    try:
        yield
    finally:
        gradients.update(waiting)


def _give_back(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
    pl_module.__dict__.pop("training_step", None)
    pl_module.__dict__.pop("optimizers", None)
    trainer.strategy.__dict__.pop("optimizer_state", None)
    for opt in _attached(trainer):
        opt.detach()


def _attached(trainer: lightning.Trainer) -> list[GradLR]:
    return [opt for opt in trainer.optimizers if isinstance(opt, GradLR)]


def _require_attached(trainer: lightning.Trainer, attached: list[GradLR]) -> None:
    if not attached:
        kinds = ", ".join(type(opt).__name__ for opt in trainer.optimizers) or "nothing"
        raise ArgumentError(f"ShowLosses: configure_optimizers returned {kinds}; return what gradlr.attach returns")


def _require_fit(trainer: lightning.Trainer, attached: list[GradLR]) -> None:
    _require_attached(trainer, attached)
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        strategy = type(trainer.strategy).__name__
        raise AttachError(
            f"{strategy} wraps, shards and saves the model by itself, of which gradlr knows nothing: set Trainer(devices=1), or "
            "for several processes take accelerate (gradlr.integrations.accelerate) or a plain loop, as in docs/devices.md"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ArgumentError('gradient_clip_algorithm="value": no gradient is there to clip by value; use "norm"')
    is_whole = trainer.accumulate_grad_batches > 1 or trainer.gradient_clip_val
    if is_whole and any(opt.apply == "backward" for opt in attached):
        raise ArgumentError('accumulate_grad_batches and gradient_clip_val need gradlr.attach(..., apply="step")')
