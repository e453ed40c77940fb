"""What is done to a model block by block: sharding as FSDP2 wants it, and recomputation in backward."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that come together one at a time: those that `_no_split_modules` names, as transformers' models do, else the
    members of the longest `nn.ModuleList` or `nn.Sequential`; none where no list has two.

    Named blocks come with inner ones first, the order in which `fully_shard` has to see them.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    if named := [module for module in model.modules() if type(module).__name__ in names]:
        return named[::-1]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1]
    return list(max(lists, key=len, default=nn.ModuleList()))


def shard_by_block(model: nn.Module, mesh: DeviceMesh, *, reshard: bool = True) -> nn.Module:
    """Shard every block and then the rest, in place; returns the model.

    Args:
        mesh: Of one dimension, the processes that hold a shard each.
        reshard: Whether a block is given back after its forward (`reshard_after_forward`).
    """
    # Not above: a torch that was built without distributed has everything else.
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    return model


def checkpoint_blocks(model: nn.Module, *, preserve_rng_state: bool = True) -> None:
    """Recompute each block in backward: transformers' own switch where there is one, else every member of the longest list.

    Args:
        model: Changed in place.
        preserve_rng_state: As for `torch.utils.checkpoint.checkpoint`: whether dropout draws the same again.

    Raises:
        ArgumentError: transformers cannot do so with this model, or it has no `nn.ModuleList` or `nn.Sequential` of two blocks
            or more.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ArgumentError(f"checkpointing: transformers cannot checkpoint a {type(model).__name__}; leave it out")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    for switch in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # transformers' new name, and its old
        if hasattr(model, switch):
            getattr(model, switch)(options)
            return
    blocks = blocks_of(model)
    if not blocks:
        raise ArgumentError(
            f"checkpointing=True: {type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks; wrap its blocks in "
            "torch.utils.checkpoint.checkpoint yourself and leave checkpointing out"
        )
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, **options)
