"""Several processes under accelerate: replicas that exchange sketches, or a model that FSDP2 shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, fsdp2_prepare_model
from torch import Tensor, distributed, nn

from ..errors import ArgumentError, AttachError
from ..optimizer import GradLR
from ..tensors import is_sharded

_OTHERWISE = "Otherwise write a plain loop, as in docs/devices.md"


def require_supported(accelerator: Accelerator) -> None:
    """Raise an AttachError where the accelerator trains in a way that gradlr does not know."""
    if reason := next(_obstacles(accelerator), None):
        raise AttachError(f"{reason}. {_OTHERWISE}")


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
    """For several processes: clipping by hand becomes an error, and `prepare` leaves the optimizer its parameters."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, partial(_clip, getattr(accelerator, name), name, optimizer))
    if accelerator.is_fsdp2:
        accelerator.prepare = partial(_prepare, accelerator.prepare, optimizer)


def _clip(clip: Callable[..., Any], name: str, optimizer: GradLR, parameters: Iterable[Tensor] | Tensor, *args: Any, **kw: Any):
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    own = {id(record.plan.parameter) for record in optimizer.records}
    if any(id(parameter) in own for parameter in given):
        raise ArgumentError(
            f"accelerator.{name} would find no gradients and clip nothing: each process keeps its part of them until opt.step(). "
            "Give max_grad_norm= to attach; opt.grad_norm is the norm before"
        )
    return clip(given, *args, **kw)


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
