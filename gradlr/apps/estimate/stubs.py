"""The one place where the estimate puts functions of its own in the place of others', each for the time of one simulation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import tensors
from ...distributed.communicator import Communicator
from ...linalg.int8 import Int8Weight
from .memory_tracker import MemoryTracker


@contextmanager
def replaced(owner: Any, **others: Callable[..., Any]) -> Iterator[None]:
    """Attributes of a class or module are others meanwhile; an owner that is None, or lacks one of them, is left alone."""
    originals = {name: getattr(owner, name, None) for name in others}
    if None in originals.values():
        yield
        return
    for name, other in others.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """CPU tensors are treated as a GPU's meanwhile: the host asks them for nothing, and products are made as there."""
    before = dict(tensors._OVERRIDES)
    tensors._OVERRIDES["cpu"] = tensors._TRAITS["cuda"]._replace(has_wide_sums=True, has_kernels=True)
    try:
        yield
    finally:
        tensors._OVERRIDES.clear()
        tensors._OVERRIDES.update(before)


@contextmanager
def stub_collectives(tracker: MemoryTracker, header: int, touched_rows: Callable[[Tensor], int]) -> Iterator[None]:
    """The other processes' part in what gradlr's processes say to each other: all is well, and all have the same.

    Args:
        tracker: Answers what is read from tensors without values.
        header: So many of the first numbers of replicas' buffer read as zeros, and those after them as ones; 0 for shards.
        touched_rows: Of an embedding's mask, with a byte for each row: how many rows any device has touched.
    """
    all_reduce = Communicator.all_reduce

    def answered_all_reduce(self: Communicator, numbers: Tensor, *others: Any) -> None:
        all_reduce(self, numbers, *others)
        # Shards send numbers as bits, int64, to which all others add zeros.
        answers = {torch.uint8: touched_rows, torch.int64: lambda scalar: 0.0}
        tracker.tell(numbers, answers.get(numbers.dtype, lambda scalar: float(scalar.storage_offset() >= header)))

    with replaced(
        Communicator,
        all_reduce=answered_all_reduce,
        all_gather_object=lambda self, told: [told] * self.size,
        broadcast=lambda self, model: None,
    ):
        yield


@contextmanager
def stub_internals(tracker: MemoryTracker, *, is_packed: bool) -> Iterator[None]:
    """Torch and transformers do in a simulation what they do in a step, and no more; what is not installed is left alone.

    Args:
        tracker: Counts.
        is_packed: Whether transformers is to find several sequences in a row; otherwise it finds one, whatever the positions.
    """

    def blank_codes(weight: Tensor, group: int) -> Int8Weight:
        m, n = weight.shape
        direction, correction = weight.new_empty((n, 1)), weight.new_empty((m, 1))
        return Int8Weight(
            torch.empty((m, n), dtype=torch.int8), weight.new_empty((m, -(-n // group))), direction, correction, group
        )

    propagator = getattr(sys.modules.get("torch.distributed.tensor._sharding_prop"), "ShardingPropagator", None)
    propagate: Any = getattr(propagator, "_propagate_tensor_meta_non_cached", None)
    resize = torch.UntypedStorage.resize_

    def unbooked(self: Any, *schema: Any) -> Any:
        with tracker.aside():
            return propagate(self, *schema)

    def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
        tracker.resize(storage, size)
        return resize(storage, size)

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.UntypedStorage, resize_=counted_resize))
        # A hundred operations on blocks of each weight, which all go before the step.
        stack.enter_context(replaced(Int8Weight, of=blank_codes))
        # Transformers takes tensors without values for a trace by torch.compile, and would mask attention then.
        library = sys.modules.get("transformers.utils.import_utils")
        stack.enter_context(replaced(library, is_fake_tensor=lambda tensor: False))
        masking = sys.modules.get("transformers.masking_utils") if is_packed else None
        stack.enter_context(replaced(masking, find_packed_sequence_indices=lambda positions: (positions != 1).cumsum(-1)))
        # To know a result's shape, DTensor runs each operation once on whole tensors without values, in real training as well.
        stack.enter_context(replaced(propagator, _propagate_tensor_meta_non_cached=unbooked))
        yield


@contextmanager
def first_shard_only() -> Iterator[None]:
    """FSDP2 divides each parameter into all N shards to keep one, a minute for a thousand devices: here rank 0's is made."""

    def chunks(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        size = tensor.size(dim)
        return [tensor.narrow(dim, 0, min(size, -(-size // count)))] * count

    with replaced(sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param"), _chunk_with_empty=chunks):
        yield
