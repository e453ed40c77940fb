"""The task: data and model as the arguments name them, read and checked before any work."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ArgumentError
from .fits import Need
from .folder import RunFolder
from .loop import Plan, Run
from .model import find_model
from .packing import PackedTokens, require_whole_sequence, split, steps_of_epochs
from .processes import Processes
from .reading import read_documents


@dataclass
class Task:
    """What the arguments say, read and checked.

    Attributes:
        arguments: As they were given.
        processes: That train it.
        language: The model, its weights still on the disk.
        data, held_out: To train and to validate on.
        counts: Documents in each.
        steps: Of the whole run.
        dtype: Of the weights.
    """

    arguments: argparse.Namespace
    processes: Processes
    language: Any
    data: PackedTokens
    held_out: PackedTokens
    counts: tuple[int, int]
    steps: int
    dtype: torch.dtype

    @classmethod
    def prepare(cls, arguments: argparse.Namespace, processes: Processes) -> Task:
        """Read and check data, config and tokenizer.

        Raises:
            ArgumentError: the first thing that is wrong.
        """
        _require_divisible(arguments.batch_size, processes.size)
        documents = read_documents(arguments.data, arguments.field)
        held_out = None
        if arguments.validation_data is not None:
            held_out = read_documents(arguments.validation_data, arguments.field)
        elif len(documents) < 2:
            raise ArgumentError(
                f"{arguments.data}: holds one document, and one more is needed to validate on: separate documents (blank lines "
                "in .txt, lines in .jsonl), or give --validation-data"
            )
        language = find_model(arguments.model, arguments.tokenizer)
        length = arguments.length or language.default_length
        if language.positions is not None and length > language.positions:
            raise ArgumentError(f"--length {length}: {language.name} takes at most {language.positions} tokens")
        language.check_vocabulary()
        tokens = language.tokenize(documents, arguments.data)
        if held_out is None:
            ours, theirs = split(len(tokens), arguments.validation, arguments.seed)
            training, validating = [tokens[index] for index in ours], [tokens[index] for index in theirs]
        else:
            training, validating = tokens, language.tokenize(held_out, arguments.validation_data)
        data, held = (PackedTokens(part, length, language.padding) for part in (training, validating))
        require_whole_sequence(data, str(arguments.data))
        if not held.learned:
            where = arguments.validation_data or arguments.data
            raise ArgumentError(f"{where}: the documents to validate on hold nothing to learn")
        size = arguments.batch_size * arguments.accumulate
        steps = arguments.steps or steps_of_epochs(arguments.epochs, len(data), size)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        return cls(arguments, processes, language, data, held, (len(training), len(validating)), steps, dtype)

    @property
    def options(self) -> dict[str, Any]:
        """For `gradlr.attach`, of one process."""
        arguments = self.arguments
        is_simple = arguments.accumulate == 1 and arguments.max_grad_norm is None and arguments.shard != "dp"
        options = {
            "lr": arguments.lr, "momentum_rank": arguments.momentum_rank, "capture": arguments.capture,
            "max_grad_norm": arguments.max_grad_norm, "weight_decay": arguments.weight_decay, "seed": arguments.seed,
            "apply": "backward" if is_simple else "step",
        }  # fmt: skip
        return options if arguments.rank is None else {**options, "rank": arguments.rank}

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        warmup = self.arguments.warmup
        return round(warmup * self.steps) if warmup < 1 else min(round(warmup), self.steps)

    def settings(self) -> dict[str, Any]:
        """All that decides the result. Checkpointing does not, and may be what a run that ran out of memory needs."""
        arguments = self.arguments
        given = ("validation", "batch_size", "accumulate", "lr", "rank", "momentum_rank", "capture", "max_grad_norm",
                 "weight_decay", "bf16", "seed")  # fmt: skip
        files = {"data": arguments.data, "validation_data": arguments.validation_data}
        return {
            "model": self.language.identity(),
            **{name: None if path is None else _digest(path) for name, path in files.items()},
            "field": arguments.field, "length": self.data.length, "steps": self.steps, "warmup": self.warmup,
            **{name: getattr(arguments, name) for name in given},
            "device": torch.device(arguments.device).type, "shard": arguments.shard,
        }  # fmt: skip

    def tale(self, need: Need) -> str:
        """What is about to happen."""
        arguments, data = self.arguments, self.data
        size = arguments.batch_size * arguments.accumulate
        scratch = f"{self.language.name} holds no weights: TRAINING FROM SCRATCH, from random ones\n"
        lines = scratch if self.language.is_from_scratch else f"model {self.language.name}\n"
        lines += f"note: {self.language.note}\n" if self.language.note else ""
        source = arguments.validation_data or f"drawn with --seed {arguments.seed}"
        return lines + (
            f"training on {self.counts[0]:,} documents: {data.size:,} tokens, {data.learned:,} of them learned, {len(data):,} "
            f"sequences of {data.length}\n"
            f"validating on {self.counts[1]:,} documents ({source}): {self.held_out.size:,} tokens\n"
            f"{self.steps} steps of {size} sequences ({self.steps * size / len(data):.2f} epochs), warm-up {self.warmup}\n"
            f"{self._processes_message()}memory about {need}"
        )

    def _processes_message(self) -> str:
        count, arguments = self.processes.size, self.arguments
        if arguments.shard is None:
            return ""
        share = f"{arguments.batch_size // count} of each {arguments.batch_size} sequences"
        return f"{count} processes (--shard {arguments.shard}), each with {share}; for each of them, "

    def start(self, folder: RunFolder) -> Run:
        """Load the weights, attach; everything is as it was before the first step."""
        arguments = self.arguments
        plan = Plan(
            self.steps, arguments.batch_size, arguments.accumulate, self.warmup, arguments.seed, self.processes.device,
            arguments.save_every, arguments.eval_every, arguments.log_every,
        )  # fmt: skip
        model = self.language.load(self.dtype, arguments.seed)
        if arguments.checkpointing:
            self.language.enable_checkpointing(model)
        model = self.processes.placed(model)
        opt = self.processes.attach(model, self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, plan.rate_factor)
        return Run(self.language, model, opt, scheduler, self.data, self.held_out, plan, folder, self.processes)


def _require_divisible(batch_size: int, count: int) -> None:
    if batch_size % count:
        near = max(batch_size // count, 1) * count
        raise ArgumentError(
            f"--batch-size {batch_size} is that of all {count} processes together, and does not divide by {count}: give {near}"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
