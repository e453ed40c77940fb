"""What the optimizer keeps: a record and a state per parameter, in torch's own layout; saved, loaded, counted and reported."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..distributed import part_of, saved_state, whole_state
from ..errors import ArgumentError, AttachError
from ..linalg import stochastic_round
from ..report import Report, report
from ..report.metrics import Observation
from ..rules import UpdateContext
from ..tracker import LossTracker
from .record import (
    Noise,
    ParameterGroup,
    ParamRecord,
    initial_state,
    make_records,
    mixed_seed,
    rule_entries,
    state_bytes,
    torch_group,
)
from .state_dict import check_layout, extra_of, fitted_state


class KeptState(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over the attached parameters, whose state is plain tensors made at once.

    Args:
        groups: Parameters and their options.
        tracker: Saved and loaded with the state.
        seed: Seed of all random numbers, with each parameter's index and step count.
        state_dtype: In which dtype state that is computed in float32 is kept; narrower ones are rounded stochastically.
    """

    def __init__(self, groups: list[ParameterGroup], tracker: LossTracker, seed: int, state_dtype: torch.dtype) -> None:
        self.tracker, self.seed, self._state_dtype = tracker, seed, state_dtype
        self._is_built = False
        super().__init__([torch_group(group) for group in groups], {"lr": 0.0, "beta": 0.0, "weight_decay": 0.0})
        self._is_built = True
        self._noise = Noise()
        self._records = {id(record.plan.parameter): record for record in make_records(groups)}
        for record in self._records.values():
            self.state[record.plan.parameter] = self._narrowed(initial_state(record, self._settings(record, record.largest_rank)))

    @property
    def records(self) -> list[ParamRecord]:
        """One entry per attached parameter, in the order of `param_groups`."""
        return list(self._records.values())

    def state_bytes(self) -> int:
        """Bytes of all state tensors, step counters left out."""
        return sum(state_bytes(self.state[record.plan.parameter]) for record in self.records)

    def observe(self, *match: str) -> Observation:
        """From now on, each update leaves its norms and the gradient's captured share for `report()`; no weight differs for it.

        Takes a second copy of one gradient at a time; with `apply="step"` the observed gradients themselves, until the step.

        Args:
            match: Globs on parameter names; all parameters where none is given.

        Returns:
            Ends the observation: by `stop()`, or as `with opt.observe(): ...`.

        Raises:
            ArgumentError: a glob matches no parameter, or the model is sharded.
        """
        self._require_whole("observe")
        return Observation(self.records, match or ("*",))

    def _require_whole(self, method: str) -> None:
        if sharded := [record.plan.name for record in self.records if not record.plan.layout.is_whole]:
            raise ArgumentError(
                f"opt.{method}() looks at whole matrices, and {sharded[0]!r} is sharded: load the checkpoint into a model of one "
                f"process, attach, and call {method} there"
            )

    @torch.no_grad()
    def report(self) -> Report:
        """What each parameter's update is made of now, and what it costs beside AdamW: print, show, plot or log it.

        Captured energy, gradient and update are those of the last update inside `observe()`.
        """
        self._require_whole("report")
        return report(self.records, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed once attached.

        Raises:
            ArgumentError: always, after construction.
        """
        if self._is_built:
            raise ArgumentError("groups are fixed once attached: call opt.detach() and attach again with groups=[...]")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise AttachError("an optimizer with hooks cannot be copied or pickled: save opt.state_dict() instead")

    def _saved(self, more: dict[str, Any]) -> dict[str, Any]:
        state = super().state_dict()
        state["state"] = {record.index: whole_state(record, self.state[record.plan.parameter]) for record in self.records}
        for group, packed in zip(self.param_groups, state["param_groups"], strict=True):
            packed["params"] = packed["params"][: len(group["param_names"])]
        ranks = [record.rank for record in self.records]
        extra = {"version": 1, "seed": self.seed, "ranks": ranks, "tracker": self.tracker.state_dict(), **more}
        # Twice: torch.distributed.checkpoint.get_optimizer_state_dict passes on states and groups only; and as one text, since
        # its loaders take lists apart and lose entries that a fresh optimizer has not.
        state["param_groups"][0]["gradlr"] = json.dumps(extra)
        return {**state, "gradlr": extra}

    def _remembered(self) -> tuple[Any, ...]:
        """All that loading replaces."""
        states, ranks = dict(self.state), [record.rank for record in self.records]
        return states, ranks, [dict(group) for group in self.param_groups], self.seed, self.tracker.state_dict()

    def _put_back(self, remembered: tuple[Any, ...]) -> None:
        states, ranks, groups, self.seed, tracker = remembered
        self.state.update(states)
        for record, rank in zip(self.records, ranks, strict=True):
            record.restart(rank)
        for group, before in zip(self.param_groups, groups, strict=True):
            group.update(before)
        self.tracker.load_state_dict(tracker)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        check_layout(state_dict, self.param_groups)
        extra, records = extra_of(state_dict), self.records
        ranks = [min(rank, record.largest_rank) for rank, record in zip(extra["ranks"], records, strict=True)]
        states = [
            fitted_state(record, saved_state(state_dict, record), self.state[record.plan.parameter], self._settings(record, rank))
            for record, rank in zip(records, ranks, strict=True)
        ]
        self.tracker.load_state_dict(extra["tracker"])
        # Torch's own loader would cast float32 state of bfloat16 parameters to bfloat16: give it the groups only.
        groups = [
            {**{key: value for key, value in saved.items() if key != "gradlr"}, "params": list(range(len(group["params"])))}
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.seed = extra["seed"]
        for record, rank, state in zip(records, ranks, states, strict=True):
            record.restart(rank)
            self.state[record.plan.parameter] = state

    def _rule_state(self, record: ParamRecord) -> dict[str, Tensor]:
        entries = rule_entries(self.state[record.plan.parameter])
        return {key: value.float() if value.dtype == self._state_dtype else value for key, value in entries.items()}

    def _narrowed(self, entries: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """State as it is kept: float32 in the state's dtype, everything else as it is."""
        if self._state_dtype == torch.float32:
            return entries
        return {
            key: stochastic_round(value, self._state_dtype, generator=generator) if value.dtype == torch.float32 else value
            for key, value in entries.items()
        }

    def _narrowed_in_parts(self, record: ParamRecord, entries: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The same where a parameter is sharded: what several processes hold alike is rounded alike, lest their bases part."""
        if self._state_dtype == torch.float32 or record.plan.layout.is_whole:
            return entries
        narrowed, device = {}, record.plan.parameter.device
        for place, (key, value) in enumerate(entries.items(), 1):
            seed = self.seed
            for number in (*part_of(record, key, value), place):
                seed = mixed_seed(seed, number, 0)
            narrowed |= self._narrowed({key: value}, self._noise.at(device, seed, record.index, -step))
        return narrowed

    def _settings(self, record: ParamRecord, rank: int | None = None) -> UpdateContext:
        parameter = record.plan.parameter
        step = int(self.state[parameter]["step"]) + 1 if parameter in self.state else 1
        generator = self._noise.at(parameter.device, self.seed, record.index, step)
        beta = self.param_groups[record.group_index]["beta"]
        needs_spectrum, layout = record.schedule.needs_spectrum, record.plan.layout
        return UpdateContext(rank or record.rank, record.momentum_rank, beta, step, generator, needs_spectrum, layout)
