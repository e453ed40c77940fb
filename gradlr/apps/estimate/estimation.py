"""estimate(): what training a model will take, before there is a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...report.summary import format_bytes
from ..collectives import ring_bytes
from .devices import Devices, fake_process_group
from .memory_tracker import EXCHANGE, KINDS, STATE, MemoryTracker
from .methods import METHODS, Method
from .simulation import simulate
from .subject import subject_of


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step, on one device.

    Attributes:
        operation: "all-reduce", "all-gather" or "reduce-scatter".
        purpose: "model" (forward, backward, gradients) or "update" (what gradlr exchanges besides).
        calls: How many.
        handed: Bytes of all that they move: what is reduced, what comes out of a gather, what goes into a scatter.
        sent: Bytes that this device sends where the devices form a ring.
    """

    operation: str
    purpose: str
    calls: int
    handed: int
    sent: int


@dataclass(frozen=True)
class Estimate:
    """Bytes that one training step takes on one device.

    Attributes:
        model: Name of the model.
        method: Name of the method.
        label: The same in words.
        parameters: Number of the model's parameters, adapters included.
        weights: Parameters and buffers, adapters included.
        state: What the optimizer keeps from step to step, step counts included.
        gradients: The most that gradients, or the sketches that wait for `step()`, take at one time.
        activations: The most that everything else of forward and backward takes at one time: what autograd keeps, its
            temporaries, and the inputs.
        workspace: The most that an update takes besides.
        exchange: The most that other devices' parts take: whole parameters of blocks under way, buckets, buffers; 0 where there
            are none.
        peak: The most that all of these take together. Not their sum: they are not largest at one time.
        peak_stage: When that is: "forward", "backward" (for gradlr, updates included) or "step".
        at_peak: What each of them takes then; adds up to `peak`.
        tokens: Tokens of one sequence; None where inputs were given.
        batch_size: Sequences of a step.
        checkpointing: Whether blocks are recomputed in backward.
        chunked_head: Whether the loss is found without logits.
        packed: Whether the sequences are one row.
        gpus: Number of devices; all amounts are those of one of them, and the batch is its own.
        shard: What each holds: "dp", "fsdp" or "tp"; None for one device.
        offload: Whether weights, state and workspace lie in the host's memory; the peak is then that of the device.
        traffic: The collectives of a step.
    """

    model: str
    method: str
    label: str
    parameters: int
    weights: int
    state: int
    gradients: int
    activations: int
    workspace: int
    exchange: int
    peak: int
    peak_stage: str
    at_peak: dict[str, int]
    tokens: int | None
    batch_size: int
    checkpointing: bool
    chunked_head: bool = False
    packed: bool = False
    gpus: int = 1
    shard: str | None = None
    offload: bool = False
    traffic: tuple[Traffic, ...] = ()

    @property
    def sent(self) -> int:
        """Bytes that one device sends in a step, where the devices form a ring."""
        return sum(one.sent for one in self.traffic)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        fed = "inputs as given" if self.tokens is None else f"{self.batch_size} x {self.tokens} tokens"
        how = {"packed": self.packed, "checkpointing": self.checkpointing, "chunked head": self.chunked_head}
        told = "".join(f", {name}" for name, is_so in how.items() if is_so)
        devices = "one device" if self.gpus == 1 else f"each of {self.gpus} devices"
        spread = "" if self.shard is None else f", {devices} under {self.shard}"
        spread += ", weights, state and updates on the host" if self.offload else ""
        head = f"{self.model}, {self.parameters:,} parameters, {self.label}, {fed}{told}{spread}"
        rows = [(kind, getattr(self, kind), self.at_peak[kind]) for kind in kinds(self.shard)]
        lines = [f"  {name:<12}{format_bytes(largest):>12}{format_bytes(then):>14}" for name, largest, then in rows]
        title = f"  {'':<12}{'at most':>12}{'at the peak':>14}"
        peak = f"  {'peak':<12}{'':>12}{format_bytes(self.peak):>14}  in {self.peak_stage}"
        return "\n".join([head, title, *lines, peak, *map(_traffic_line, self.traffic)])


