"""What a checkpoint must know of sharded tensors: whether there are any, their place in a model, room to read them into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..params.kinds import is_sharded, local


def is_any_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is spread over processes."""
    return any(map(is_sharded, model.parameters()))


def as_held(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights by name as the model holds them: of whole tensors its shards."""
    own = model.state_dict()
    return {name: _sharded_like(own[name], value) for name, value in weights.items()}


def _sharded_like(like: Any, value: Any) -> Any:
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor  # slow to import, and only sharded models need it

    return DTensor.from_local(value.to(like.device), like.device_mesh, run_check=False).redistribute(placements=like.placements)


def room_for_state(parameter: Tensor | None, size: torch.Size, dtype: torch.dtype, known: Tensor | None) -> Tensor:
    """An uninitialized tensor to read an entry of a parameter's state into.

    Args:
        parameter: Whole, or sharded; None where the optimizer has none of that name.
        size: Of the entry, over all processes, as it was saved.
        dtype: Wanted.
        known: The entry that the optimizer holds now, its part in this process; None where it holds none.

    Returns:
        Sharded like the parameter where the entry has a number per weight, in all processes together and in this one: then each
        reads its own part only. Whole otherwise: an entry with a few numbers per row may have the parameter's size by chance.
    """
    if parameter is None or known is None or not is_sharded(parameter):
        return torch.empty(size, dtype=dtype)
    is_per_weight = size == parameter.shape and known.shape == local(parameter).shape
    return torch.empty_like(parameter.detach(), dtype=dtype) if is_per_weight else torch.empty(size, dtype=dtype)
