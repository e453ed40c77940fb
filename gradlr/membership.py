"""Whether the model is still the one that was attached to: same parameters, same shapes and dtypes, no new ones."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import guards
from .errors import GradlrWarning
from .parameters import ParameterPlan


class Membership:
    """Remembers what was attached; holds the model and its modules weakly.

    Args:
        model: What was attached to.
        plans: Its attached parameters.
    """

    def __init__(self, model: nn.Module, plans: list[ParameterPlan]) -> None:
        self._model = weakref.ref(model)
        # A container made for the call may be gone soon; the modules that own the parameters live as long as those matter.
        self._plans = {id(plan.parameter): plan for plan in plans}
        self._owners = _owners(model, self._plans)
        self._forms = {key: _form(plan.parameter) for key, plan in self._plans.items()}
        self._has_warned = False

    def check(self) -> None:
        """Look at every parameter of the model.

        Raises:
            AttachError: attached parameters are not the model's any more, or have another shape or dtype.

        Warns:
            GradlrWarning: the model has trainable parameters that are not attached (once).
        """
        present = dict(self._present())
        owned = {key for owner, keys in self._owners if owner() is not None for key in keys}
        lost = [plan.name for key, plan in self._plans.items() if key in owned and key not in present]
        if lost:
            raise guards.lost_parameters(lost, len(self._plans))
        for key, plan in self._plans.items():
            if _form(plan.parameter) != self._forms[key]:
                raise guards.changed_form(plan.name, self._forms[key], _form(plan.parameter))
        strangers = [name for key, (name, is_trainable) in present.items() if is_trainable and key not in self._plans]
        if strangers and not self._has_warned:
            self._has_warned = True
            warnings.warn(guards.strangers(strangers), GradlrWarning, stacklevel=5)

    def _present(self) -> Iterator[tuple[int, tuple[str, bool]]]:
        model = self._model()
        modules = [model] if model is not None else [module for owner, _ in self._owners if (module := owner()) is not None]
        for module in modules:
            for name, parameter in module.named_parameters():
                yield id(parameter), (name, parameter.requires_grad)


def _owners(model: nn.Module, plans: dict[int, ParameterPlan]) -> list[tuple[weakref.ref[nn.Module], list[int]]]:
    found = []
    for module in model.modules():
        keys = [id(parameter) for parameter in module.parameters(recurse=False) if id(parameter) in plans]
        if keys:
            found.append((weakref.ref(module), keys))
    return found


def _form(parameter: Tensor) -> tuple[torch.Size, torch.dtype]:
    return parameter.shape, parameter.dtype
