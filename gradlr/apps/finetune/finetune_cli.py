"""The command: check, train or go on, and write what was learned."""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial

import torch

from ...errors import ArgumentError, GradlrError
from ...report.summary import format_bytes
from ..lora import export_lora
from ..lora.export import require_free
from .fits import RequiredMemory, available_bytes, peak_memory, require_fit, required_memory
from .loop import Run, train
from .run_folder import RunFolder, require_writable
from .task import Task
from .workers import Workers, join


def run(arguments: argparse.Namespace) -> int:
    """Check everything, train or go on, write the model.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM; the same command then goes on.

    Raises:
        GradlrError: something is missing, wrong or too large, before any work; training diverged; or another process is gone.
    """
    try:
        with join(arguments.shard, arguments.device) as workers:
            return _run(arguments, workers)
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from the last checkpoint, if there is one.", flush=True)
        return 130


def _run(arguments: argparse.Namespace, workers: Workers) -> int:
    task = Task.prepare(arguments, workers)
    folder = RunFolder(arguments.out, is_writer=workers.is_first)
    need, settings = _required_memory(task), task.settings()
    workers.require_same(settings)
    # What torchrun starts again goes on.
    is_overwritten = arguments.overwrite and not workers.is_restarted
    # Two checkpoints while one replaces the other, and the model; of shards, those of all devices.
    shards = workers.size if arguments.shard == "fsdp" else 1
    file_bytes = shards * (3 * need.weights + 2 * (need.state or 0))
    workers.run_on_first(partial(folder.check, settings, is_overwritten=is_overwritten, needed=file_bytes))
    workers.run_on_first(partial(_check_lora, arguments))
    workers.print_once(task.describe(need))
    try:
        started = Run.start(task, folder)
        workers.run_on_first(partial(folder.open, settings, is_overwritten=is_overwritten))
        return _train(started)
    except torch.OutOfMemoryError as error:
        raise GradlrError(f"{str(error).splitlines()[0]} To need less: {', '.join(_advice(task))}") from error
    except OSError as error:
        kept = folder.shards if arguments.shard == "fsdp" else folder.checkpoint
        raise GradlrError(f"{error}: training stopped. {kept} is whole, if it was there before") from error
    finally:
        folder.close()


def _required_memory(task: Task) -> RequiredMemory:
    """What one process needs; an ArgumentError where there is less."""
    workers, arguments, limit = task.workers, task.arguments, task.arguments.memory_limit
    need = required_memory(
        task.language, batch_size=task.own_batch, length=task.data.length, dtype=task.dtype,
        is_checkpointed=arguments.checkpointing, options=task.options, is_exchanging=arguments.shard == "dp",
        shards=workers.size if arguments.shard == "fsdp" else 1,
    )  # fmt: skip
    room, where = limit, "--memory-limit is"
    if limit is None:
        room, where = available_bytes(workers.device), f"{workers.device} has free"
        if room is not None and torch.device(workers.device).type == "cpu":
            room //= workers.neighbours
    if workers.size > 1:
        where = f"{workers.size} processes run, for each of which {where}"
    require_fit(need, room, where, _advice(task))
    return need


def _advice(task: Task) -> list[str]:
    arguments, size = task.arguments, task.arguments.batch_size
    advice = {
        f"--batch-size below {size} (with --accumulate)": size > task.workers.size,
        f"--length below {task.data.length}": True,
        "--checkpointing": not arguments.checkpointing,
        "--capture one_sided": arguments.capture != "one_sided",
        "--bf16": not arguments.bf16,
    }
    return [option for option, is_left in advice.items() if is_left]


def _check_lora(arguments: argparse.Namespace) -> None:
    if arguments.lora_out is None:
        return
    if importlib.util.find_spec("safetensors") is None:
        raise ArgumentError("--lora-out needs safetensors, which is not installed: pip install 'gradlr[finetune]'")
    run, adapter = arguments.out.resolve(), arguments.lora_out.resolve()
    if adapter in (run, *run.parents) or run / "model" in (adapter, *adapter.parents):
        raise ArgumentError(f"--lora-out {arguments.lora_out}: the folder of --out {arguments.out} or its model: give another")
    require_free(arguments.lora_out)
    require_writable("--lora-out", arguments.lora_out)


def _train(run: Run) -> int:
    workers, steps, before = run.task.workers, run.task.steps, run.restore()
    if before is not None:
        workers.print_once(f"going on from step {run.done.step} of {steps} ({run.checkpoint})")
        if before != workers.size:
            consequence = "the batches are the same; sums are rounded in another order, and dropout draws other numbers"
            workers.print_once(f"note: {before} processes took the steps so far, {workers.size} go on: {consequence}")
    if (number := train(run)) is not None:
        done = f"step {run.done.step} of {steps}"
        workers.print_once(f"stopped after {done}, all of it saved in {run.checkpoint}. The same command goes on from there.")
        return 128 + number
    _finish(run)
    return 0


def _finish(run: Run) -> None:
    task, done, arguments = run.task, run.done, run.task.arguments
    run.opt.detach()
    model = task.workers.holding.gather(run.model, task.workers, lambda: task.language.skeleton(task.dtype))
    if model is None:  # another process writes it
        return
    how = run.folder.write_model(lambda folder: task.language.save(model, folder))
    memory = peak_memory(task.workers.device)
    held = "" if memory is None else f", peak memory {format_bytes(memory)}"
    print(f"validation loss {done.validation[0][1]:.4f} before, {done.validation[-1][1]:.4f} after {done.step} steps")
    print(f"{done.tokens / done.seconds:,.0f} tokens/s{held}")
    if run.opt.skipped:
        print(f"steps left out for a loss or gradient that was not finite: {run.opt.skipped}")
    print(f"wrote {run.folder.model}: load it with {how.format(folder=run.folder.model)}", flush=True)
    if arguments.lora_out is not None:
        # The first weights are read, or drawn, once more: meanwhile they took no memory.
        base = task.language.load(task.dtype, arguments.seed).state_dict()
        name = None if arguments.model == "builtin" else str(arguments.model)
        report = export_lora(
            model, base, arguments.lora_out, rank=arguments.lora_rank, task_type="CAUSAL_LM", base_model_name=name
        )
        print(f"wrote {arguments.lora_out}:\n{report}", flush=True)
