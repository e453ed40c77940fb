"""The task: data and model as the arguments name them, read and checked before any work."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ArgumentError
from .model import BuiltinModel, find_model
from .packing import PackedTokens, require_whole_sequence, split, steps_of_epochs
from .reading import read_documents
from .workers import Workers

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

# The arguments that decide the result as they are given. --checkpointing does not, and may be what a run that ran out of memory
# needs.
_DECISIVE = ("field", "validation", "batch_size", "accumulate", "lr", "rank", "momentum_rank", "capture", "max_grad_norm",
             "weight_decay", "bf16", "seed", "shard")  # fmt: skip


@dataclass
class Task:
    """What the arguments say, read and checked.

    Attributes:
        arguments: As they were given.
        workers: The processes that train it.
        language: The model, its weights still on the disk.
        data, held_out: To train and to validate on.
        counts: Documents in each.
    """

    arguments: argparse.Namespace
    workers: Workers
    language: BuiltinModel | PretrainedModel
    data: PackedTokens
    held_out: PackedTokens
    counts: tuple[int, int]

    @classmethod
    def prepare(cls, arguments: argparse.Namespace, workers: Workers) -> Task:
        """Read and check data, config and tokenizer.

        Raises:
            ArgumentError: the first thing that is wrong.
        """
        require_divisible(arguments.batch_size, workers.size)
        documents = read_documents(arguments.data, arguments.field)
        if arguments.validation_data is None and len(documents) < 2:
            raise ArgumentError(
                f"{arguments.data}: holds one document, and one more is needed to validate on: separate documents (blank lines "
                "in .txt, lines in .jsonl), or give --validation-data"
            )
        held_out = None if arguments.validation_data is None else read_documents(arguments.validation_data, arguments.field)
        language = find_model(arguments.model, arguments.tokenizer)
        length = arguments.length or language.default_length
        if language.positions is not None and length > language.positions:
            raise ArgumentError(f"--length {length}: {language.name} takes at most {language.positions} tokens")
        training = language.tokenize(documents, arguments.data)
        if held_out is None:
            ours, theirs = split(len(training), arguments.validation, arguments.seed)
            training, validating = [training[index] for index in ours], [training[index] for index in theirs]
        else:
            validating = language.tokenize(held_out, arguments.validation_data)
        data, held = (PackedTokens(part, length, language.padding) for part in (training, validating))
        require_whole_sequence(data, str(arguments.data))
        if not held.learned:
            where = arguments.validation_data or arguments.data
            raise ArgumentError(f"{where}: the documents to validate on hold nothing to learn")
        return cls(arguments, workers, language, data, held, (len(training), len(validating)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.arguments.bf16 else torch.float32

    @property
    def own_batch(self) -> int:
        """Sequences of a micro-batch in this process."""
        return self.arguments.batch_size // self.workers.size

    @property
    def step_size(self) -> int:
        """Sequences of a step in all processes."""
        return self.arguments.batch_size * self.arguments.accumulate

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.arguments.steps or steps_of_epochs(self.arguments.epochs, len(self.data), self.step_size)

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        warmup = self.arguments.warmup
        return round(warmup * self.steps) if warmup < 1 else min(round(warmup), self.steps)

    @property
    def options(self) -> dict[str, Any]:
        """For `gradlr.attach`, without those that name other processes."""
        arguments = self.arguments
        is_simple = arguments.accumulate == 1 and arguments.max_grad_norm is None and arguments.shard != "dp"
        names = ["lr", "momentum_rank", "capture", "max_grad_norm", "weight_decay", "seed"]
        names += [] if arguments.rank is None else ["rank"]
        return {"apply": "backward" if is_simple else "step", **{name: getattr(arguments, name) for name in names}}

    def settings(self) -> dict[str, Any]:
        """All that decides the result."""
        arguments = self.arguments
        files = {"data": arguments.data, "validation_data": arguments.validation_data}
        return {
            "model": self.language.identity(),
            **{name: None if path is None else _digest(path) for name, path in files.items()},
            "length": self.data.length, "steps": self.steps, "warmup": self.warmup,
            **{name: getattr(arguments, name) for name in _DECISIVE},
            "device": torch.device(arguments.device).type,
        }  # fmt: skip

    def describe(self, memory: object) -> str:
        """What is about to happen, in lines for people; `memory` is what the run needs, in words."""
        arguments, data, name, note = self.arguments, self.data, self.language.name, self.language.note
        scratch = f"{name} holds no weights: TRAINING FROM SCRATCH, from random ones"
        source = arguments.validation_data or f"drawn with --seed {arguments.seed}"
        share = f"{self.own_batch} of each {arguments.batch_size} sequences; for each of them, "
        several = (
            "" if arguments.shard is None else f"{self.workers.size} processes (--shard {arguments.shard}), each with {share}"
        )
        lines = [
            scratch if self.language.is_from_scratch else f"model {name}",
            f"note: {note}" if note else "",
            f"training on {self.counts[0]:,} documents: {data.size:,} tokens, {data.learned:,} of them learned, {len(data):,} "
            f"sequences of {data.length}",
            f"validating on {self.counts[1]:,} documents ({source}): {self.held_out.size:,} tokens",
            f"{self.steps} steps of {self.step_size} sequences ({self.steps * self.step_size / len(data):.2f} epochs), warm-up "
            f"{self.warmup}",
            f"{several}memory about {memory}",
        ]
        return "\n".join(line for line in lines if line)


def require_divisible(batch_size: int, count: int) -> None:
    """Raise an ArgumentError, with the nearest batch size, where the processes cannot share a batch evenly."""
    if batch_size % count:
        near = max(batch_size // count, 1) * count
        raise ArgumentError(
            f"--batch-size {batch_size} is that of all {count} processes together, and does not divide by {count}: give {near}"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
