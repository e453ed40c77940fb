"""The command: check, train or go on, and write what was learned."""

from __future__ import annotations

import argparse
import importlib.util
import sys

import torch

from ..bench.environment import require_device
from ..describe import format_bytes
from ..errors import ArgumentError, GradlrError
from ..lora import export_lora
from ..lora.folder import require_free
from .fits import Need, available_bytes, require_fit, required_bytes
from .folder import RunFolder, require_writable
from .loop import Run, train
from .options import add_arguments
from .progress import peak_memory
from .task import Task

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
    task = Task.prepare(arguments)
    folder = RunFolder(arguments.out)
    need = required_bytes(
        task.language, batch_size=arguments.batch_size, length=task.data.length, dtype=task.dtype,
        is_checkpointed=arguments.checkpointing, options=task.options,
    )  # fmt: skip
    _require_fit(need, arguments, task.data.length)
    settings = task.settings()
    # Two checkpoints while one replaces the other, and the model.
    folder.check(settings, is_overwritten=arguments.overwrite, needed=3 * need.weights + 2 * need.state)
    _check_lora(arguments)
    _say(task.tale(need))
    try:
        started = task.start(folder)
        folder.open(settings, is_overwritten=arguments.overwrite)
        return _train(started, task)
    except torch.OutOfMemoryError as error:
        advice = ", ".join(_advice(arguments, task.data.length))
        raise GradlrError(f"{str(error).splitlines()[0]} To need less: {advice}") from error
    except OSError as error:
        raise GradlrError(f"{error}: training stopped. {folder.checkpoint} is whole, if it was there before") from error
    finally:
        folder.close()


def _train(run: Run, task: Task) -> int:
    plan, checkpoint = run.plan, run.folder.checkpoint
    if run.restore():
        _say(f"going on from step {run.done.step} of {plan.steps} ({checkpoint})")
    if (number := train(run)) is not None:
        done = f"step {run.done.step} of {plan.steps}"
        _say(f"stopped after {done}, all of it saved in {checkpoint}. The same command goes on from there.")
        return 128 + number
    _finish(run, task)
    return 0


def _require_fit(need: Need, arguments: argparse.Namespace, length: int) -> None:
    limit, room = arguments.memory_limit, available_bytes(arguments.device)
    where = "--memory-limit is" if limit is not None else f"{arguments.device} has free"
    require_fit(need, room if limit is None else limit, where, _advice(arguments, length))


def _advice(arguments: argparse.Namespace, length: int) -> list[str]:
    advice = [f"--batch-size below {arguments.batch_size} (with --accumulate)"] if arguments.batch_size > 1 else []
    advice += [f"--length below {length}"]
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
    arguments, done = task.arguments, run.done
    run.opt.detach()
    how = run.folder.write_model(lambda folder: task.language.save(run.model, folder))
    lines = [f"validation loss {done.validation[0][1]:.4f} before, {done.validation[-1][1]:.4f} after {done.step} steps"]
    memory = peak_memory(arguments.device)
    held = "" if memory is None else f", peak memory {format_bytes(memory)}"
    lines += [f"{done.tokens / done.seconds:,.0f} tokens/s{held}" if done.seconds else ""]
    lines += [f"steps left out for a loss or gradient that was not finite: {run.opt.skipped}"] if run.opt.skipped else []
    lines += [f"wrote {run.folder.model}: load it with {how.format(folder=run.folder.model)}"]
    if arguments.lora_out is not None:
        # The first weights are read, or drawn, once more: meanwhile they took no memory.
        base = task.language.load(task.dtype, arguments.seed).state_dict()
        name = None if arguments.model == "builtin" else str(arguments.model)
        report = export_lora(
            run.model, base, arguments.lora_out, rank=arguments.lora_rank, task_type="CAUSAL_LM", base_model_name=name
        )
        lines += [f"wrote {arguments.lora_out}:", str(report)]
    _say("\n".join(line for line in lines if line))


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
