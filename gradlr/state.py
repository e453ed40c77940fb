"""What the optimizer keeps: a slot and a state per parameter, in torch's own layout; saved, loaded, counted and reported."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from .checkpoint import check_layout, extra_of, fitted_state
from .errors import ArgumentError, AttachError
from .linalg import stochastic_round
from .observe import Observation
from .parallel import part_of, saved_state, whole_state
from .report import Report, report
from .rules import Settings
from .slots import (
    Noise,
    ParameterGroup,
    Slot,
    initial_state,
    make_slots,
    mixed_seed,
    rule_entries,
    state_bytes,
    torch_group,
)
from .tracker import LossTracker


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
        self._slots = {id(slot.plan.parameter): slot for slot in make_slots(groups)}
        for slot in self._slots.values():
            self.state[slot.plan.parameter] = self._narrowed(initial_state(slot, self._settings(slot, slot.largest_rank)))

    @property
    def slots(self) -> list[Slot]:
        """One entry per attached parameter, in the order of `param_groups`."""
        return list(self._slots.values())

    def state_bytes(self) -> int:
        """Bytes of all state tensors, step counters left out."""
        return sum(state_bytes(self.state[slot.plan.parameter]) for slot in self.slots)

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
        return Observation(self.slots, match or ("*",))

    def _require_whole(self, method: str) -> None:
        if sharded := [slot.plan.name for slot in self.slots if not slot.plan.layout.is_whole]:
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
        return report(self)

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
        state["state"] = {slot.index: whole_state(slot, self.state[slot.plan.parameter]) for slot in self.slots}
        for group, packed in zip(self.param_groups, state["param_groups"], strict=True):
            packed["params"] = packed["params"][: len(group["param_names"])]
        ranks = [slot.rank for slot in self.slots]
        extra = {"version": 1, "seed": self.seed, "ranks": ranks, "tracker": self.tracker.state_dict(), **more}
        # Twice: torch.distributed.checkpoint.get_optimizer_state_dict passes on states and groups only; and as one text, since
        # its loaders take lists apart and lose entries that a fresh optimizer has not.
        state["param_groups"][0]["gradlr"] = json.dumps(extra)
        return {**state, "gradlr": extra}

    def _remembered(self) -> tuple[Any, ...]:
        """All that loading replaces."""
        states, ranks = dict(self.state), [slot.rank for slot in self.slots]
        return states, ranks, [dict(group) for group in self.param_groups], self.seed, self.tracker.state_dict()

    def _put_back(self, remembered: tuple[Any, ...]) -> None:
        states, ranks, groups, self.seed, tracker = remembered
        self.state.update(states)
        for slot, rank in zip(self.slots, ranks, strict=True):
            slot.restart(rank)
        for group, before in zip(self.param_groups, groups, strict=True):
            group.update(before)
        self.tracker.load_state_dict(tracker)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        check_layout(state_dict, self.param_groups)
        extra, slots = extra_of(state_dict), self.slots
        ranks = [min(rank, slot.largest_rank) for rank, slot in zip(extra["ranks"], slots, strict=True)]
        states = [
            fitted_state(slot, saved_state(state_dict, slot), self.state[slot.plan.parameter], self._settings(slot, rank))
            for slot, rank in zip(slots, ranks, strict=True)
        ]
        self.tracker.load_state_dict(extra["tracker"])
        # Torch's own loader would cast float32 state of bfloat16 parameters to bfloat16: give it the groups only.
        groups = [
            {**{key: value for key, value in saved.items() if key != "gradlr"}, "params": list(range(len(group["params"])))}
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.seed = extra["seed"]
        for slot, rank, state in zip(slots, ranks, states, strict=True):
            slot.restart(rank)
            self.state[slot.plan.parameter] = state

    def _rule_state(self, slot: Slot) -> dict[str, Tensor]:
        entries = rule_entries(self.state[slot.plan.parameter])
        return {key: value.float() if value.dtype == self._state_dtype else value for key, value in entries.items()}

    def _narrowed(self, entries: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """State as it is kept: float32 in the state's dtype, everything else as it is."""
        if self._state_dtype == torch.float32:
            return entries
        return {
            key: stochastic_round(value, self._state_dtype, generator=generator) if value.dtype == torch.float32 else value
            for key, value in entries.items()
        }

    def _narrowed_in_parts(self, slot: Slot, entries: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The same where a parameter is sharded: what several processes hold alike is rounded alike, lest their bases part."""
        if self._state_dtype == torch.float32 or slot.plan.layout.is_whole:
            return entries
        narrowed, device = {}, slot.plan.parameter.device
        for place, (key, value) in enumerate(entries.items(), 1):
            seed = self.seed
            for number in (*part_of(slot, key, value), place):
                seed = mixed_seed(seed, number, 0)
            narrowed |= self._narrowed({key: value}, self._noise.at(device, seed, slot.index, -step))
        return narrowed

    def _settings(self, slot: Slot, rank: int | None = None) -> Settings:
        parameter = slot.plan.parameter
        step = int(self.state[parameter]["step"]) + 1 if parameter in self.state else 1
        generator = self._noise.at(parameter.device, self.seed, slot.index, step)
        beta = self.param_groups[slot.group_index]["beta"]
        needs_spectrum, layout = slot.schedule.needs_spectrum, slot.plan.layout
        return Settings(rank or slot.rank, slot.momentum_rank, beta, step, generator, needs_spectrum, layout)
