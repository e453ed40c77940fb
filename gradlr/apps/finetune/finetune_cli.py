"""The command: check, train or go on, and write what was learned."""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState

from ...checkpoint.atomic import write_folder_atomically
from ...errors import ArgumentError, GradlrError, NonFiniteError
from ...integrations.chunked_head import chunk_head_
from ...layers.quantize import dequantize_, quantize_
from ...ranks import require_rank
from ...report.summary import format_bytes
from ..estimate import Estimate
from ..find_lr import find_lr
from ..free_memory import available_bytes
from ..lora import export_lora
from ..lora.export import require_free
from ..signals import deferred_signals
from .language import Language
from .run_folder import RunFolder, require_writable
from .task import Task
from .training import Finetuner, StopSaved


def run(arguments: argparse.Namespace) -> int:
    """Check everything, train or go on, write the model.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM; the same command then goes on.

    Raises:
        GradlrError: something is missing, wrong or too large, before any work; or training diverged.
    """
    datasets.disable_progress_bars()
    folder = RunFolder(arguments.out)
    try:
        task = Task(arguments, folder.checkpoints)
        need = _required_memory(task)
        # What torchrun starts again goes on.
        is_overwritten = arguments.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        # Two checkpoints while one replaces the other, and the model.
        needed = 0 if need is None else 3 * need.weights + 2 * need.state
        _require_outside(arguments)
        folder.check(task.settings(), is_overwritten=is_overwritten, needed=needed)
        _check_lora(arguments)
        known = "cannot be counted for this model" if need is None else f"about {_described(need)}"
        PartialState().print(f"{task.describe()}\nmemory {known}", flush=True)
        return _run(task, folder, _trainer(task, folder), is_overwritten)
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from the last checkpoint, if there is one.", flush=True)
        return 130
    except torch.OutOfMemoryError as error:
        raise GradlrError(f"{str(error).splitlines()[0]} To need less: {', '.join(_advice(task))}") from error
    except OSError as error:
        raise GradlrError(f"{error}: training stopped. {folder.last or 'No checkpoint'} is whole") from error
    finally:
        folder.close()


def _run(task: Task, folder: RunFolder, trainer: Finetuner, is_overwritten: bool) -> int:
    state = PartialState()
    state.wait_for_everyone()  # all have seen the folder as it was
    if state.is_main_process:
        folder.open(task.settings(), is_overwritten=is_overwritten)
    state.wait_for_everyone()
    trainer.set_lr(_found_lr(task, folder, trainer) if task.arguments.lr == "auto" else task.arguments.lr)
    with deferred_signals(signal.SIGINT, signal.SIGTERM) as signals:
        trainer.add_callback(StopSaved(trainer, signals))
        try:
            trainer.train_or_go_on()
        except NonFiniteError as error:
            raise _diverged(trainer, error) from error
    if not trainer.is_finished:
        done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        state.print(f"stopped after {done}, all of it saved in {folder.last}. The same command goes on from there.", flush=True)
        return 128 + signals[0]
    _finish(task, trainer)
    return 0


def _model(task: Task) -> Any:
    model = task.language.load(task.dtype, task.config.seed)
    try:
        if task.is_chunked:
            chunk_head_(model)
    except ArgumentError as error:  # what it does to its logits is seen on real weights alone
        PartialState().print(f"note: {error}. The loss is that of whole logits")
        task.is_chunked = False
        _required_memory(task)
    return quantize_(model) if task.arguments.weights == "int8" else model


def _trainer(task: Task, folder: RunFolder) -> Finetuner:
    """With weights loaded and data tokenized; nothing is written but folders, which go again where that fails."""
    model, made = _model(task), [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        trainer = Finetuner(
            folder, model=model, args=task.config, train_dataset=task.data, eval_dataset=task.held_out,
            processing_class=task.language.tokenizer, gradlr=task.options,
        )  # fmt: skip
        for dataset, path in ((trainer.train_dataset, task.arguments.data), (trainer.eval_dataset, "what is held out")):
            if not len(dataset):
                raise ArgumentError(f"{path}: in {task.config.max_length} tokens of each document nothing is to be learned")
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        for path in (folder.checkpoints, *made):
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, GradlrError | torch.OutOfMemoryError):
            raise
        raise ArgumentError(f"TRL's trainer cannot be made so: {str(error).strip().splitlines()[0]}") from error
    return trainer


def _found_lr(task: Task, folder: RunFolder, trainer: Finetuner) -> float:
    """By the range test, or what it has found when the run began."""
    if (found := folder.settings().get("found_lr")) is None:
        if task.config.activation_checkpointing:
            trainer.model.gradient_checkpointing_enable()
        batches = map(trainer._prepare_inputs, trainer.get_train_dataloader())
        tested = find_lr(trainer.model.train(), batches, lambda net, batch: trainer.compute_loss(net, batch), **task.options)
        print(f"range test: {tested}", flush=True)
        folder.note("found_lr", found := tested.lr)
    return found


