"""transformers, TRL, sentence-transformers: a Trainer whose weights gradlr updates, with all else as usual.

from gradlr.integrations.transformers import Trainer
trainer = Trainer(model=model, args=TrainingArguments(..., learning_rate=2e-4), train_dataset=data, gradlr={"rank": 64})

class SFT(Trainer, trl.SFTTrainer): ...   # in front of any subclass of transformers.Trainer
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import ArgumentError, AttachError, warn
from ..tracker import LossTracker
from .accelerate import clip_grad_norm_, unwrap
from .data_parallel import attach_ready, is_alone, require_supported
from .trained_set import all_groups, host_groups, module_to_train, require_all


class _DropGradients(transformers.TrainerCallback):
    # Trainer calls model.zero_grad(): of a step that a scaler has left out, what waits outside of the model would stay.
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        unwrap(trained["optimizer"]).zero_grad()

    on_train_begin = on_optimizer_step


class Trainer(transformers.Trainer):
    """`transformers.Trainer` with gradlr for an optimizer, made when training begins, or passed in `optimizers`.

    Losses are shown to the tracker in true size, as means over their own micro-batch; those of evaluations are not. In front of
    a subclass of `transformers.Trainer` (`class SFT(Trainer, trl.SFTTrainer): ...`) it trains what that would train: all that
    its `create_optimizer` optimizes, such as a loss with weights of its own, and with the rates and decays that it gives there.

    Args:
        gradlr: Options of `gradlr.attach`. Left out, `apply` is "step"; `max_grad_norm`, `weight_decay` and, where it is not
            transformers' own default of 5e-5, `lr` are those of the training arguments.
        args, kwargs: As for `transformers.Trainer`; an optimizer must come from `gradlr.attach`, called on the model's device.

    Raises:
        ArgumentError: `gradlr` and an optimizer; an optimizer in several processes; another optimizer in the arguments;
            `apply="backward"` and `max_grad_norm`.
        AttachError: DataParallel, or an engine that gradlr does not know; parameters that the trainer would train and gradlr
            would not, or the other way round; both as `gradlr.attach`, too.
    """

    optimizer: torch.optim.Optimizer | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(Trainer)]
        if wrong := [one for one in before if issubclass(one, transformers.Trainer) and not issubclass(one, Trainer)]:
            other = wrong[0].__name__
            raise ArgumentError(
                f"class {cls.__name__}({other}, Trainer): gradlr's comes first: class {cls.__name__}(Trainer, {other})"
            )

    def __init__(self, *args: Any, gradlr: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._options = gradlr
        # What a micro-batch's mean loss was multiplied with: its share of the step.
        self._share: Tensor | float = 1.0
        super().__init__(*args, **kwargs)
        if self.optimizer is not None and (gradlr is not None or not is_alone(self.accelerator)):
            raise ArgumentError("give gradlr=... in place of an optimizer where several processes run; of the two leave one out")
        if self.optimizer_cls_and_kwargs is not None or not self.args.optim.startswith(("adamw", "paged_adamw")):
            asked = f"optim={self.args.optim.value!r}" if self.optimizer_cls_and_kwargs is None else "optimizer_cls_and_kwargs"
            raise ArgumentError(f"{asked} asks for another optimizer than gradlr, with which this Trainer trains: leave it out")
        self.add_callback(_DropGradients)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Every loss passes here, whoever has computed it, and no other tensor does.
        self.accelerator.backward = partial(self._backward, self.accelerator.backward)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        require_supported(self.accelerator)
        if self.args.n_gpu > 1:
            raise AttachError(f"Trainer would wrap the model in DataParallel on {self.args.n_gpu} devices: show it one")
        groups = host_groups(self, super().create_optimizer if model is None else partial(super().create_optimizer, model))
        if self.optimizer is None:
            self.optimizer = self._attach(groups)
        else:
            require_all(unwrap(self.optimizer), groups, self)
        opt = unwrap(self.optimizer)
        if self.args.max_grad_norm > 0 and opt.clipper.max_norm is None:
            if opt.apply == "backward":
                raise ArgumentError('apply="backward" cannot clip: use "step", or TrainingArguments(max_grad_norm=0)')
            opt.clipper.max_norm = self.args.max_grad_norm
        return self.optimizer

    def _attach(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        module, given = module_to_train(self, groups), self._options or {}
        options: dict[str, Any] = {"loss_tracker": LossTracker(), "weight_decay": self.args.weight_decay}
        if self.args.learning_rate != transformers.TrainingArguments.learning_rate:
            options["lr"] = self.args.learning_rate
        elif "lr" not in given:
            message = (
                "learning_rate is transformers' default of 5e-5, which is AdamW's: gradlr trains with its own default "
                'instead. Give TrainingArguments another one, or gradlr={"lr": ...}'
            )
            warn(message)
        options |= {**given, "groups": all_groups(self, module, groups, given.get("groups", ()))}
        return attach_ready(self.accelerator, self.model, together=None if module is self.model else module, **options)

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
