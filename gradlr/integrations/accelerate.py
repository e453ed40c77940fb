"""accelerate: attach where an Accelerator trains, and clip through the optimizer; everything else works as it is.

accelerator, tracker = Accelerator(gradient_accumulation_steps=4), gradlr.LossTracker()
opt = gradlr.integrations.accelerate.attach(accelerator, model, tracker, max_grad_norm=1.0)
model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(tracker(loss_fn(model(x), y)))   # the loss in its true size: accelerate divides it afterwards
        opt.step()
        scheduler.step()
        opt.zero_grad()                                       # or model.zero_grad()
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import ArgumentError
from ..optimizer import GradLR
from ..tracker import LossTracker
from .data_parallel import attach_ready


def attach(accelerator: Accelerator, model: nn.Module, loss_tracker: LossTracker, **options: Any) -> GradLR:
    """Move `model` to the accelerator's device, or shard it, and attach to it, before `accelerator.prepare`.

    Several processes train replicas, which exchange sketches in place of DistributedDataParallel, or with an `fsdp_plugin` of
    version 2 one sharded model. All call this alike.

    Args:
        accelerator: Of any number of processes.
        model: Moved or sharded in place; `prepare` leaves it so.
        loss_tracker: Shown each loss: `accelerator.backward(loss_tracker(loss))`.
        options: Those of `gradlr.attach`; `apply` is "step" where it is left out.

    Returns:
        The optimizer, to be prepared with the model.

    Raises:
        AttachError: the accelerator trains through another engine, or in a way that does not suit several processes; or as
            `gradlr.attach`.
        ArgumentError: as `gradlr.attach`.
    """
    return attach_ready(accelerator, model, loss_tracker, **options)


def clip_grad_norm_(accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """What `accelerator.clip_grad_norm_(model.parameters(), max_norm)` does as well, once `attach` has been called.

    Not needed where `max_grad_norm` was given to `attach`, which is exact with every capture, and the only way where several
    processes train.

    Args:
        accelerator: Unscales the gradients first, where it uses a GradScaler.
        optimizer: The attached one, prepared or not, with `apply="step"`.
        max_norm: Largest global norm of the step's gradients.

    Returns:
        The norm before, 0-dim: with "adaptor" and "one_sided" capture, and under accumulation, that of the sketches.

    Raises:
        ArgumentError: no optimizer of gradlr, one that updates in backward, or several processes.
    """
    opt = unwrap(optimizer)
    if opt.apply != "step":
        raise ArgumentError('clip_grad_norm_: weights have changed in backward already; attach with apply="step"')
    held = [parameter for group in opt.param_groups for parameter in group["params"]]
    return accelerator.clip_grad_norm_(held, max_norm)


def unwrap(optimizer: torch.optim.Optimizer | None) -> GradLR:
    """The attached optimizer itself, with `tracker`, `grad_norm` and `skipped`, of one that `accelerator.prepare` has wrapped.

    Raises:
        ArgumentError: it is not gradlr's.
    """
    opt = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(opt, GradLR):
        raise ArgumentError(f"the optimizer is a {type(opt).__name__}; make it with gradlr.attach")
    return opt
