"""lightning: a callback that shows every training loss to the tracker; the rest of Lightning works as it is.

    class Module(lightning.LightningModule):
        def configure_optimizers(self):                       # called when the model is on its device
            return gradlr.attach(self, gradlr.LossTracker(), apply="step")

    lightning.Trainer(callbacks=[ShowLosses()], gradient_clip_val=1.0, accumulate_grad_batches=4).fit(Module(), loader)

In manual optimization, show the loss yourself: `self.manual_backward(self.optimizers().tracker(loss))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import lightning
from lightning.pytorch.strategies import SingleDeviceStrategy

from ..errors import ArgumentError, AttachError
from ..optimizer import GradLR


class ShowLosses(lightning.Callback):
    """Shows what `training_step` returns to the tracker, undivided by `accumulate_grad_batches`; detaches when `fit` ends.

    Raises (when training begins):
        ArgumentError: no optimizer came from `gradlr.attach`; one updates in backward while Lightning accumulates or clips; or
            gradients should be clipped by value.
        AttachError: several devices.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the trainer's options, and put the tracker behind `training_step`."""
        attached = _attached(trainer)
        _require_fit(trainer, attached)
        if not pl_module.automatic_optimization:
            return
        tracker, training_step = attached[0].tracker, pl_module.training_step

        @wraps(training_step)
        def shown(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is not None:
                tracker(loss)
            return output

        pl_module.__dict__["training_step"] = shown  # in front of the class' own, until it is given back

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
        """The same, where `fit` ends by an exception."""
        _give_back(trainer, pl_module)


def _give_back(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
    pl_module.__dict__.pop("training_step", None)
    for opt in _attached(trainer):
        opt.detach()


def _attached(trainer: lightning.Trainer) -> list[GradLR]:
    return [opt for opt in trainer.optimizers if isinstance(opt, GradLR)]


def _require_fit(trainer: lightning.Trainer, attached: list[GradLR]) -> None:
    if not attached:
        kinds = ", ".join(type(opt).__name__ for opt in trainer.optimizers) or "nothing"
        raise ArgumentError(f"ShowLosses: configure_optimizers returned {kinds}; return what gradlr.attach returns")
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
