"""Several devices, of which one is looked at: process groups in which nobody answers, and models that are sharded over them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from ...distributed import Communicator, Shards
from ...errors import ArgumentError
from .blank import blocks_of
from .ledger import MemoryTracker
from .shapes import SHAPES, Llama

DP, FSDP, TP = SHARDS = ("dp", "fsdp", "tp")
MOST_GPUS = 1024
# Of DistributedDataParallel (bucket_cap_mb).
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Devices:
    """How many devices train one model, and what each of them holds.

    Attributes:
        gpus: N.
        shard: "dp" (a replica each), "fsdp" (FSDP2, block by block) or "tp" (tensor parallel); None for one device.
        reshard: Under "fsdp": whether blocks are given back after forward (`reshard_after_forward`).

    Raises:
        ArgumentError: they do not go together.
    """

    gpus: int = 1
    shard: str | None = None
    reshard: bool = True

    def __post_init__(self) -> None:
        gpus, shard = self.gpus, self.shard
        if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= MOST_GPUS:
            raise ArgumentError(f"gpus={gpus!r}: it must be an int in [1, {MOST_GPUS}]")
        if shard is not None and shard not in SHARDS:
            raise ArgumentError(f"shard={shard!r}: use one of {', '.join(SHARDS)}")
        if gpus > 1 and shard is None:
            raise ArgumentError(f"gpus={gpus}: what does each hold? Give shard= (--shard) one of {', '.join(SHARDS)}")
        if gpus == 1 and shard is not None:
            raise ArgumentError(f"shard={shard!r} is about several devices: give gpus= too, or leave shard out")
        if not self.reshard and shard != FSDP:
            raise ArgumentError(f"reshard=False is about shard='fsdp', and shard is {shard!r}: leave it out")


@contextmanager
def among(devices: Devices) -> Iterator[Any]:
    """As rank 0 of a process group of that size, whose collectives return at once; yields its device mesh, where one is needed.

    Raises:
        ArgumentError: this process belongs to a group already, or torch has no such group.
    """
    if devices.gpus == 1:
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
    if devices.shard not in (FSDP, TP):
        return
    if devices.shard == TP:
        _parallelize(model, mesh, devices.gpus)
        return
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    with _one_shard_made():
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=devices.reshard)
        fully_shard(model, mesh=mesh)


def _parallelize(model: nn.Module, mesh: Any, gpus: int) -> None:
    if not isinstance(model, Llama):
        names = ", ".join(name for name, (kind, _) in SHAPES.items() if kind is Llama)
        raise ArgumentError(
            f"shard='tp': which layers to split is known for {names} only, not for {type(model).__name__}; use shard='fsdp'"
        )
    _require_divisible(model, gpus)
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    everywhere = importlib.import_module("torch.distributed.tensor").Replicate()
    columns, rows = parallel.ColwiseParallel, parallel.RowwiseParallel
    # One all-reduce of the gradient where a norm's output branches, instead of one for each layer that it goes to.
    branch = {"output_layouts": everywhere, "desired_output_layouts": everywhere, "use_local_output": False}
    block = {name: columns() for name in ("q", "k", "v", "gate", "up")} | {name: rows() for name in ("o", "down")}
    block |= {name: parallel.PrepareModuleOutput(**branch) for name in ("attention_norm", "mlp_norm")}
    plan = {"embedding": rows(input_layouts=everywhere), "head": columns(output_layouts=everywhere)}
    for module, own in ((model, plan), *((one, block) for one in model.blocks)):
        parallel.parallelize_module(module, mesh, own)


def _require_divisible(model: Llama, gpus: int) -> None:
    first = model.blocks[0]
    heads, key_heads = (layer.out_features // first.head_size for layer in (first.q, first.k))
    sizes = {"heads": heads, "heads of keys and values": key_heads, "MLP columns": first.gate.out_features}
    for what, count in sizes.items():
        if count % gpus:
            raise ArgumentError(
                f"shard='tp', gpus={gpus}: the model has {count:,} {what}, which {gpus} devices do not divide. Use a divisor of "
                f"{key_heads}, or shard='fsdp'"
            )


@contextmanager
def answering(devices: Devices, ledger: MemoryTracker, rows: Callable[[Tensor], int]) -> Iterator[None]:
    """The other processes' part in what gradlr's own tell each other: all is well, and all have the same.

    Args:
        devices: Which.
        ledger: Answers what is read from tensors without values.
        rows: Of a table's mask, with a byte for each row: how many rows any device has touched.
    """
    original, count = Communicator.all_reduce, 2 + 2 * devices.gpus

    def all_reduce(self: Communicator, numbers: Tensor, *others: Any) -> None:
        original(self, numbers, *others)
        if devices.shard == DP:
            # Of the header (docs/devices.md), losses, statuses and checksums are zeros; that a parameter was used is a one.
            is_mask = numbers.dtype == torch.uint8
            ledger.tell(numbers, rows if is_mask else lambda scalar: float(scalar.storage_offset() >= count))

    def told(self: Shards, own: list[float], device: torch.device) -> list[list[float]]:
        size = self.comm.size
        self.comm.all_reduce(torch.zeros((size, len(own)), dtype=torch.int64, device=device))
        return [own] * size

    others = {
        "all_reduce": all_reduce,
        "all_gather_object": lambda self, told: [told] * self.size,
        "broadcast": lambda self, model: None,
    }
    with _in_place(Communicator, **others), _in_place(Shards, _told=told), _unbooked_shapes(devices, ledger):
        yield


@contextmanager
def _unbooked_shapes(devices: Devices, ledger: MemoryTracker) -> Iterator[None]:
    # To know a result's shape, DTensor runs each operation once on whole tensors without values, as it does in real training.
    if devices.shard == DP or devices.gpus == 1:
        yield
        return
    propagator = importlib.import_module("torch.distributed.tensor._sharding_prop").ShardingPropagator
    original = propagator._propagate_tensor_meta_non_cached

    def propagate(self: Any, *schema: Any) -> Any:
        with ledger.aside():
            return original(self, *schema)

    with _in_place(propagator, _propagate_tensor_meta_non_cached=propagate):
        yield


@contextmanager
def _one_shard_made() -> Iterator[None]:
    # FSDP2 divides each parameter into all N shards to keep one: a minute for a thousand devices. Rank 0's will do.
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    if not hasattr(module, "_chunk_with_empty"):
        yield
        return

    def chunks(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        size = tensor.size(dim)
        return [tensor.narrow(dim, 0, min(size, -(-size // count)))] * count

    with _in_place(module, _chunk_with_empty=chunks):
        yield


@contextmanager
def _in_place(owner: Any, **others: Callable) -> Iterator[None]:
    own = {name: getattr(owner, name) for name in others}
    for name, other in others.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(owner, name, method)


def gradient_buckets(model: nn.Module) -> list[Tensor]:
    """DistributedDataParallel's: a second copy of all gradients, from its construction on (`gradient_as_bucket_view=False`)."""
    return [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
