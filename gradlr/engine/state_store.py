"""The state of every parameter: plain tensors in torch's own layout; read, written, saved and loaded."""

from __future__ import annotations

import copy
import json
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import warn
from ..linalg import stochastic_round
from ..rules import State, UpdateContext
from ..tensors import RandomStreams, mixed_seed
from .record import ParamRecord
from .state_dict import FORMAT, check_layout, extra_of, fitted_state, rates_message


class StateShards(Protocol):
    """Who knows which part of a sharded state lies in this process: `Sync`."""

    def full_state(self, record: ParamRecord, state: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def local_state(self, record: ParamRecord, saved: dict[str, Any]) -> Any: ...

    def shard_of(self, record: ParamRecord, key: str, value: Tensor) -> tuple[int, ...]: ...


class StateStore:
    """Keeps what the rules remember, each entry in the dtype that was asked for.

    Args:
        optimizer: Whose `state` and `param_groups` hold it all: they stay where torch's users look for them.
        records: The attached parameters.
        sync: Knows which part of a sharded state lies here.
        seed: Seed of all random numbers, with each parameter's index and step count.
        dtype: In which dtype state that is computed in float32 is kept; narrower ones are rounded stochastically.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, records: list[ParamRecord], sync: StateShards, *, seed: int, dtype: torch.dtype
    ) -> None:
        self.records, self.sync, self.seed, self.dtype = records, sync, seed, dtype
        self.by_id = {id(record.plan.parameter): record for record in records}
        self.random = RandomStreams()
        self.bind(optimizer)
        for record in records:
            self._begin(record)

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's `state` and `param_groups`, where somebody has put others in their places."""
        # Not the optimizer itself: it must be free as soon as its user drops it, without a reference cycle.
        self.states, self.groups = optimizer.state, optimizer.param_groups

    def _begin(self, record: ParamRecord) -> dict[str, Tensor]:
        """The state before the first update, also after `opt.state.clear()`."""
        state = self._narrow(record.initial_state(self.context(record, record.largest_rank)))
        # The count stays on the CPU, wherever the parameter lies: it is read at every step.
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        self.states[record.plan.parameter] = {"step": count, **state}
        return self.states[record.plan.parameter]

    def of(self, record: ParamRecord) -> dict[str, Tensor]:
        """All that is kept for a parameter, the step count included."""
        return self.states.get(record.plan.parameter) or self._begin(record)

    def group(self, record: ParamRecord) -> dict[str, Any]:
        """The entry of `param_groups` with the parameter's learning rate, momentum and weight decay."""
        return self.groups[record.group_index]

    def context(self, record: ParamRecord, rank: int | None = None) -> UpdateContext:
        """What the rule is told about the parameter's next update; `rank` in the place of its own."""
        parameter, state = record.plan.parameter, self.states.get(record.plan.parameter)
        step = 1 if not state else int(state["step"]) + 1
        return UpdateContext(
            rank=rank or record.rank,
            momentum_rank=record.momentum_rank,
            beta=float(self.groups[record.group_index]["beta"]),
            step=step,
            generator=self.random.at(parameter.device, self.seed, record.index, step),
            ceiling=record.largest_rank,
            layout=record.plan.layout,
        )

    def read(self, record: ParamRecord) -> State:
        """The rule's state, in the dtype that it computes in."""
        entries = (self.states.get(record.plan.parameter) or self._begin(record)).copy()
        del entries["step"]
        if self.dtype != torch.float32:
            entries |= {key: value.float() for key, value in entries.items() if value.dtype == self.dtype}
        return entries

    def write(self, record: ParamRecord, entries: State) -> None:
        """Keep the state after an update, which was narrowed, and count it."""
        state = self.states[record.plan.parameter]
        state.update(entries, step=state["step"] + 1)

    def uncount(self, record: ParamRecord) -> None:
        """The device has left the last update out."""
        self.of(record)["step"].sub_(1).clamp_(min=0)  # it may have been cleared since

    def rounding(self, record: ParamRecord, step: int) -> torch.Generator:
        """The random numbers that a narrow weight is to be rounded with: a stream of its own.

        In `step()` the rules of other parameters have drawn since. For int8 codes two steps have the same, since the second
        takes them mirrored.
        """
        number, step = record.plan.layout.number, step + step % 2 if record.is_int8 else step
        seed = mixed_seed(self.seed, number, 0) if number else self.seed
        return self.random.at(record.plan.parameter.device, seed, record.index, -step)

    def narrowed(self, record: ParamRecord, entries: State, step: int, generator: torch.Generator | None) -> State:
        """Entries in the narrow dtype in which they are kept, rounded by the random numbers that the weight's rounding has left.

        Where a parameter is sharded, what several processes hold alike is rounded alike, so that their bases stay the same: by
        random numbers that depend on the part which an entry is, not on the process.
        """
        if record.plan.layout.is_whole:
            return self._narrow(entries, generator or self.rounding(record, step))
        for place, (key, value) in enumerate(list(entries.items()), 1):
            seed = self.seed
            for number in (*self.sync.shard_of(record, key, value), place):
                seed = mixed_seed(seed, number, 0)
            random = self.random.at(record.plan.parameter.device, seed, record.index, -step)
            entries = entries | self._narrow({key: value}, random)
        return entries

    def _narrow(self, entries: State, generator: torch.Generator | None = None) -> State:
        if self.dtype == torch.float32:
            return entries
        return {
            key: stochastic_round(value, self.dtype, generator=generator) if value.dtype == torch.float32 else value
            for key, value in entries.items()
        }

    def to_dict(self, extra: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint in torch's own form, with all blocks of a sharded state, and what gradlr adds.

        Args:
            extra: Plain numbers that belong to the run, such as the tracker's.
        """
        states = {record.index: self.sync.full_state(record, self.of(record)) for record in self.records}
        groups, numbers = [], iter(states)
        for group in self.groups:
            saved = {key: _plain(value) for key, value in group.items() if key != "params"}
            groups.append({**saved, "params": [next(numbers) for _ in group["param_names"]]})
        extra = {"version": FORMAT, "seed": self.seed, "ranks": [record.rank for record in self.records], **extra}
        # Twice: torch.distributed.checkpoint.get_optimizer_state_dict passes on states and groups only; and as one text, since
        # its loaders take lists apart and lose entries that a fresh optimizer has not.
        groups[0]["gradlr"] = json.dumps(extra)
        return {"state": states, "param_groups": groups, "gradlr": extra}

    def from_dict(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's states, groups, ranks and seed; momentum rank and rank may differ from the saved ones.

        What schedulers, or the user, keep in a group is taken over as well; what only the group here has stays.

        Raises:
            CheckpointError: parameters, kinds or shapes differ; nothing was changed.
        """
        check_layout(saved, self.groups)
        extra = extra_of(saved)
        ranks = [min(rank, record.largest_rank) for rank, record in zip(extra["ranks"], self.records, strict=True)]
        states = [
            fitted_state(record, self.sync.local_state(record, saved), self.of(record), self.context(record, rank))
            for record, rank in zip(self.records, ranks, strict=True)
        ]
        own = {"params", "gradlr", "kind", "rule"}
        if extra["version"] == 1:
            own |= {"lr", "initial_lr", "lr_scale"}
            warn(rates_message(saved["param_groups"], self.groups))
        for one, group in zip(saved["param_groups"], self.groups, strict=True):
            # Of format 2 the rate is the kind's own already, for schedulers that are loaded with it as well.
            one = {"lr_scale": 1.0, **one}
            group.update({key: copy.deepcopy(value) for key, value in one.items() if key not in own})
        self.seed = extra["seed"]
        for record, rank, state in zip(self.records, ranks, states, strict=True):
            record.restart(rank)
            self.states[record.plan.parameter] = state

    def snapshot(self) -> tuple[Any, ...]:
        """All that loading replaces."""
        return dict(self.states), [dict(group) for group in self.groups], [record.rank for record in self.records], self.seed

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Put a snapshot back."""
        states, groups, ranks, self.seed = snapshot
        self.states.update(states)
        for group, before in zip(self.groups, groups, strict=True):
            group.clear()
            group.update(before)
        for record, rank in zip(self.records, ranks, strict=True):
            record.restart(rank)


def _plain(value: Any) -> Any:
    """A NumPy number, which a scheduler may have left in a group, as Python's: files that load without running code hold none."""
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value
