"""The processes that train replicas of one model: what they tell each other, and who is named where one is missing."""

from __future__ import annotations

import itertools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..engine.sync import Comm
from ..errors import ArgumentError, ParallelError

# How long a process that is merely late may take to show that it is there, before it is named as missing.
_GRACE_SECONDS = 2.0
_attached: Counter[str] = Counter()


class Communicator:
    """The processes of a group, each with a replica of the model.

    Each leaves the number of its last meeting in the group's store, so that the others can tell who did not come.

    Args:
        group: A process group that this process belongs to.

    Attributes:
        size: Number of processes.
        rank: Of this process, in the group.
        meetings: Number of steps that this process has come to.

    Raises:
        ArgumentError: it is no such group.
    """

    def __init__(self, group: Any) -> None:
        if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise ArgumentError(
                f"process_group={group!r}: give a group that this process belongs to, such as torch.distributed.group.WORLD "
                "after torch.distributed.init_process_group()"
            )
        self.size, self.rank, self.meetings = group.size(), group.rank(), 0
        # Held weakly: a group that outlives destroy_process_group until the interpreter ends may abort the process there.
        self._group = weakref.ref(group)
        # Processes attach to a group in the same order, whatever they do besides.
        self._name = f"gradlr {_attached[group.group_name]}"
        _attached[group.group_name] += 1

    @property
    def group(self) -> distributed.ProcessGroup:
        """The process group.

        Raises:
            ParallelError: it was destroyed.
        """
        return living(self._group)

    @property
    def _store(self) -> distributed.Store:
        return distributed.distributed_c10d._get_process_group_store(self.group)

    def begin_collective(self) -> None:
        """A step begins; the others may know."""
        self.meetings += 1
        self._store.set(self._key("came to", self.rank), str(self.meetings))

    def all_reduce(self, numbers: Tensor, op: Any = None, group: Any = None) -> None:
        """Sum (or what `op` does) over all processes, in place.

        Raises:
            ParallelError: a process is missing; named where the store tells.
        """
        op, group = op or distributed.ReduceOp.SUM, group or self.group
        self._asking(lambda: distributed.all_reduce(numbers, op=op, group=group))

    def all_gather_object(self, told: Any) -> list[Any]:
        """What each process tells, in the order of their ranks.

        Raises:
            ParallelError: a process is missing.
        """
        everything: list[Any] = [None] * self.size
        self._asking(lambda: distributed.all_gather_object(everything, told, group=self.group))
        return everything

    @torch.no_grad()
    def broadcast(self, model: nn.Module) -> None:
        """Give all parameters and buffers the values that they have on rank 0.

        Raises:
            ParallelError: a process is missing.
        """
        source = distributed.get_global_rank(self.group, 0)
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.numel() and not tensor.is_meta:
                # As bytes: every dtype is broadcast so.
                flat = tensor.detach().contiguous().reshape(-1)
                self._asking(partial(distributed.broadcast, flat.view(torch.uint8), source, group=self.group))
                tensor.copy_(flat.view(tensor.shape))

    def assert_same_on_all_ranks(self, told: dict[str, str]) -> None:
        """Compare what each process tells of itself.

        Raises:
            ParallelError: they differ, or one has raised an error meanwhile; names the ranks and the first difference.
        """
        everything = self.all_gather_object((None, told))
        self._raise_failed([failure for failure, _ in everything])
        if different := {rank: one for rank, (_, one) in enumerate(everything) if one != everything[0][1]}:
            raise ParallelError(_difference_message(everything[0][1], different))

    def tell_failure(self, error: BaseException) -> None:
        """Answer the others' `assert_same_on_all_ranks` with an error."""
        self.all_gather_object((f"{type(error).__name__}: {error}", {}))

    def _raise_failed(self, failures: list[str | None]) -> None:
        if failed := {rank: failure for rank, failure in enumerate(failures) if failure is not None}:
            rank, failure = next(iter(failed.items()))
            raise ParallelError(f"{ranks_named(failed)} stopped with an error, and so do the others. On rank {rank}: {failure}")

    def _asking(self, ask: Callable[[], Any]) -> None:
        try:
            ask()
        except RuntimeError as error:
            where = f"at step number {self.meetings}" if self.meetings else "before the first step"
            reason = str(error).splitlines()[0]
            raise ParallelError(
                f"rank {self.rank} could not reach the others {where}: {self._missing_message()} ({reason}). Every process must "
                "call attach, load_state_dict and opt.step() equally often: one that has no batch left calls opt.step() "
                "without a backward, and all take part in evaluating and saving a sharded model"
            ) from error

    def _missing_message(self) -> str:
        try:
            late, silent = self._missing()
        except RuntimeError:
            return "the group's store does not answer either, so the process that holds it (rank 0, or its launcher) is gone"
        if len(silent) > 1:
            steps = " and ".join(str(self._came_to(rank)) for rank in silent)
            return f"{ranks_named(silent)} have not met this error, so one of them is missing (they last came to steps {steps})"
        if not late + silent:
            return "all processes have reported this error"
        return " and ".join(f"rank {rank} is missing (it last came to step {self._came_to(rank)})" for rank in late + silent)

    def _missing(self) -> tuple[list[int], list[int]]:
        """Those who have not come; where all have, those who have not run into the error: some of these may wait for others."""
        self._store.set(self._key("lost at", self.rank), str(self.meetings))
        others = [rank for rank in range(self.size) if rank != self.rank]
        if late := self._waited_for(lambda: [rank for rank in others if self._came_to(rank) < self.meetings]):
            return late, []
        return [], self._waited_for(lambda: [rank for rank in others if not self._store.check([self._key("lost at", rank)])])

    @staticmethod
    def _waited_for(missing: Callable[[], list[int]]) -> list[int]:
        deadline = time.monotonic() + _GRACE_SECONDS
        while (ranks := missing()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return ranks

    def _came_to(self, rank: int) -> int:
        key = self._key("came to", rank)
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _key(self, what: str, rank: int) -> str:
        return f"{self._name} rank {rank} {what}"


def living(reference: weakref.ref[distributed.ProcessGroup]) -> distributed.ProcessGroup:
    """The group that is referred to.

    Raises:
        ParallelError: it was destroyed.
    """
    group = reference()
    if group is None:
        raise ParallelError("the process group was destroyed (destroy_process_group): nothing can be trained with it any more")
    return group


@contextmanager
def propagate_errors(comm: Comm) -> Iterator[None]:
    """A part of the program at whose end all processes compare notes: where one fails, the others hear of it there."""
    try:
        yield
    except ParallelError:
        raise
    except Exception as error:
        with suppress(ParallelError):  # the error at hand says more than that somebody does not hear of it
            comm.tell_failure(error)
        raise


def ranks_named(ranks: Any) -> str:
    """For messages: [1] → 'rank 1', [1, 3] → 'ranks 1, 3'."""
    ranks = list(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _difference_message(expected: dict[str, str], different: dict[int, dict[str, str]]) -> str:
    rank, told = next(iter(different.items()))
    keys = [key for key in {**expected, **told} if expected.get(key) != told.get(key)]
    there, here = (one.get(keys[0], "not there") for one in (told, expected)) if keys else ("in another order", "in this order")
    what, others = keys[0] if keys else "the parameters", f" ({len(keys) - 1} more things differ)" if len(keys) > 1 else ""
    return (
        f"{ranks_named(different)} and rank 0 do not train the same: on rank {rank}, {what}: {there}; on rank 0: {here}{others}. "
        "Give every process the same model, arguments and checkpoint"
    )