def kinds(shard: str | None) -> tuple[str, ...]:
    """Those that are worth telling: without other devices nothing is exchanged."""
    return tuple(kind for kind in KINDS if kind != EXCHANGE or shard is not None)


def _traffic_line(traffic: Traffic) -> str:
    times = f"{traffic.calls:,} {traffic.operation}{'s' if traffic.calls > 1 else ''} of the {traffic.purpose}"
    return f"  {times}: {format_bytes(traffic.handed)}, of which this device sends {format_bytes(traffic.sent)} round a ring"


def estimate(
    model: Any,
    *,
    method: str = "gradlr",
    rank: Any = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    tokens: int | None = None,
    packed: bool = False,
    checkpointing: bool = False,
    weights: str | None = None,
    chunked_head: bool = False,
    inputs: Sequence[Tensor] | None = None,
    loss: Callable[..., Tensor] | None = None,
    gpus: int = 1,
    shard: str | None = None,
    reshard: bool = True,
    offload: bool = False,
    **options: Any,
) -> Estimate:
    """Memory that training takes: the step is run on tensors without values, and every allocation is counted.

    Forward, backward and update are the code that will run, the model's own and gradlr's; nothing is allocated, so that 70
    billion weights take seconds. Ranks are the largest that the schedule gives.

    Args:
        model: A module on any device (the meta device included; it is not changed; `quantize_` and `chunk_head_` may have been
            there before), a transformers config, a path to a config.json or its folder, or a name of
            `gradlr.apps.estimate.CONFIGS`: llama-7b, gpt2, minilm, ...
        method: One of `gradlr.apps.estimate.METHODS`: adamw, adamw8bit, lora, gradlr, gradlr_step, ...
        rank: For gradlr what `attach` takes; for LoRA an int, 8. Each one's own default where None.
        dtype: Of the weights; the model's own where None.
        device: "cpu", or "cuda", on which gradlr goes other ways: half precision stays so in its products, kernels take the place
            of copies, and nothing is asked of the device.
        batch_size: Sequences of a step.
        tokens: Tokens of one sequence; 2,048, or the model's context where that is shorter, where None.
        packed: The sequences come as one row with `position_ids`, as TRL packs them (`packing=True`, `padding_free=True`), and
            the model masks attention between them: with transformers' "sdpa" by a mask of all tokens times all tokens.
        checkpointing: Recompute each block in backward (`torch.utils.checkpoint`, non-reentrant).
        weights: "int8": the model has been through `gradlr.quantize_`; for gradlr's methods. As they are where None.
        chunked_head: The model has been through `gradlr.integrations.chunk_head_`: a loss by `labels` makes no logits. For any
            method: Liger's and TRL's losses without logits take about as much.
        inputs: What the model is called with, where it takes neither token ids nor vectors; only shapes and dtypes count.
        loss: Function of the model and its inputs to the loss; where None, that of transformers' language models, or the sum
            of the first output.
        gpus: N devices train together, 1 to 1,024: what one of them takes, and sends, in a step. Its batch is its own, except
            under "tp". Not while this process belongs to a process group.
        shard: With `gpus`: "dp", a replica on each (DistributedDataParallel; for gradlr `process_group=`, with `apply="step"`);
            "fsdp", FSDP2's `fully_shard` of each block and the root; "tp", tensor parallel, for llama-*.
        reshard: Under "fsdp": False keeps each block whole from forward to backward (`reshard_after_forward=False`).
        offload: Under "fsdp", which may have one device then: weights, state and updates lie in the host's memory
            (`offload_policy=CPUOffloadPolicy()`), and the peak is that of the device.
        **options: Of `gradlr.attach`, for gradlr's methods: `momentum_rank=16, capture="adaptor", apply="step"`.

    Returns:
        The bytes of each kind and of the peak.

    Raises:
        ArgumentError: a name or option is unknown or out of range, the model cannot be fed without `inputs`, or the method or
            model cannot be sharded so.
    """
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"device={device!r}: use 'cpu' or 'cuda'")
    devices = Devices(gpus, shard, reshard, offload)
    chosen = _method(method, rank, options, shard, weights)
    subject = subject_of(
        model, dtype=dtype, batch_size=batch_size, tokens=tokens, packed=packed, inputs=inputs, loss=loss, weights=weights,
        chunked_head=chunked_head,
    )  # fmt: skip
    with fake_process_group(devices) as mesh:
        tracker, count = simulate(
            subject, chosen, rank, options, device=device, checkpointing=checkpointing, devices=devices, mesh=mesh
        )  # fmt: skip
    label = chosen.label if weights is None else f"{chosen.label}, {weights}"
    return Estimate(
        subject.name, chosen.name, label, count, **(tracker.largest | {STATE: tracker.held[STATE]}), peak=tracker.peak,
        peak_stage=tracker.peak_stage, at_peak=dict(tracker.at_peak), tokens=subject.tokens, batch_size=batch_size,
        checkpointing=bool(checkpointing), chunked_head=bool(chunked_head), packed=bool(packed), gpus=gpus, shard=shard,
        offload=bool(offload), traffic=_traffic(tracker, gpus),
    )  # fmt: skip


