"""One training step, run on tensors without values while the ledger looks on: alone, or as one of several devices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import GradlrWarning
from .blank import checkpoint_blocks, fake_copy, untraced
from .collectives import ALL_REDUCE, MODEL
from .devices import BUCKET_BYTES, DP, FSDP, Devices, answering, gradient_buckets, shard_model
from .ledger import ACTIVATIONS, EXCHANGE, WEIGHTS, MemoryTracker
from .methods import GradlrTraining, Method, Training
from .subject import Subject


def simulate(
    subject: Subject, method: Method, rank: Any, options: dict[str, Any], *, checkpointing: bool, devices: Devices, mesh: Any
) -> tuple[MemoryTracker, int]:
    """Steps until nothing new is kept.

    Args:
        subject, method, rank, options, checkpointing: As for `estimate`.
        devices, mesh: As `among` takes and yields them.

    Returns:
        What was booked, and the number of the model's parameters.
    """
    mode, ledger = FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker()
    model = fake_copy(subject.model, mode, subject.dtype).train()
    if checkpointing:
        # Nothing random is drawn again where nothing has values; a generator's state would be read from the real one.
        checkpoint_blocks(model, preserve_rng_state=False)
    rank = method.rank if rank is None else rank
    with warnings.catch_warnings(), mode, ledger, untraced():
        # What attach has to say about speed and guesses, it says at the real attach; and so does FSDP2.
        warnings.simplefilter("ignore", GradlrWarning)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        method.adapt(model, rank)
        count = sum(parameter.numel() for parameter in model.parameters())
        shard_model(model, devices, mesh)
        ledger.move([*model.parameters(), *model.buffers()], WEIGHTS)
        fed = tuple(_cast(value, subject.dtype) for value in subject.feed())
        ledger.move([value for value in fed if isinstance(value, Tensor)], ACTIVATIONS)
        tokens = devices.gpus * sum(value.numel() for value in fed if isinstance(value, Tensor) and not value.is_floating_point())
        with answering(devices, ledger, lambda mask: training.touched_rows(mask, tokens)):
            training = method.prepare(model, ledger, rank, _group_options(method, devices) | options)
            _run(training, ledger, lambda: subject.loss(model, *fed), devices)
    return ledger, count


def _group_options(method: Method, devices: Devices) -> dict[str, Any]:
    is_replica = devices.shard == DP and method.is_gradlr
    return {"process_group": distributed.group.WORLD, "apply": "step"} if is_replica else {}


def _run(training: Training, ledger: MemoryTracker, compute: Callable[[], Tensor], devices: Devices) -> None:
    ledger.move([*training.model.parameters(), *training.model.buffers()], WEIGHTS)
    is_ddp = devices.shard == DP and not isinstance(training, GradlrTraining)
    buckets = gradient_buckets(training.model) if is_ddp else []
    ledger.move(buckets, EXCHANGE)
    ledger.restart(keep_peak=False)
    # FSDP2 makes room for whole parameters in the first step, in another way than in all others.
    is_first_odd = devices.shard == FSDP
    for number in range(max(training.steps, 2 if is_first_odd else 1)):
        ledger.traffic.clear()
        ledger.restart(keep_peak=not (is_first_odd and number == 1))
        training.step(compute)
    ledger.enter("end")
    if buckets:
        nbytes = sum(bucket.nbytes for bucket in buckets)
        ledger.count_exchange(MODEL, ALL_REDUCE, nbytes, calls=math.ceil(nbytes / BUCKET_BYTES))


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value
