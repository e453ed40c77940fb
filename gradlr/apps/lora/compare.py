"""Which entries of a state_dict differ from the base model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, CheckpointError, NonFiniteError


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state_dict, tied ones under each of their names.

    Raises:
        ArgumentError: the model is peft's, or a tensor has no values here.
    """
    wrapper = next((type(module).__name__ for module in model.modules() if type(module).__module__.startswith("peft.")), None)
    if wrapper:
        raise ArgumentError(f"the model holds peft's {wrapper}: merge_and_unload() it first, base_state is of the plain model")
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if value.is_meta or type(value).__name__ == "DTensor":
            raise ArgumentError(f"parameter {name!r} is {'on meta' if value.is_meta else 'sharded'}: export the whole model")
    return state


def fitted_base(state: dict[str, Tensor], base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's tensor for each of the model's; a tied one may be saved under one of its names only.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
        ArgumentError: `base_state` is no dict of tensors, or shares memory with the model.
    """
    if not isinstance(base_state, Mapping):
        raise ArgumentError(f"base_state is a {type(base_state).__name__}; give the base model's state_dict()")
    unknown = next((name for name in base_state if name not in state and isinstance(base_state[name], Tensor)), None)
    if unknown is not None:
        raise CheckpointError(f"base_state holds {unknown!r}, which the model has not: it is another model's, or has a prefix")
    by_memory = {(value.data_ptr(), value.shape): base_state[name] for name, value in state.items() if name in base_state}
    base = {}
    for name, value in state.items():
        found = base_state.get(name)
        base[name] = by_memory.get((value.data_ptr(), value.shape)) if found is None else found
        _check(name, value, base[name])
    return base


def _check(name: str, value: Tensor, base: Tensor | None) -> None:
    if not isinstance(base, Tensor):
        what = "lacks" if base is None else f"holds no tensor but a {type(base).__name__} for"
        raise CheckpointError(f"base_state {what} {name!r} {tuple(value.shape)}: give the whole state_dict() of the base model")
    if base.shape != value.shape:
        shapes = f"{tuple(base.shape)} in base_state, {tuple(value.shape)} in the model"
        raise CheckpointError(f"parameter {name!r} has shape {shapes}: a LoRA adapter cannot change a shape")
    if value.numel() and base.device == value.device and base.data_ptr() == value.data_ptr():
        raise ArgumentError(
            f"base_state[{name!r}] is the model's own memory, which training has changed: keep a copy before training, "
            "{name: tensor.clone() for name, tensor in model.state_dict().items()}, or load the base model again"
        )


def changed_names(state: dict[str, Tensor], base: dict[str, Tensor]) -> list[str]:
    """Names whose values differ; what is equal in the model's own dtype has not changed.

    Raises:
        NonFiniteError: a changed tensor, or its base, holds NaN or infinity.
    """
    changed = [name for name, value in state.items() if not torch.equal(value, base[name].to(value.device, value.dtype))]
    for name in changed:
        for where, tensor in (("the model", state[name]), ("base_state", base[name])):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(f"parameter {name!r} of {where} holds NaN or infinity: nothing was written")
    return changed


def difference(value: Tensor, base: Tensor) -> Tensor:
    """`value - base` in float32, or in float64 where `value` is."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.to(dtype) - base.to(value.device, dtype)