def _finish(task: Task, trainer: Finetuner) -> None:
    arguments, folder = task.arguments, trainer.run_folder
    if arguments.weights == "int8":  # whole, they may not fit where they were trained
        dequantize_(trainer.model.to("cpu"))
    model = trainer.model
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None  # every process takes part
    if not trainer.is_world_process_zero():
        return

    def fill(part: Path) -> None:
        model.save_pretrained(part, state_dict=weights)
        task.language.tokenizer.save_pretrained(part)

    write_folder_atomically(folder.model, fill)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if len(losses) > 1:
        print(f"validation loss {losses[0]:.4f} before, {losses[-1]:.4f} after {trainer.state.global_step} steps")
    if skipped := max((entry.get("skipped", 0) for entry in trainer.state.log_history), default=0):
        print(f"steps left out for a loss or gradient that was not finite: {skipped}")
    print(f"wrote {folder.model}: load it with transformers.AutoModelForCausalLM.from_pretrained('{folder.model}')", flush=True)
    if arguments.lora_out is not None:
        # The first weights are read, or drawn, once more: meanwhile they took no memory.
        base = task.language.load(task.dtype, task.config.seed).state_dict()
        trained = Language(folder.model, None).load(task.dtype, 0) if trainer.is_fsdp_enabled else model
        report = export_lora(
            trained, base, arguments.lora_out, rank=arguments.lora_rank, task_type="CAUSAL_LM",
            base_model_name=str(arguments.model),
        )  # fmt: skip
        print(f"wrote {arguments.lora_out}:\n{report}", flush=True)


def _required_memory(task: Task) -> Estimate | None:
    """What one process needs, or None for a model that cannot be run without values; an ArgumentError where there is less."""
    arguments, config = task.arguments, task.config
    room, where = arguments.memory_limit, "--memory-limit is"
    if room is None:
        room, where = available_bytes(config.device), f"{config.device} has free"
    try:
        need = task.required_memory()
    except ArgumentError:
        raise
    except Exception:
        return None
    if room is not None and need.peak > room:
        advice = ", ".join(_advice(task))
        raise ArgumentError(f"the run needs about {_described(need)}; {where} {format_bytes(room)}. To need less: {advice}")
    return need


def _described(need: Estimate) -> str:
    parts = {"weights": need.weights, "state": need.state, "for a step": need.peak - need.weights - need.state}
    return f"{format_bytes(need.peak)}: {', '.join(f'{format_bytes(size)} {name}' for name, size in parts.items())}"


def _advice(task: Task) -> list[str]:
    arguments, size = task.arguments, task.config.per_device_train_batch_size
    advice = {
        f"--batch-size below {size} (with --accumulate)": size > 1,
        f"--length below {task.config.max_length}": True,
        "--checkpointing": not task.config.activation_checkpointing,
        "--capture adaptor": arguments.capture == "hook",
        "--weights int8": arguments.weights != "int8",
    }
    return [option for option, is_left in advice.items() if is_left]


def _require_outside(arguments: argparse.Namespace) -> None:
    """Of what a run reads nothing may lie where it writes, and --overwrite removes."""
    names = ("model", "tokenizer", "data", "validation_data")
    for name, path in ((name, getattr(arguments, name)) for name in names):
        if path is not None and arguments.out.is_dir() and arguments.out.resolve() in (path.resolve(), *path.resolve().parents):
            option = f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{option} {path} lies in --out {arguments.out}, which the run writes: give another folder")


def _check_lora(arguments: argparse.Namespace) -> None:
    if arguments.lora_out is None:
        return
    require_rank("--lora-rank", arguments.lora_rank)
    run, adapter = arguments.out.resolve(), arguments.lora_out.resolve()
    if adapter in (run, *run.parents) or run / "model" in (adapter, *adapter.parents):
        raise ArgumentError(f"--lora-out {arguments.lora_out}: the folder of --out {arguments.out} or its model: give another")
    require_free(arguments.lora_out)
    require_writable("--lora-out", arguments.lora_out)


def _diverged(trainer: Finetuner, error: NonFiniteError) -> GradlrError:
    kept = f"{trainer.run_folder.last} keeps the last good weights" if trainer.run_folder.last else "nothing was saved yet"
    return GradlrError(
        f"training stopped in step {trainer.state.global_step}: {error}. {kept}. Start anew (--overwrite) with a lower --lr than "
        f"{trainer.args.learning_rate:g}, a longer --warmup, or --max-grad-norm 1"
    )