def estimate_all(model: Any, methods: Iterable[str] | None = None, *, rank: Any = None, **arguments: Any) -> list[Estimate]:
    """`estimate` for several methods, all where None; options of `attach` and `weights` go to those of gradlr only.

    Args:
        model: As for `estimate`.
        methods: Names.
        rank: For all that have one.
        **arguments: As for `estimate`.
    """
    known = set(inspect.signature(estimate).parameters) - {"weights"}
    common = {key: value for key, value in arguments.items() if key in known}
    own = {key: value for key, value in arguments.items() if key not in known}
    shard = common.get("shard")
    names = [name for name in METHODS if shard in (None, *METHODS[name].shards)] if methods is None else list(methods)
    chosen = [_method(name, None, {}, shard, None) for name in names]
    ranked = {"rank": rank}
    return [
        estimate(model, method=one.name, **common, **(ranked | own if one.is_gradlr else ranked if one.has_adapters else {}))
        for one in chosen
    ]


def _method(name: str, rank: Any, options: dict[str, Any], shard: str | None, weights: str | None) -> Method:
    if name not in METHODS:
        raise ArgumentError(f"method={name!r} is unknown; use one of {', '.join(METHODS)}")
    method = METHODS[name]
    if shard not in (None, *method.shards):
        able = ", ".join(other.name for other in METHODS.values() if shard in other.shards)
        raise ArgumentError(f"method={name!r} is not known to train under shard={shard!r}; these are: {able}")
    _require_weights(method, weights, shard)
    if options and not method.is_gradlr:
        raise ArgumentError(f"method={name!r} takes no {next(iter(options))!r}: that is an option of gradlr.attach")
    if rank is not None and not (method.is_gradlr or method.has_adapters):
        raise ArgumentError(f"method={name!r} has no rank: leave rank out")
    if rank is not None and method.has_adapters and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ArgumentError(f"rank={rank!r}: {name} takes an int of at least 1")
    return method


def _require_weights(method: Method, weights: str | None, shard: str | None) -> None:
    if weights not in (None, "int8"):
        raise ArgumentError(f"weights={weights!r}: they can be 'int8', or None for the model's own")
    if weights is not None and not method.is_gradlr:
        raise ArgumentError(f"method={method.name!r} cannot train {weights} weights: gradlr's methods can, or leave weights out")
    if weights is not None and shard is not None:
        raise ArgumentError(f"weights={weights!r}, shard={shard!r}: these weights are trained in one process so far")


def _traffic(tracker: MemoryTracker, gpus: int) -> tuple[Traffic, ...]:
    found = []
    for purpose, operation in dict.fromkeys((purpose, operation) for purpose, operation, _ in tracker.traffic):
        calls, handed = (tracker.traffic[purpose, operation, what] for what in ("calls", "bytes"))
        found.append(Traffic(operation, purpose, calls, handed, ring_bytes(operation, handed, gpus)))
    return tuple(found)
