"""Processes that hold a shard of every parameter each (`--shard fsdp`): FSDP2, and checkpoints of shards in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ...checkpoint.file import save
from ...checkpoint.folder import is_folder
from .folder import RunFolder
from .processes import ReplicaProcesses, blocks_of


class ShardProcesses(ReplicaProcesses):
    """Processes of torchrun that hold a shard of every parameter and of its state; a block comes together while it works."""

    def placed(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def attach_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def checkpoint(self, folder: RunFolder) -> Path | None:
        return folder.shards if is_folder(folder.shards) else None

    def save(self, folder: RunFolder, **objects: Any) -> None:
        save(folder.shards, **objects)

    def whole(self, model: nn.Module, skeleton: Callable[[], nn.Module]) -> nn.Module | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)  # all of them on the first process, none elsewhere
        if not self.is_first:
            return None
        gathered = skeleton()
        gathered.load_state_dict(weights)
        if hasattr(model, "generation_config"):  # of the model's folder, which the skeleton has not seen
            gathered.generation_config = model.generation_config
        return gathered
