"""The processes that train one model: one alone, or those that torchrun has started, with a replica or a shard each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from ...checkpoint.file import save
from ...checkpoint.folder import is_folder
from ...distributed.communicator import Communicator, propagate_errors
from ...errors import ArgumentError, ParallelError
from ..bench.environment import require_device
from ..blocks import shard_by_block
from .run_folder import RunFolder

# Others wait in an exchange while the first process writes a checkpoint.
TIMEOUT = timedelta(minutes=30)
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WholeModel:
    """Each process holds the whole model (`--shard dp`, or one process alone)."""

    def place(self, model: nn.Module, workers: Workers) -> nn.Module:
        """The model where it will be trained."""
        return model.to(workers.device)

    def checkpoint(self, folder: RunFolder) -> Path | None:
        """The last whole checkpoint, or None."""
        return folder.checkpoint if folder.checkpoint.is_file() else None

    def save(self, folder: RunFolder, workers: Workers, **objects: Any) -> None:
        """Write a checkpoint of these objects, whole or not at all, as `gradlr.save`."""
        if workers.is_first:
            save(folder.checkpoint, **objects)

    def gather(self, model: nn.Module, workers: Workers, skeleton: Callable[[], nn.Module]) -> nn.Module | None:
        """The model with all its weights, on the first process; None on the others."""
        return model if workers.is_first else None


class ShardedModel:
    """Each process holds a shard of every parameter and of its state (`--shard fsdp`, FSDP2); methods as in `WholeModel`."""

    def place(self, model: nn.Module, workers: Workers) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh  # takes a while

        return shard_by_block(model, init_device_mesh(torch.device(workers.device).type, (workers.size,)))

    def checkpoint(self, folder: RunFolder) -> Path | None:
        return folder.shards if is_folder(folder.shards) else None

    def save(self, folder: RunFolder, workers: Workers, **objects: Any) -> None:
        save(folder.shards, **objects)

    def gather(self, model: nn.Module, workers: Workers, skeleton: Callable[[], nn.Module]) -> nn.Module | None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)  # all of them on the first process, none elsewhere
        if not workers.is_first:
            return None
        gathered = skeleton()
        gathered.load_state_dict(weights)
        if hasattr(model, "generation_config"):  # of the model's folder, which the skeleton has not read
            gathered.generation_config = model.generation_config
        return gathered


class Workers:
    """One process that trains alone; what several do otherwise, `JoinedWorkers` says.

    Args:
        device: Of this process.

    Attributes:
        size: Number of processes.
        rank: Of this one.
        neighbours: Number of processes on this machine.
        is_restarted: Whether torchrun has started this process in the place of one that failed.
        attach_options: What `gradlr.attach` needs to know of the others.
        holding: Which part of the model each process holds.
    """

    size, rank, neighbours, is_restarted = 1, 0, 1, False
    attach_options: Mapping[str, Any] = {}
    holding: WholeModel | ShardedModel = WholeModel()

    def __init__(self, device: str) -> None:
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Print a text on the first process."""
        if self.is_first:
            print(text, flush=True)

    def run_on_first(self, work: Callable[[], object]) -> None:
        """Let the first process do something that the others wait for; where it fails, all end."""
        work()

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raise a ParallelError where facts by their names differ between processes."""

    def common_signal(self, signals: list[int]) -> int | None:
        """The signal that ends the run for all at this step; None where no process has received one."""
        return signals[0] if signals else None

    def sum(self, numbers: Tensor) -> Tensor:
        """Sums over all processes of a tensor of any shape."""
        return numbers

    def loss_factors(self, share: float, accumulate: int) -> tuple[float, float]:
        """By what to multiply the mean loss of a micro-batch before it is shown, and after that before backward.

        Args:
            share: Of the step's tokens, of all processes, that the micro-batch learns.
            accumulate: Micro-batches a step.
        """
        return 1.0, 1.0 if accumulate == 1 else share


class JoinedWorkers(Workers):
    """Processes that torchrun has started."""

    def __init__(self, device: str, holding: WholeModel | ShardedModel) -> None:
        super().__init__(device)
        self._comm = Communicator(distributed.group.WORLD)
        self.size, self.rank = self._comm.size, self._comm.rank
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.is_restarted = _restarts() != "0"
        self.holding = holding
        self.attach_options = {"process_group": distributed.group.WORLD} if isinstance(holding, WholeModel) else {}

    def run_on_first(self, work: Callable[[], object]) -> None:
        with propagate_errors(self._comm):
            if self.is_first:
                work()
        self._comm.assert_same_on_all_ranks({})

    def require_same(self, facts: Mapping[str, object]) -> None:
        self._comm.assert_same_on_all_ranks({name: str(value) for name, value in facts.items()})

    def common_signal(self, signals: list[int]) -> int | None:
        self._comm.begin_collective()
        largest = torch.tensor(max(signals, default=0), device=self.device)
        self._comm.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest) or None

    def sum(self, numbers: Tensor) -> Tensor:
        sums = numbers.detach().to(self.device, torch.float64, copy=True)
        self._comm.all_reduce(sums)
        return sums

    def loss_factors(self, share: float, accumulate: int) -> tuple[float, float]:
        # The mean over processes and micro-batches of what is shown is the step's loss, and so are the gradients.
        return share * self.size * accumulate, 1 / accumulate


@contextmanager
def join(shard: str | None, device: str) -> Iterator[Workers]:
    """The processes of this run, as long as it lasts.

    Args:
        shard: "dp" where each process holds the model, "fsdp" where each holds a shard, None for one that trains alone.
        device: "cuda" or "cpu"; with several processes, each takes the GPU of its number on its machine.

    Raises:
        ArgumentError: torchrun has started several and `shard` is None, or none and it is not; there are too few GPUs.
        ParallelError: the others, or their launcher, cannot be reached.
    """
    if shard is None:
        count = os.environ.get("WORLD_SIZE", "")
        if count.isdecimal() and int(count) > 1:
            raise ArgumentError(
                f"torchrun has started {count} processes, which would each train alone and overwrite each other: add --shard dp, "
                "or --shard fsdp where a GPU is too small for the model"
            )
        require_device(device)
        yield Workers(device)
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise ArgumentError(
            f"--shard {shard} needs several processes, and {missing[0]} is not set: start them with "
            f"torchrun --standalone --nproc-per-node GPUS -m gradlr finetune ... --shard {shard}"
        )
    own = _own_device(device)
    require_device(own)
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps its store when it starts processes again, and gloo would look for the dead in it.
        own_store = distributed.PrefixStore(f"gradlr attempt {_restarts()}", store)
        backend = "nccl" if own.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, store=own_store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ParallelError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error
    try:
        yield JoinedWorkers(own, WholeModel() if shard == "dp" else ShardedModel())
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise ParallelError(f"the other processes, or torchrun itself, cannot be reached any more: {reason}") from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _own_device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ArgumentError(f"--device {device}: each process takes the GPU of its number; give --device cuda, or leave it out")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ArgumentError(f"process {number} of this machine finds {count} GPUs: give torchrun a smaller --nproc-per-node")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def _restarts() -> str:
    """How often torchrun has started the processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
