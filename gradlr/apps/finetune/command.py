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
from .fits import Need, available_bytes, require_fit, required_bytes
from .folder import RunFolder, require_writable
from .launch import joined
from .loop import Run, train
from .options import add_arguments
from .processes import Processes
from .progress import peak_memory
from .task import Task

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check everything, train or go on, write the model.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM; the same command then goes on.

    Raises:
        GradlrError: something is missing, wrong or too large, before any work; training diverged; or another process is gone.
    """
    try:
        with joined(arguments.shard, arguments.device) as processes:
            return _run(arguments, processes)
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from the last checkpoint, if there is one.", flush=True)
        return 130


def _run(arguments: argparse.Namespace, processes: Processes) -> int:
    task = Task.prepare(arguments, processes)
    folder = RunFolder(arguments.out, is_writer=processes.is_first)
    need = required_bytes(
        task.language, batch_size=arguments.batch_size // processes.size, length=task.data.length, dtype=task.dtype,
        is_checkpointed=arguments.checkpointing, options=task.options, is_exchanging=arguments.shard == "dp",
        shards=processes.size if arguments.shard == "fsdp" else 1,
    )  # fmt: skip
    _require_fit(need, task)
    settings = task.settings()
    processes.require_same(settings)
    # What torchrun starts again goes on.
    is_overwritten = arguments.overwrite and not processes.is_restarted

    def check() -> None:
        # Two checkpoints while one replaces the other, and the model.
        folder.check(settings, is_overwritten=is_overwritten, needed=need.shards * (3 * need.weights + 2 * need.state))
        _check_lora(arguments)

    processes.by_first(check)
    processes.say(task.tale(need))
    try:
        started = task.start(folder)
        processes.by_first(partial(folder.open, settings, is_overwritten=is_overwritten))
        return _train(started, task)
    except torch.OutOfMemoryError as error:
        advice = ", ".join(_advice(task))
        raise GradlrError(f"{str(error).splitlines()[0]} To need less: {advice}") from error
    except OSError as error:
        kept = folder.shards if arguments.shard == "fsdp" else folder.checkpoint
        raise GradlrError(f"{error}: training stopped. {kept} is whole, if it was there before") from error
    finally:
        folder.close()


def _train(run: Run, task: Task) -> int:
    plan, processes = run.plan, run.processes
    if (before := run.restore()) is not None:
        processes.say(f"going on from step {run.done.step} of {plan.steps} ({run.checkpoint})")
        if before != processes.size:
            tale = "the batches are the same; sums are rounded in another order, and dropout draws other numbers"
            processes.say(f"note: {before} processes took the steps so far, {processes.size} go on: {tale}")
    if (number := train(run)) is not None:
        done = f"step {run.done.step} of {plan.steps}"
        processes.say(f"stopped after {done}, all of it saved in {run.checkpoint}. The same command goes on from there.")
        return 128 + number
    _finish(run, task)
    return 0


def _require_fit(need: Need, task: Task) -> None:
    processes, limit = task.processes, task.arguments.memory_limit
    room = available_bytes(processes.device)
    where = "--memory-limit is" if limit is not None else f"{processes.device} has free"
    if processes.size > 1:
        where = f"{processes.size} processes run, for each of which {where}"
    if room is not None and torch.device(processes.device).type == "cpu":
        room //= processes.neighbours
    require_fit(need, room if limit is None else limit, where, _advice(task))


def _advice(task: Task) -> list[str]:
    arguments, size = task.arguments, task.arguments.batch_size
    advice = [f"--batch-size below {size} (with --accumulate)"] if size > task.processes.size else []
    advice += [f"--length below {task.data.length}"]
    advice += [] if arguments.checkpointing else ["--checkpointing"]
    advice += [] if arguments.capture == "one_sided" else ["--capture one_sided"]
    return advice + ([] if arguments.bf16 else ["--bf16"])


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


def _finish(run: Run, task: Task) -> None:
    arguments, done, processes = task.arguments, run.done, run.processes
    run.opt.detach()
    model = processes.whole(run.model, lambda: task.language.skeleton(task.dtype))
    if model is None:  # another process writes it
        return
    how = run.folder.write_model(lambda folder: task.language.save(model, folder))
    lines = [f"validation loss {done.validation[0][1]:.4f} before, {done.validation[-1][1]:.4f} after {done.step} steps"]
    memory = peak_memory(processes.device)
    held = "" if memory is None else f", peak memory {format_bytes(memory)}"
    lines += [f"{done.tokens / done.seconds:,.0f} tokens/s{held}" if done.seconds else ""]
    lines += [f"steps left out for a loss or gradient that was not finite: {run.opt.skipped}"] if run.opt.skipped else []
    lines += [f"wrote {run.folder.model}: load it with {how.format(folder=run.folder.model)}"]
    if arguments.lora_out is not None:
        # The first weights are read, or drawn, once more: meanwhile they took no memory.
        base = task.language.load(task.dtype, arguments.seed).state_dict()
        name = None if arguments.model == "builtin" else str(arguments.model)
        report = export_lora(
            model, base, arguments.lora_out, rank=arguments.lora_rank, task_type="CAUSAL_LM", base_model_name=name
        )
        lines += [f"wrote {arguments.lora_out}:", str(report)]
    processes.say("\n".join(line for line in lines if line))
