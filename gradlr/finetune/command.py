"""The command: its arguments, everything that is checked before any work, and what is written at the end."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attach import attach
from ..bench.environment import require_device
from ..describe import format_bytes
from ..errors import ArgumentError
from ..lora import export_lora
from ..lora.folder import require_free
from ..tracker import LossTracker
from .fits import Need, available_bytes, require_fit, required_bytes
from .folder import RunFolder
from .loop import Plan, Run, train
from .model import find_model
from .options import add_arguments
from .packing import PackedTokens, require_whole_sequence, split, steps_of_epochs
from .progress import peak_memory
from .reading import read_documents

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check everything, train or go on, write the model.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM; the same command then goes on.

    Raises:
        GradlrError: something is missing, wrong or too large, before any work; or training diverged.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        _say("\ninterrupted. The same command goes on from the last checkpoint, if there is one.")
        return 130


def _run(arguments: argparse.Namespace) -> int:
    require_device(arguments.device)
    task = _Task.prepare(arguments)
    folder = RunFolder(arguments.out)
    need = required_bytes(
        task.language, batch_size=arguments.batch_size, length=task.data.length, dtype=task.dtype,
        is_checkpointed=arguments.checkpointing, options=task.options,
    )  # fmt: skip
    _require_fit(need, arguments, task.data.length)
    settings = task.settings()
    # Two checkpoints while one replaces the other, and the model.
    folder.check(settings, is_overwritten=arguments.overwrite, needed=3 * need.weights + 2 * need.state)
    if arguments.lora_out is not None:
        require_free(arguments.lora_out)
    _say(task.tale(need))
    started = task.start(folder)
    folder.open(settings, is_overwritten=arguments.overwrite)
    try:
        if started.restore():
            _say(f"going on from step {started.done.step} of {started.plan.steps} ({folder.checkpoint})")
        if (number := train(started)) is not None:
            done = f"step {started.done.step} of {started.plan.steps}"
            _say(f"stopped after {done}, all of it saved in {folder.checkpoint}. The same command goes on from there.")
            return 128 + number
        _finish(started, task)
    finally:
        folder.close()
    return 0


@dataclass
class _Task:
    """What the arguments say, read and checked, with the model's weights still on the disk."""

    arguments: argparse.Namespace
    language: Any
    data: PackedTokens
    held_out: PackedTokens
    counts: tuple[int, int]
    steps: int
    dtype: torch.dtype

    @classmethod
    def prepare(cls, arguments: argparse.Namespace) -> _Task:
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
        return cls(arguments, language, data, held, (len(training), len(validating)), steps, dtype)

    @property
    def options(self) -> dict[str, Any]:
        """For `gradlr.attach`."""
        arguments = self.arguments
        is_simple = arguments.accumulate == 1 and arguments.max_grad_norm is None
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
            "device": torch.device(arguments.device).type,
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
            f"memory about {need}"
        )

    def start(self, folder: RunFolder) -> Run:
        """Load the weights, attach; everything is as it was before the first step."""
        arguments = self.arguments
        plan = Plan(
            self.steps, arguments.batch_size, arguments.accumulate, self.warmup, arguments.seed, arguments.device,
            arguments.save_every, arguments.eval_every, arguments.log_every,
        )  # fmt: skip
        model = self.language.load(self.dtype, arguments.seed).to(arguments.device)
        if arguments.checkpointing:
            self.language.enable_checkpointing(model)
        opt = attach(model, LossTracker(), **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, plan.rate_factor)
        torch.manual_seed(arguments.seed)
        return Run(self.language, model, opt, scheduler, self.data, self.held_out, plan, folder)


def _require_fit(need: Need, arguments: argparse.Namespace, length: int) -> None:
    limit, room = arguments.memory_limit, available_bytes(arguments.device)
    where = "--memory-limit is" if limit is not None else f"{arguments.device} has free"
    advice = [f"--batch-size below {arguments.batch_size} (with --accumulate)"] if arguments.batch_size > 1 else []
    advice += [f"--length below {length}"]
    advice += [] if arguments.checkpointing else ["--checkpointing"]
    advice += [] if arguments.capture == "one_sided" else ["--capture one_sided"]
    advice += [] if arguments.bf16 else ["--bf16"]
    require_fit(need, room if limit is None else limit, where, advice)


def _finish(run: Run, task: _Task) -> None:
    arguments, done = task.arguments, run.done
    run.opt.detach()
    how = run.folder.write_model(lambda folder: task.language.save(run.model, folder))
    lines = [f"validation loss {done.validation[0][1]:.4f} before, {done.validation[-1][1]:.4f} after {done.step} steps"]
    memory = peak_memory(arguments.device)
    held = "" if memory is None else f", peak memory {format_bytes(memory)}"
    lines += [f"{done.tokens / done.seconds:,.0f} tokens/s{held}" if done.seconds else ""]
    lines += [f"steps left out for a loss or gradient that was not finite: {run.opt.skipped}"] if run.opt.skipped else []
    lines += [f"wrote {run.folder.model}: load it with {how.format(folder=repr(str(run.folder.model)))}"]
    if arguments.lora_out is not None:
        # The first weights are read, or drawn, once more: meanwhile they took no memory.
        base = task.language.load(task.dtype, arguments.seed).state_dict()
        name = None if arguments.model == "builtin" else str(arguments.model)
        report = export_lora(
            run.model, base, arguments.lora_out, rank=arguments.lora_rank, task_type="CAUSAL_LM", base_model_name=name
        )
        lines += [f"wrote {arguments.lora_out}:", str(report)]
    _say("\n".join(line for line in lines if line))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)

