"""Which entries of a state_dict differ from the base model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, CheckpointError, NonFiniteError


def compare(model: nn.Module, base_state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The model's tensors, the base model's, and the names whose values differ in the model's own dtype.

    Args:
        model: The fine-tuned model; a tied parameter counts under each of its names.
        base_state: The base model's `state_dict()`; a tied parameter may be in it under one of its names only.

    Raises:
        ArgumentError: the model is peft's, or a tensor has no values here; `base_state` is no dict of tensors, or shares memory
            with the model.
        CheckpointError: a name is missing or unknown, or a shape differs.
        NonFiniteError: a changed tensor, or its base, holds NaN or infinity.
    """
    wrapper = next((type(module).__name__ for module in model.modules() if type(module).__module__.startswith("peft.")), None)
    if wrapper:
        raise ArgumentError(f"the model holds peft's {wrapper}: merge_and_unload() it first, base_state is of the plain model")
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if value.is_meta or type(value).__name__ == "DTensor":
            raise ArgumentError(f"parameter {name!r} is {'on meta' if value.is_meta else 'sharded'}: export the whole model")
    base = _fitted_base(state, base_state)
    changed = [name for name, value in state.items() if not torch.equal(value, base[name].to(value.device, value.dtype))]
    for name in changed:
        for where, tensor in (("the model", state[name]), ("base_state", base[name])):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(f"parameter {name!r} of {where} holds NaN or infinity: nothing was written")
    return state, base, changed


def _fitted_base(state: dict[str, Tensor], base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(base_state, Mapping):
        raise ArgumentError(f"base_state is a {type(base_state).__name__}; give the base model's state_dict()")
    unknown = next((name for name in base_state if name not in state and isinstance(base_state[name], Tensor)), None)
    if unknown is not None:
        raise CheckpointError(f"base_state holds {unknown!r}, which the model has not: it is another model's, or has a prefix")
    tied = {(value.data_ptr(), value.shape): base_state[name] for name, value in state.items() if name in base_state}
    base = {name: base_state.get(name, tied.get((value.data_ptr(), value.shape))) for name, value in state.items()}
    return {name: _fitting(name, value, base[name]) for name, value in state.items()}


def _fitting(name: str, value: Tensor, base: Tensor | None) -> Tensor:
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
    return base
