"""A model spread over processes block by block, as FSDP2 wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

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
