"""Whether a model can be attached to, and is still the one later: same parameters, same shapes and dtypes, no new ones."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..errors import ArgumentError, AttachError, GradlrWarning
from ..params.kinds import ParameterPlan, is_sharded
from . import messages as guards


def require_plain_model(model: nn.Module) -> None:
    """Raise where nothing can be attached to: an ArgumentError for what is no module, an AttachError for what is wrapped."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            raise guards.wrapped(name or "the model", type(module).__name__)


def require_trainable(model: nn.Module, plans: list[ParameterPlan]) -> None:
    """Raise an AttachError unless the model's trainable parameters, its `plans`, are plain tensors on one device."""
    if not plans:
        count = sum(1 for _ in model.parameters())
        raise AttachError(f"none of the model's {count} parameters requires a gradient: call requires_grad_(True) first")
    devices = sorted({str(plan.parameter.device) for plan in plans if not plan.parameter.is_meta})
    if len(devices) > 1:
        raise AttachError(f"the trainable parameters lie on {' and '.join(devices)}; gradlr trains models on one device so far")
    for plan in plans:
        if isinstance(plan.parameter, UninitializedParameter) or plan.parameter.is_meta:
            raise AttachError(f"parameter {plan.name!r} has no values yet: run one batch through the model (or load it) first")
        if any(size > 1 and stride == 0 for size, stride in zip(plan.parameter.shape, plan.parameter.stride(), strict=True)):
            raise AttachError(f"parameter {plan.name!r} is an expanded view, several entries in one place: clone() it first")
        if plan.parameter.is_complex():
            raise AttachError(f"parameter {plan.name!r} is complex ({plan.parameter.dtype}); gradlr trains real parameters")
        if plan.parameter.grad is not None:
            raise AttachError(
                f"parameter {plan.name!r} holds a gradient from an earlier backward, which would be added to the first update: "
                "call model.zero_grad() before attaching"
            )


class AttachedParameters:
    """Remembers what was attached; holds the model and its modules weakly.

    Args:
        model: What was attached to.
        plans: Its attached parameters.
        is_alone: Whether this process exchanges nothing with others.
    """

    def __init__(self, model: nn.Module, plans: list[ParameterPlan], *, is_alone: bool = True) -> None:
        self._model = weakref.ref(model)
        # A container made for the call may be gone soon; the modules that own the parameters live as long as those matter.
        self._plans = {id(plan.parameter): plan for plan in plans}
        self._owners = _owners(model, self._plans)
        # Between forward and backward FSDP2 puts others in the place of its shards: plain tensors, or those of a smaller mesh.
        self._sharded_names = {plan.name for plan in plans if is_sharded(plan.parameter)}
        self._meshes = {plan.parameter.device_mesh for plan in plans if is_sharded(plan.parameter)}
        self._forms = {key: _form(plan.parameter) for key, plan in self._plans.items()}
        self._has_warned = False
        self._was_compiled = is_compiled_whole(model)
        self._own: set[int] = set()
        self._may_be_wrapped = is_alone

    def expect(self, parameters: list[Tensor]) -> None:
        """These were put into the model by gradlr, and are no strangers."""
        self._own = {id(parameter) for parameter in parameters}

    def check(self) -> None:
        """Look at every parameter of the model.

        Raises:
            AttachError: attached parameters are not the model's any more, or have another shape, dtype or device; or
                DistributedDataParallel has been put around them since.

        Warns:
            GradlrWarning: the model has trainable parameters that are not attached, or is compiled as a whole (once each).
        """
        lost = [self._plans[key].name for owner, keys in self._owners for key in self._missing(owner(), keys)]
        if lost:
            raise guards.lost_parameters(lost, len(self._plans))
        for key, plan in self._plans.items():
            if _form(plan.parameter) != self._forms[key]:
                raise guards.changed_form(plan.name, self._forms[key], _form(plan.parameter))
        model = self._model()
        if model is not None and self._may_be_wrapped:
            self._may_be_wrapped = False
            _require_unwrapped(model)
        if model is not None and not self._was_compiled and is_compiled_whole(model):
            self._was_compiled = True
            warnings.warn(guards.compiled_whole(), GradlrWarning, stacklevel=5)
        known = self._plans.keys() | self._own
        strangers = [name for name, one in self._trainable() if id(one) not in known and name not in self._sharded_names]
        if strangers and not self._has_warned:
            self._has_warned = True
            warnings.warn(guards.strangers(strangers), GradlrWarning, stacklevel=5)

    def _missing(self, owner: nn.Module | None, keys: list[int]) -> list[int]:
        # A parametrized weight has moved into a submodule of its owner.
        if owner is None:
            return []
        held = {id(parameter) for parameter in owner.parameters()}
        gathered = any(not is_sharded(parameter) or parameter.device_mesh not in self._meshes for parameter in owner.parameters())
        return [key for key in keys if key not in held and not (gathered and is_sharded(self._plans[key].parameter))]

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        model = self._model()
        pairs = [] if model is None else model.named_parameters()
        return ((name, parameter) for name, parameter in pairs if parameter.requires_grad)


def _require_unwrapped(model: nn.Module) -> None:
    # Nothing in a module tells of a wrapper around it. Where several processes run, one look at all objects is cheap enough.
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    own = set(map(id, model.modules()))
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel) and id(thing.module) in own:
            raise guards.wrapped("the model", type(thing).__name__)


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether several layers are compiled as one graph: `torch.compile(model)`, or `model.compile()`."""
    # By name: asking torch._dynamo would import it, which takes a second.
    is_compiled = type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None
    layers = sum(1 for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
    return is_compiled and layers > 1


def _owners(model: nn.Module, plans: dict[int, ParameterPlan]) -> list[tuple[weakref.ref[nn.Module], list[int]]]:
    found = []
    for module in model.modules():
        keys = [id(parameter) for parameter in module.parameters(recurse=False) if id(parameter) in plans]
        if keys:
            found.append((weakref.ref(module), keys))
    return found


def _form(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device
