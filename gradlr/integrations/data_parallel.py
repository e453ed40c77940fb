"""Attaching where accelerate trains: alone, as replicas that exchange sketches, or to a model that FSDP2 shards."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, fsdp2_prepare_model
from torch import Tensor, distributed, nn

from ..attach import attach
from ..errors import ArgumentError, AttachError
from ..linalg.int8 import Int8Weight
from ..optimizer import GradLR
from ..tensors import is_sharded
from ..tracker import LossTracker

_OTHERWISE = "Otherwise write a plain loop, as in docs/devices.md"
_LIMIT = "Give max_grad_norm= to attach; opt.grad_norm is the norm before"


def require_supported(accelerator: Accelerator) -> None:
    """Raise an AttachError where the accelerator trains in a way that gradlr does not know."""
    if reason := next(_obstacles(accelerator), None):
        raise AttachError(f"{reason}. {_OTHERWISE}")


def attach_ready(
    accelerator: Accelerator, model: nn.Module, loss_tracker: LossTracker, *, together: nn.Module | None = None, **options: Any
) -> GradLR:
    """Make `model` ready for this accelerator, and attach to it, or to `together`, which holds it and more."""
    require_supported(accelerator)
    if together is not None and accelerator.is_fsdp2:
        raise AttachError(f"FSDP2 shards the model alone, and more than the model is trained. {_OTHERWISE}")
    ready = make_ready(accelerator, model)
    whole = model if together is None else together.to(accelerator.device)
    optimizer = attach(whole, loss_tracker, **{"apply": "step", **ready, **options})
    guard(accelerator, optimizer)
    return optimizer


def is_alone(accelerator: Accelerator) -> bool:
    """Whether it trains in one process on one device."""
    return accelerator.distributed_type == DistributedType.NO


def make_ready(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """Move or shard `model` in place, such that `accelerator.prepare` leaves it as it is; what `gradlr.attach` needs then."""
    if accelerator.is_fsdp2:
        fsdp2_prepare_model(accelerator, model)
        return {}
    if any(map(is_sharded, model.parameters())):
        raise AttachError(f"the model is sharded, and not by the accelerator's fsdp_plugin. {_OTHERWISE}")
    if is_alone(accelerator):
        model.to(accelerator.device)
        return {}
    # All that `prepare` does with a model, but for DistributedDataParallel: it would reduce gradients that nobody keeps.
    accelerator.prepare_model(model, evaluation_mode=True)
    return {"process_group": distributed.group.WORLD}


def guard(accelerator: Accelerator, optimizer: GradLR) -> None:
    """Clipping by hand goes through the optimizer, or becomes an error; and `prepare` leaves the optimizer its parameters."""
    reference = weakref.ref(optimizer)
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, partial(_clip, getattr(accelerator, name), name, reference, is_alone(accelerator)))
    if accelerator.is_fsdp2:
        accelerator.prepare = partial(_prepare, accelerator.prepare, optimizer)
    if any(isinstance(record.plan.parameter, Int8Weight) for record in optimizer.records):
        # It is where it belongs, and torch exchanges tensors of such a class even where they stay.
        prepare_model = accelerator.prepare_model
        accelerator.prepare_model = lambda model, device_placement=None, **options: prepare_model(model, False, **options)


def _clip(
    clip: Callable[..., Any],
    name: str,
    reference: weakref.ref[GradLR],
    is_alone: bool,
    parameters: Iterable[Tensor] | Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    given, optimizer = [parameters] if isinstance(parameters, Tensor) else list(parameters), reference()
    attached = set() if optimizer is None or optimizer._is_detached else {id(one.plan.parameter) for one in optimizer.records}
    covered = attached & set(map(id, given))
    if optimizer is None or not covered:
        return clip(given, *args, **kwargs)
    if reason := _why_not_clipped(name, optimizer, is_alone, f"{len(covered)} of {len(attached)}"):
        raise ArgumentError(f"accelerator.{name}{reason}")
    # In the place of the model's parameters, which hold no gradients, those that hold the norm of what waits.
    held = {id(one): one for group in optimizer.param_groups for one in group["params"]}
    return clip([*held.values(), *(one for one in given if id(one) not in held)], *args, **kwargs)


def _why_not_clipped(name: str, optimizer: GradLR, is_alone: bool, share: str) -> str | None:
    count, total = share.split(" of ")
    if optimizer.apply == "backward":
        return ': weights have changed in backward already; attach with apply="step"'
    if not is_alone:
        return f" would find no gradients and clip nothing: each process keeps its part of them until opt.step(). {_LIMIT}"
    if name == "clip_grad_value_":
        return f": what waits for opt.step() is a sketch, whose entries are not the gradient's. {_LIMIT}"
    if count != total:
        return f" was given {share} attached parameters, and what waits has one norm: give all of them. {_LIMIT}"
    return None


def _prepare(prepare: Callable[..., Any], optimizer: GradLR, *args: Any, **kwargs: Any) -> Any:
    # Accelerate tells parameters apart by where they lie, which shards without entries do not.
    held = [list(group["params"]) for group in optimizer.param_groups]
    prepared = prepare(*args, **kwargs)
    for group, parameters in zip(optimizer.param_groups, held, strict=True):
        group["params"] = parameters
    return prepared


def _obstacles(accelerator: Accelerator) -> Iterator[str]:
    """Why gradlr cannot train so, most fundamental reason first."""
    kind, count = accelerator.distributed_type, os.environ.get("WORLD_SIZE", "1")
    is_replicated = str(kind.value).startswith("MULTI_")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP1 makes flat parameters, of which gradlr sees no matrix: set fsdp_version=2"
    if not (is_alone(accelerator) or is_replicated or kind == DistributedType.FSDP):
        yield f"the accelerator trains with {kind}; gradlr knows replicas and FSDP2"
    if is_alone(accelerator):
        if count.isdecimal() and int(count) > 1:
            yield f"{count} processes run, and the accelerator knows of one: on the CPU, say Accelerator(cpu=True)"
        return
    if accelerator.scaler is not None:
        yield "a GradScaler scales each process' part alone: train in mixed_precision='bf16'"
    if not accelerator.is_fsdp2 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        yield "accelerate ignores FSDP on the CPU and makes replicas: leave it out"
    plugin, config = getattr(accelerator.state, "fsdp_plugin", None), accelerator.parallelism_config
    if others := [name for name in ("tp", "cp", "sp") if getattr(config, f"{name}_enabled", False)]:
        yield f"parallelism_config ({', '.join(others)}) replaces parameters after attaching"
    if plugin is not None and plugin.activation_checkpointing:
        yield "FSDP's activation_checkpointing rebuilds the model after attaching: use the model's own"
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        yield "dynamo_backend compiles a copy: compile block by block (block.compile())"
