"""The state of every parameter: plain tensors in torch's own layout; read, written, saved and loaded."""

from __future__ import annotations

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
        self._bind(optimizer)
        for record in records:
            state = self._narrow(record.initial_state(self.context(record, record.largest_rank)))
            # The count stays on the CPU, wherever the parameter lies: it is read at every step.
            count = torch.zeros((), dtype=torch.int64, device="cpu")
            self._states[record.plan.parameter] = {"step": count, **state}

    def _bind(self, optimizer: torch.optim.Optimizer) -> None:
        # Not the optimizer itself: it must be free as soon as its user drops it, without a reference cycle.
        self._states, self.groups = optimizer.state, optimizer.param_groups

    def of(self, record: ParamRecord) -> dict[str, Tensor]:
        """All that is kept for a parameter, the step count included."""
        return self._states[record.plan.parameter]

    def group(self, record: ParamRecord) -> dict[str, Any]:
        """The entry of `param_groups` with the parameter's learning rate, momentum and weight decay."""
        return self.groups[record.group_index]

    def context(self, record: ParamRecord, rank: int | None = None) -> UpdateContext:
        """What the rule is told about the parameter's next update; `rank` in the place of its own."""
        parameter, state = record.plan.parameter, self._states.get(record.plan.parameter)
        step = 1 if not state else int(state["step"]) + 1
        return UpdateContext(
            rank=rank or record.rank,
            momentum_rank=record.momentum_rank,
            beta=self.groups[record.group_index]["beta"],
            step=step,
            generator=self.random.at(parameter.device, self.seed, record.index, step),
            ceiling=record.largest_rank,
            layout=record.plan.layout,
        )

    def read(self, record: ParamRecord) -> State:
        """The rule's state, in the dtype that it computes in."""
        entries = self._states[record.plan.parameter].copy()
        del entries["step"]
        if self.dtype != torch.float32:
            entries |= {key: value.float() for key, value in entries.items() if value.dtype == self.dtype}
        return entries

    def write(self, record: ParamRecord, entries: State) -> None:
        """Keep the state after an update, which was narrowed, and count it."""
        state = self._states[record.plan.parameter]
        state.update(entries, step=state["step"] + 1)

    def uncount(self, record: ParamRecord) -> None:
        """The device has left the last update out."""
        self.of(record)["step"] -= 1

    def narrowed(self, record: ParamRecord, entries: State, step: int) -> tuple[State, torch.Generator | None]:
        """Entries in the dtype in which they are kept, and the random numbers that a narrow weight is to be rounded with.

        Where a parameter is sharded, what several processes hold alike is rounded alike, so that their bases stay the same: by
        random numbers that depend on the part which an entry is, not on the process.
        """
        layout, device = record.plan.layout, record.plan.parameter.device
        if self.dtype == torch.float32 and not record.is_narrow:  # nothing is rounded
            return entries, None
        if self.dtype != torch.float32 and not layout.is_whole:
            for place, (key, value) in enumerate(list(entries.items()), 1):
                seed = self.seed
                for number in (*self.sync.shard_of(record, key, value), place):
                    seed = mixed_seed(seed, number, 0)
                entries = entries | self._narrow({key: value}, self.random.at(device, seed, record.index, -step))
        # A stream of its own: in step() the rules of other parameters have drawn since.
        seed = mixed_seed(self.seed, layout.number, 0) if layout.number else self.seed
        generator = self.random.at(device, seed, record.index, -step)
        return self._narrow(entries, generator), generator

    def _narrow(self, entries: State, generator: torch.Generator | None = None) -> State:
        if self.dtype == torch.float32:
            return entries
        return {
            key: stochastic_round(value, self.dtype, generator=generator) if value.dtype == torch.float32 else value
            for key, value in entries.items()
        }

    def to_dict(self, packed: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint: torch's own state_dict with all blocks of a sharded state, and what gradlr adds.

        Args:
            packed: What `torch.optim.Optimizer.state_dict` gives.
            extra: Plain numbers that belong to the run, such as the tracker's.
        """
        packed["state"] = {record.index: self.sync.full_state(record, self.of(record)) for record in self.records}
        for group, saved in zip(self.groups, packed["param_groups"], strict=True):
            saved["params"] = saved["params"][: len(group["param_names"])]
        extra = {"version": FORMAT, "seed": self.seed, "ranks": [record.rank for record in self.records], **extra}
        # Twice: torch.distributed.checkpoint.get_optimizer_state_dict passes on states and groups only; and as one text, since
        # its loaders take lists apart and lose entries that a fresh optimizer has not.
        packed["param_groups"][0]["gradlr"] = json.dumps(extra)
        return {**packed, "gradlr": extra}

    def from_dict(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take over a checkpoint's states, groups, ranks and seed; momentum rank and rank may differ from the saved ones.

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
        # Torch's own loader would cast float32 state of bfloat16 parameters to bfloat16: give it the groups only.
        own = ("kind", "rule") if extra["version"] == FORMAT else ("kind", "rule", "lr", "initial_lr")
        groups = [
            {
                **{key: value for key, value in one.items() if key != "gradlr"},
                **{key: group[key] for key in own if key in group},
                "params": list(range(len(group["params"]))),
            }
            for one, group in zip(saved["param_groups"], self.groups, strict=True)
        ]
        if extra["version"] != FORMAT:
            warn(rates_message(saved["param_groups"], self.groups))
        torch.optim.Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": groups})
        self._bind(optimizer)
        self.seed = extra["seed"]
        for record, rank, state in zip(self.records, ranks, states, strict=True):
            record.restart(rank)
            self._states[record.plan.parameter] = state

    def snapshot(self) -> tuple[Any, ...]:
        """All that loading replaces."""
        return dict(self._states), [dict(group) for group in self.groups], [record.rank for record in self.records], self.seed

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Put a snapshot back."""
        states, groups, ranks, self.seed = snapshot
        self._states.update(states)
        for group, before in zip(self.groups, groups, strict=True):
            group.update(before)
        for record, rank in zip(self.records, ranks, strict=True):
            record.restart(rank)
