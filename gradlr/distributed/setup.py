"""Several processes at `attach`: who holds what of the model."""

from __future__ import annotations

import os
from typing import Any

from torch import distributed, nn

from ..engine.sync import Alone, Sync
from ..errors import ArgumentError, AttachError, warn
from ..params.groups import ParameterGroup
from ..tensors import is_sharded
from .communicator import Communicator
from .replicated import Replicated
from .sharded import Sharded


def sync_for(model: nn.Module, process_group: Any, capture: str) -> Sync:
    """The other processes, as the model and the group tell; weights that FSDP2 has gathered for a forward go back.

    Raises:
        ArgumentError: the arguments do not suit each other.
        AttachError: there are several meshes, or FSDP2 has left parameters out.

    Warns:
        GradlrWarning: several processes run and no group is given.
    """
    if isinstance(model, nn.Module):  # what is none is told of later, by all processes
        _reshard(model)
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    # Those that are frozen too: what stands beside them is trained, and saved, by all processes alike.
    if any(map(is_sharded, parameters)):
        return _sharded(model, process_group, capture)
    if process_group is not None:
        return Replicated(Communicator(process_group))
    _warn_of_processes()
    return Alone()


def _sharded(model: nn.Module, process_group: Any, capture: str) -> Sharded:
    if process_group is not None:
        raise ArgumentError("the model is sharded: its parameters know their processes; leave process_group= out")
    if capture in ("adaptor", "one_sided"):
        raise ArgumentError(
            f'capture="{capture}" works on plain layers, and the model is sharded: FSDP2 gathers a weight for its forward, and '
            'tensor parallelism splits it. Use capture="hook", whose gradients are shards'
        )
    plain = [name for name, one in model.named_parameters() if one.requires_grad and not is_sharded(one)]
    if plain and any(map(_is_fsdp, model.modules())):
        raise AttachError(
            f"{plain[0]!r} is a plain parameter beside those that FSDP2 shards ({len(plain)} such in all): nobody would average "
            "its gradient over the processes. Call fully_shard on the whole model as well, last, before attaching"
        )
    return Sharded(model.parameters())


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_backward")  # FSDPModule, by name: importing it takes half a second


def _reshard(model: nn.Module) -> None:
    # After an evaluation the root keeps plain tensors in the place of its shards, and hooks on those would train copies.
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def spread_groups(groups: list[ParameterGroup], sync: Sync) -> None:
    """Give each plan the layout of its parameter, where the model is sharded.

    Raises:
        ArgumentError: a rule cannot work on shards.
        AttachError: shards cut through a view.
    """
    if not isinstance(sync, Sharded):
        return
    for group in groups:
        group.plans = [sync.spread(plan) for plan in group.plans]
        cut = [plan for plan in group.plans if not plan.layout.is_whole]
        if cut and not group.rule.supports_sharding:
            raise ArgumentError(
                f"rule {group.rule.name!r} needs whole matrices, and {cut[0].name!r} {tuple(cut[0].parameter.shape)} is sharded: "
                "use 'low_rank_polar' there, or write the rule for shards (supports_sharding, see gradlr.rules.Rule)"
            )


def _warn_of_processes() -> None:
    # torchrun sets it, also where the program goes on to forget the group.
    launched = os.environ.get("WORLD_SIZE", "")
    count = int(launched) if launched.isdecimal() else 1
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
    if count > 1:
        warn(
            f'{count} processes run, and each trains alone: attach(..., apply="step", '
            "process_group=torch.distributed.group.WORLD), after torch.distributed.init_process_group(), trains one model. For "
            "FSDP2 or tensor parallel, call fully_shard or parallelize_module before attach (docs/devices.md)"
        )
