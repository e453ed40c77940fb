"""Training steps, run on tensors without values while the tracker looks on: alone, or as one of several devices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import GradlrWarning
from ..blocks import checkpoint_blocks
from ..collectives import ALL_REDUCE
from .devices import BUCKET_BYTES, DP, FSDP, Devices, gradient_buckets, shard_model
from .memory_tracker import ACTIVATIONS, EXCHANGE, MODEL, STATE, WEIGHTS, WORKSPACE, MemoryTracker
from .methods import GradlrTraining, Method, Training
from .replay import tensors_of
from .stubs import like_a_gpu, stub_collectives, stub_internals
from .subject import Subject, fake_copy


def simulate(
    subject: Subject,
    method: Method,
    rank: Any,
    options: dict[str, Any],
    *,
    device: str,
    checkpointing: bool,
    devices: Devices,
    mesh: Any,
) -> tuple[MemoryTracker, int]:
    """Steps until nothing new is kept.

    Args:
        subject, method, rank, options, device, checkpointing: As for `estimate`.
        devices, mesh: As `fake_process_group` takes and yields them.

    Returns:
        What was counted, and the number of the model's parameters.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = MemoryTracker(elsewhere=(WEIGHTS, STATE, WORKSPACE) if devices.offload else ())
    model = fake_copy(subject.model, mode, subject.dtype).train()
    if checkpointing:
        # Nothing random is drawn again where nothing has values; a generator's state would be read from the real one.
        checkpoint_blocks(model, preserve_rng_state=False)
    ways = like_a_gpu() if device == "cuda" else nullcontext()
    with warnings.catch_warnings(), mode, tracker, stub_internals(tracker, is_packed=subject.packed), ways:
        # What attach has to say about speed and guesses, it says at the real attach; and so does FSDP2.
        warnings.simplefilter("ignore", GradlrWarning)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        subject.prepare(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        method.adapt(model, rank)
        count += sum(parameter.numel() for parameter in model.parameters() if method.has_adapters and parameter.requires_grad)
        shard_model(model, devices, mesh)
        tracker.move([*model.parameters(), *model.buffers()], WEIGHTS)
        fed = [_cast(value, subject.dtype) for value in subject.feed()]
        tracker.move(fed, ACTIVATIONS)
        tokens = devices.gpus * sum(value.numel() for value in tensors_of(fed) if not value.is_floating_point())
        # Of replicas' header (docs/devices.md), losses, statuses and checksums are zeros; that a parameter was used is a one.
        header = 2 + 2 * devices.gpus if devices.shard == DP else 0
        with stub_collectives(tracker, header, lambda mask: training.touched_rows(mask, tokens)):
            training = method.prepare(model, tracker, _attach_options(method, rank, devices) | options)
            _run(training, tracker, lambda: subject.loss(model, *fed), devices)
    return tracker, count


def _attach_options(method: Method, rank: Any, devices: Devices) -> dict[str, Any]:
    options = {} if rank is None else {"rank": rank}
    is_replica = devices.shard == DP and method.is_gradlr
    return options | ({"process_group": distributed.group.WORLD, "apply": "step"} if is_replica else {})


def _run(training: Training, tracker: MemoryTracker, compute_loss: Callable[[], Tensor], devices: Devices) -> None:
    tracker.move([*training.model.parameters(), *training.model.buffers()], WEIGHTS)
    is_ddp = devices.shard == DP and not isinstance(training, GradlrTraining)
    buckets = gradient_buckets(training.model) if is_ddp else []
    tracker.move(buckets, EXCHANGE)
    tracker.restart(keep_peak=False)
    # FSDP2 makes room for whole parameters in the first step, in another way than in all others.
    is_first_odd = devices.shard == FSDP
    for number in range(max(training.steps, 2 if is_first_odd else 1)):
        tracker.restart(keep_peak=not (is_first_odd and number == 1))
        training.step(compute_loss)
    tracker.enter("end")
    if buckets:
        nbytes = sum(bucket.nbytes for bucket in buckets)
        tracker.count_exchange(MODEL, ALL_REDUCE, nbytes, calls=math.ceil(nbytes / BUCKET_BYTES))


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value
