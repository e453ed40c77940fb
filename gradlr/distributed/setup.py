"""Several processes at `attach`: who holds what of the model, and whether all of them train the same."""

from __future__ import annotations

from torch import distributed, nn

from ..engine.record import ParameterGroup
from ..errors import ArgumentError, AttachError
from ..optimizer import GradLR
from ..params.kinds import is_sharded
from . import Communicator, Shards, fingerprint


def shards_of(model: nn.Module, process_group: distributed.ProcessGroup | None, capture: str) -> Shards | None:
    """The processes that hold parts of the model, where it is sharded; weights that FSDP2 has gathered for a forward go back.

    Raises:
        ArgumentError: the other arguments do not suit that.
        AttachError: there are several meshes, or FSDP2 has left parameters out.
    """
    if isinstance(model, nn.Module):
        _reshard(model)
    # Those that are frozen too: what stands beside them is trained, and saved, by all processes alike.
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    if not any(map(is_sharded, parameters)):
        return None
    if process_group is not None:
        raise ArgumentError("the model is sharded: its parameters know their processes; leave process_group= out")
    if capture in ("adaptor", "one_sided"):
        raise ArgumentError(
            f'capture="{capture}" works on plain layers, and the model is sharded: FSDP2 gathers a weight for its forward, and '
            'tensor parallelism splits it. Use capture="hook", whose gradients are shards'
        )
    _require_averaged(model)
    return Shards(parameters)


def _require_averaged(model: nn.Module) -> None:
    is_fsdp = any(map(_is_fsdp, model.modules()))
    plain = [name for name, one in model.named_parameters() if one.requires_grad and not is_sharded(one)]
    if is_fsdp and plain:
        raise AttachError(
            f"{plain[0]!r} is a plain parameter beside those that FSDP2 shards ({len(plain)} such in all): nobody would average "
            "its gradient over the processes. Call fully_shard on the whole model as well, last, before attaching"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_backward")  # FSDPModule, by name: importing it takes half a second


def _reshard(model: nn.Module) -> None:
    # After an evaluation the root keeps plain tensors in the place of its shards, and hooks on those would train copies.
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()


def spread(groups: list[ParameterGroup], shards: Shards) -> None:
    """Give each plan the layout of its parameter.

    Raises:
        ArgumentError: a rule cannot work on blocks.
        AttachError: shards cut through a view.
    """
    for group in groups:
        group.plans = [shards.spread(plan) for plan in group.plans]
        cut = [plan for plan in group.plans if not plan.layout.is_whole]
        if cut and not group.rule.supports_sharding:
            raise ArgumentError(
                f"rule {group.rule.name!r} needs whole matrices, and {cut[0].name!r} {tuple(cut[0].parameter.shape)} is sharded: "
                "use 'tracked_momentum' there, or write the rule for blocks (supports_sharding, see gradlr.rules.Rule)"
            )


def join(optimizer: GradLR, model: nn.Module, replicas: Communicator, shards: Shards | None) -> None:
    """See that all processes train the same, and where each has a replica, give it the values of rank 0.

    Raises:
        ParallelError: they differ, or one is missing; the optimizer is detached.
    """
    tracker, limit = optimizer.tracker, optimizer.limit
    options = {"seed": optimizer.seed, "state_dtype": optimizer._state_dtype, "max_grad_norm": limit.max_norm,
               "max_norm_growth": limit.max_growth, "loss ratio": tracker.ratio, "max_loss": tracker.max_loss}  # fmt: skip
    try:
        replicas.assert_same_on_all_ranks(fingerprint(optimizer.records, optimizer.param_groups, options))
        if shards is None:
            replicas.broadcast(model)
        else:
            shards.join(optimizer.records)
    except BaseException:
        optimizer.detach()
        raise
