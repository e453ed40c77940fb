"""transformers: a Trainer whose weights gradlr updates, with accumulation, clipping, logging and checkpoints as usual.

from gradlr.integrations.transformers import Trainer
trainer = Trainer(model=model, args=TrainingArguments(..., learning_rate=2e-4), train_dataset=data, gradlr={"rank": 64})
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ..errors import ArgumentError, AttachError, warn
from ..tracker import LossTracker
from .accelerate import attach, clip_grad_norm_, unwrap
from .data_parallel import is_alone, require_supported


class _DropGradients(transformers.TrainerCallback):
    # Trainer calls model.zero_grad(), which sees no sketches: those of a step that a scaler has left out would stay.
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        unwrap(trained["optimizer"]).zero_grad()

    on_train_begin = on_optimizer_step


class Trainer(transformers.Trainer):
    """`transformers.Trainer` with gradlr for an optimizer, made when training begins, or passed in `optimizers`.

    Losses are shown to the tracker in true size, as means over their own micro-batch; those of evaluations are not.

    Args:
        gradlr: Options of `gradlr.attach`. Left out, `apply` is "step"; `max_grad_norm`, `weight_decay` and, where it is not
            transformers' own default, `lr` are those of the training arguments.
        args, kwargs: As for `transformers.Trainer`; an optimizer must come from `gradlr.attach`, called on the model's device.

    Raises:
        ArgumentError: `gradlr` and an optimizer; an optimizer in several processes; `apply="backward"` and `max_grad_norm`.
        AttachError: DataParallel, or an engine that gradlr does not know; both as `gradlr.attach`, too.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, gradlr: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._options = gradlr
        # What a micro-batch's mean loss was multiplied with: its share of the step.
        self._share: Tensor | float = 1.0
        super().__init__(*args, **kwargs)
        if self.optimizer is not None and (gradlr is not None or not is_alone(self.accelerator)):
            raise ArgumentError("give gradlr=... in place of an optimizer where several processes run; of the two leave one out")
        self.add_callback(_DropGradients)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Every loss passes here, whoever has computed it, and no other tensor does.
        self.accelerator.backward = partial(self._backward, self.accelerator.backward)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        require_supported(self.accelerator)
        if self.args.n_gpu > 1:
            raise AttachError(f"Trainer would wrap the model in DataParallel on {self.args.n_gpu} devices: show it one")
        if self.optimizer is None:
            options: dict[str, Any] = {"weight_decay": self.args.weight_decay}
            if self.args.learning_rate != transformers.TrainingArguments.learning_rate:
                options["lr"] = self.args.learning_rate
            elif "lr" not in (self._options or {}):
                message = (
                    "learning_rate is transformers' default of 5e-5, which is AdamW's: gradlr trains with its own default "
                    'instead. Give TrainingArguments another one, or gradlr={"lr": ...}'
                )
                warn(message)
            options = {"loss_tracker": LossTracker(), **options, **(self._options or {})}
            self.optimizer = attach(self.accelerator, cast(nn.Module, self.model), **options)
        opt = unwrap(self.optimizer)
        if self.args.max_grad_norm > 0 and opt.clipper.max_norm is None:
            if opt.apply == "backward":
                raise ArgumentError('apply="backward" cannot clip: use "step", or TrainingArguments(max_grad_norm=0)')
            opt.clipper.max_norm = self.args.max_grad_norm
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if num_items_in_batch is None or self.loss_is_scaled_for_ga is False:
            self._share = 1 / self.current_gradient_accumulation_steps
        else:
            own = torch.as_tensor(self._get_num_items_in_batch([inputs], self.args.device))
            self._share = own.clamp(min=1) / num_items_in_batch
        return super().training_step(model, inputs, num_items_in_batch)

    def _backward(self, backward: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        tracker, is_whole = unwrap(self.optimizer).tracker, self.current_gradient_accumulation_steps == 1
        backward(tracker(loss) if is_whole else tracker(loss / self._share) * self._share, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        return self._get_grad_norm(model)  # step() clips, by its own limit: the norm before that is what is asked for here

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | None:
        if grad_norm is not None or unwrap(self.optimizer).apply == "backward" or not is_alone(self.accelerator):
            return grad_norm
        return clip_grad_norm_(self.accelerator, unwrap(self.optimizer), torch.inf)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any) -> None:
        after_step = unwrap(self.optimizer).grad_norm  # several processes know no norm before
        super()._maybe_log_save_evaluate(tr_loss, after_step if grad_norm is None else grad_norm, *args, **kwargs)
