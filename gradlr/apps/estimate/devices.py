"""Several devices, of which one is looked at: a process group of one process, and models that are sharded over it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from ...errors import ArgumentError
from ..blocks import blocks_of, shard_by_block
from .stubs import first_shard_only

DP, FSDP, TP = SHARDS = ("dp", "fsdp", "tp")
MOST_GPUS = 1024
# Of DistributedDataParallel (bucket_cap_mb).
BUCKET_BYTES = 25 * 2**20
# Of a decoder's block in transformers, where tensor parallelism is known: more norms would not branch.
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA_BLOCK = {"self_attn", "mlp", *_NORMS}


@dataclass(frozen=True)
class Devices:
    """How many devices train one model, and what each of them holds.

    Attributes:
        gpus: N.
        shard: "dp" (a replica each), "fsdp" (FSDP2, block by block) or "tp" (tensor parallel); None for one device.
        reshard: Under "fsdp": whether blocks are given back after forward (`reshard_after_forward`).
        offload: Under "fsdp": whether weights, state and updates lie in the host's memory (`CPUOffloadPolicy`).

    Raises:
        ArgumentError: they do not go together.
    """

    gpus: int = 1
    shard: str | None = None
    reshard: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        gpus, shard = self.gpus, self.shard
        if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= MOST_GPUS:
            raise ArgumentError(f"gpus={gpus!r}: it must be an int in [1, {MOST_GPUS}]")
        if shard is not None and shard not in SHARDS:
            raise ArgumentError(f"shard={shard!r}: use one of {', '.join(SHARDS)}")
        if gpus > 1 and shard is None:
            raise ArgumentError(f"gpus={gpus}: what does each hold? Give shard= (--shard) one of {', '.join(SHARDS)}")
        if gpus == 1 and shard not in (None, FSDP):
            raise ArgumentError(f"shard={shard!r} is about several devices: give gpus= too, or leave shard out")
        for name, is_asked in (("reshard=False", not self.reshard), ("offload=True", self.offload)):
            if is_asked and shard != FSDP:
                raise ArgumentError(f"{name} is about shard='fsdp', and shard is {shard!r}: leave it out")


@contextmanager
def fake_process_group(devices: Devices) -> Iterator[Any]:
    """As rank 0 of a process group of that size, whose collectives return at once; yields its device mesh, where one is needed.

    Raises:
        ArgumentError: this process belongs to a group already, or torch has no such group.
    """
    if devices.shard is None:
        yield None
        return
    if not distributed.is_available():
        raise ArgumentError(f"gpus={devices.gpus}: this build of torch has no torch.distributed")
    if distributed.is_initialized():
        raise ArgumentError(
            f"gpus={devices.gpus}: the estimate takes the place of a process group, and this process has one: run it before "
            "torch.distributed.init_process_group(), or by `python -m gradlr estimate`"
        )
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # brings the backend
    distributed.init_process_group("fake", rank=0, world_size=devices.gpus, store=distributed.HashStore())
    try:
        _require_valueless_collectives(devices)
        # Outside any mode: it is made of numbers that are looked at.
        make = importlib.import_module("torch.distributed.device_mesh").init_device_mesh
        yield None if devices.shard == DP else make("cpu", (devices.gpus,))
    finally:
        distributed.destroy_process_group()


def _require_valueless_collectives(devices: Devices) -> None:
    try:
        with FakeTensorMode():
            distributed.all_reduce(torch.empty(1))
    except UnsupportedOperatorException as error:
        raise ArgumentError(
            f"gpus={devices.gpus}: torch {torch.__version__} has no collectives of tensors without values: estimate with a newer "
            "one (2.13 does), or one device without gpus="
        ) from error


def shard_model(model: nn.Module, devices: Devices, mesh: Any) -> None:
    """Spread the model over the devices of a mesh, in place.

    Raises:
        ArgumentError: it cannot be, or not over so many.
    """
    if devices.shard == TP:
        _parallelize(model, mesh, devices.gpus)
    elif devices.shard == FSDP:
        importlib.import_module("torch.distributed.fsdp")  # where the stub looks
        with first_shard_only():
            shard_by_block(model, mesh, reshard=devices.reshard)


def _parallelize(model: nn.Module, mesh: Any, gpus: int) -> None:
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    everywhere = importlib.import_module("torch.distributed.tensor").Replicate()
    # One all-reduce of the gradient where a norm's output branches, instead of one for each layer that it goes to.
    branch = {"output_layouts": everywhere, "desired_output_layouts": everywhere, "use_local_output": False}
    styles = {
        "colwise": parallel.ColwiseParallel(),
        "rowwise": parallel.RowwiseParallel(),
        "embedding_rowwise": parallel.RowwiseParallel(input_layouts=everywhere),
        "colwise_gather_output": parallel.ColwiseParallel(output_layouts=everywhere),
    }
    plan = getattr(model, "tp_plan", None) or {}
    forms = [set(dict(block.named_children())) for block in blocks_of(model)]
    is_known = set(plan.values()) <= set(styles) and all(form == _LLAMA_BLOCK for form in forms)
    if not (plan and is_known):
        raise ArgumentError(
            f"shard='tp': which layers to split is known for Llama and models of its form only, not for {type(model).__name__}; "
            "use shard='fsdp'"
        )
    _require_divisible(model.config, gpus)
    norms = {f"{model.base_model_prefix}.layers.*.{name}": parallel.PrepareModuleOutput(**branch) for name in _NORMS}
    parallel.parallelize_module(model, mesh, {name: styles[style] for name, style in plan.items()} | norms)


def _require_divisible(config: Any, gpus: int) -> None:
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {"heads": heads, "heads of keys and values": key_heads, "MLP columns": config.intermediate_size}
    for what, count in sizes.items():
        if count % gpus:
            raise ArgumentError(
                f"shard='tp', gpus={gpus}: the model has {count:,} {what}, which {gpus} devices do not divide. Use a divisor of "
                f"{key_heads}, or shard='fsdp'"
            )


def gradient_buckets(model: nn.Module) -> list[Tensor]:
    """DistributedDataParallel's: a second copy of all gradients, from its construction on (`gradient_as_bucket_view=False`)."""
    return [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
