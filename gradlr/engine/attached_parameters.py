"""Whether a model can be attached to, and is still the one later: same parameters, same shapes and dtypes, no new ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..errors import ArgumentError, AttachError, warn
from ..params.kinds import ParameterPlan
from ..tensors import is_sharded
from .masks import pruned_message


def require_plain_model(model: nn.Module) -> None:
    """Raise where nothing can be attached to: an ArgumentError for what is no module, an AttachError for what is wrapped."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            raise wrapped_error(name or "the model", type(module).__name__)


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
        mixed: `id`s of those whose rules mix entries, so that masks are of interest.
        may_be_wrapped: Whether somebody might put DistributedDataParallel around the model, for which nothing here is told.

    Attributes:
        label: The model in words, for messages.
    """

    def __init__(
        self, model: nn.Module, plans: list[ParameterPlan], *, mixed: Container[int] = (), may_be_wrapped: bool = True
    ) -> None:
        self._model = weakref.ref(model)
        self.label = f"a {type(model).__name__} ({len(plans)} parameters, {plans[0].name!r} first)"
        self._plans = {id(plan.parameter): plan for plan in plans}
        self._forms = [(plan, plan.parameter.shape, plan.parameter.dtype, plan.parameter.device) for plan in plans]
        self._hook_counts = [(plan, _hook_count(plan.parameter)) for plan in plans]  # before the optimizer's own
        # A container made for the call may be gone soon; the modules that own the parameters live as long as those matter.
        self._owners = [
            (weakref.ref(module), name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in self._plans
        ]
        # Between forward and backward FSDP2 puts others in the place of its shards: plain tensors, or those of a smaller mesh.
        sharded = [plan for plan in plans if is_sharded(plan.parameter)]
        self._sharded_names = {plan.name for plan in sharded}
        self._meshes: set[Any] = {plan.parameter.device_mesh for plan in sharded}  # type: ignore[attr-defined]  # DTensors
        self._checks = 0
        self._has_warned = False
        self._was_compiled = is_compiled_whole(model)
        self._may_be_wrapped = may_be_wrapped
        self._mixed, self._has_told_of_masks, self._has_told_of_hooks = mixed, False, False

    def check(self) -> None:
        """See that the attached parameters are still the model's; now and then, that it has no others.

        Raises:
            AttachError: attached parameters are not the model's any more, or have another shape, dtype or device; or
                DistributedDataParallel has been put around them since.

        Warns:
            GradlrWarning: the model has trainable parameters that are not attached, is compiled as a whole, is pruned, or has
                hooks that find no gradient (once each).
        """
        self._require_same()
        model = self._model()
        # The walk over all modules takes longer than a small step: at the first losses, and then ever more rarely.
        self._checks += 1
        if model is None or not (self._checks <= 16 or self._checks & (self._checks - 1) == 0):
            return
        if self._may_be_wrapped:
            self._may_be_wrapped = False
            _require_unwrapped(model)
        if not self._was_compiled and is_compiled_whole(model):
            self._was_compiled = True
            warn(COMPILED_WHOLE)
        if not self._has_warned:
            self._warn_of_unattached(model)
        if not self._has_told_of_masks and (message := pruned_message(model, self._mixed)):
            self._has_told_of_masks = True
            warn(message)
        if not self._has_told_of_hooks:
            self._warn_of_later_hooks()

    def _require_same(self) -> None:
        # At every loss: two loops over what was noted, without a call for each parameter.
        lost = []
        for owner, name, parameter in self._owners:
            module = owner()
            if module is not None and module._parameters.get(name) is not parameter and self._is_lost(module, parameter):
                lost.append(self._plans[id(parameter)].name)
        if lost:
            raise AttachError(
                f"{len(lost)} of {len(self._plans)} parameters were replaced since attach ({lost[0]!r} first), so their hooks "
                "are gone. Load weights with load_state_dict(assign=False); move, wrap, shard (fully_shard) and parametrize the "
                "model before attaching; or call opt.detach() and attach again"
            )
        for plan, shape, dtype, device in self._forms:
            now = plan.parameter
            if now.shape != shape or now.dtype != dtype or now.device != device:
                raise AttachError(
                    f"parameter {plan.name!r} was {tuple(shape)} {dtype} on {device} when it was attached and is "
                    f"{tuple(now.shape)} {now.dtype} on {now.device} now: convert and move the model before attaching, or call "
                    "opt.detach() and attach again"
                )

    def _is_lost(self, owner: nn.Module, parameter: Tensor) -> bool:
        # A parametrized weight has moved into a submodule of its owner; a gathered one comes back.
        held = list(owner.parameters())
        if any(one is parameter for one in held):
            return False
        is_gathered = any(not is_sharded(one) or one.device_mesh not in self._meshes for one in held)  # type: ignore[attr-defined]
        return not (is_gathered and is_sharded(parameter))

    def _warn_of_unattached(self, model: nn.Module) -> None:
        trainable = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        unattached = [name for name, one in trainable if id(one) not in self._plans and name not in self._sharded_names]
        if unattached:
            self._has_warned = True
            warn(
                f"{len(unattached)} trainable parameters of the model are not attached ({unattached[0]!r} first) and will not be "
                "updated: they were frozen or not there when attach was called. Call opt.detach() and attach again"
            )

    def _warn_of_later_hooks(self) -> None:
        # Hooks are called in the order in which they were registered, and the optimizer's own has taken the gradient by then.
        late = [plan.name for plan, count in self._hook_counts if _hook_count(plan.parameter) > count + 1]
        if late:
            self._has_told_of_hooks = True
            warn(
                f"{len(late)} parameters ({late[0]!r} first) have post-accumulate hooks that were registered after attach: they "
                "find .grad None, since gradlr's hook has taken the gradient. Register them before attaching, or use "
                "parameter.register_hook, which sees the gradient before"
            )


def _hook_count(parameter: Tensor) -> int:
    return len(parameter._post_accumulate_grad_hooks or ())


COMPILED_WHOLE = (
    "the model is compiled as a whole: its backward makes all gradients at once, so that all are in memory before the first is "
    "taken. The updates are right; for the memory, compile block by block (for block in model.blocks: block.compile())"
)


def wrapped_error(name: str, wrapper: str) -> AttachError:
    """The model is in a wrapper that averages gradients after hooks have taken them."""
    return AttachError(
        f"{name} is wrapped in {wrapper}: hooks would see each replica's own gradient, and replicas would drift apart. Attach to "
        'the plain module with apply="step" and process_group=torch.distributed.group.WORLD, which sends less than the wrapper '
        "does. Trainers that wrap by themselves: with accelerate, call gradlr.integrations.accelerate.attach before prepare; "
        "with transformers, use gradlr.integrations.transformers.Trainer; Lightning trains with devices=1 only (docs/devices.md)"
    )


def _require_unwrapped(model: nn.Module) -> None:
    # Nothing in a module tells of a wrapper around it. Where several processes run, one look at all objects is cheap enough.
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    own = set(map(id, model.modules()))
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel) and id(thing.module) in own:
            raise wrapped_error("the model", type(thing).__name__)


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether several layers are compiled as one graph: `torch.compile(model)`, or `model.compile()`."""
    # By name: asking torch._dynamo would import it, which takes a second.
    is_compiled = type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None
    layers = sum(1 for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
    return is_compiled and layers > 1
