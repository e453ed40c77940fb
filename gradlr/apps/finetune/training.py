"""TRL's SFTTrainer with gradlr for an optimizer and a head without logits; what a step shows, and an end that loses nothing."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
import trl
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from ...errors import CheckpointError, NonFiniteError
from ...integrations.accelerate import unwrap
from ...integrations.transformers import Trainer
from ...params.kinds import MATRIX
from ...report.summary import format_bytes
from ..free_memory import peak_memory
from .run_folder import RunFolder

# A loss that is not finite may be one bad batch; so many in a row are a run that has diverged.
MOST_SKIPPED_IN_A_ROW = 5


class Finetuner(Trainer, trl.SFTTrainer):
    """TRL's supervised fine-tuning with the model's own loss, which `chunk_head_` has made one without logits.

    Args:
        run_folder: Where it keeps its checkpoints, each marked when it is whole.
        args, kwargs: As for `gradlr.integrations.transformers.Trainer`.
    """

    def __init__(self, run_folder: RunFolder, *args: Any, **kwargs: Any) -> None:
        self.run_folder = run_folder
        # Of the steps since the last entry of the log.
        self._start, self._tokens = 0.0, 0
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Bar)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken."""
        return self.state.global_step >= self.state.max_steps > 0

    def set_lr(self, lr: float) -> None:
        """The peak learning rate, before training begins."""
        self.args.learning_rate, self._options = lr, {**(self._options or {}), "lr": lr}

    def train_or_go_on(self) -> None:
        """Take the steps that are left, from the last checkpoint if there is one; the model is then without gradlr's hooks."""
        last = self.run_folder.last
        if last is not None:
            self.args.eval_on_start = False
            self.state = self._readable_state(last)
            if self.is_finished:  # transformers would take one more
                return self._load_from_checkpoint(str(last))
        self.train(resume_from_checkpoint=None if last is None else str(last))
        unwrap(self.optimizer).detach()

    def _readable_state(self, last: Path) -> transformers.TrainerState:
        """The state in a checkpoint all of whose files can be read."""
        try:
            state = transformers.TrainerState.load_from_json(str(last / "trainer_state.json"))
            for file in last.glob("*.safetensors"):
                with safetensors.safe_open(file, "pt"):
                    pass
            for file in last.glob("*.pt"):
                torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{last}: cannot be read ({reason}): --overwrite starts anew") from error
        return state

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # TRL's own multiplies with the head's weight by itself, past what captures the head's gradient and past int8 codes.
        return transformers.Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._start = self._start or time.perf_counter()
        self._tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._start, self._tokens = 0.0, 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.optimizer is not None:
            opt, memory = unwrap(self.optimizer), peak_memory(self.args.device)
            logs["rank"] = max((record.rank for record in opt.records if record.plan.kind == MATRIX), default=0)
            logs["skipped"] = opt.skipped
            logs["tokens_per_second"] = round(self._tokens / (time.perf_counter() - self._start)) if self._start else 0
            logs |= {} if memory is None else {"peak_memory": memory}
            self._start, self._tokens = 0.0, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.run_folder.mark_whole(self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: it would speak of a model on the hub."""


class StopSaved(transformers.TrainerCallback):
    """A signal ends the run after the step that it finds under way, with everything saved; so does a loss that stays non-finite.

    Args:
        trainer: Of the run.
        signals: Those that came, as of `deferred_signals`.
    """

    def __init__(self, trainer: Finetuner, signals: list[int]) -> None:
        self._trainer, self._signals = trainer, signals
        self._skipped = self._in_a_row = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = len(self._trainer.train_dataset)
        self._trainer.accelerator.print(
            f"going on from step {state.global_step} of {state.max_steps}"
            if state.global_step
            else f"{state.max_steps} steps on {rows:,} sequences",
            flush=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        skipped = unwrap(self._trainer.optimizer).skipped
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(f"{self._in_a_row} steps in a row had a loss or a gradient that is not finite")
        if self._is_stopped():
            control.should_save = control.should_training_stop = True

    def _is_stopped(self) -> bool:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return bool(self._signals)
        if self._signals:
            accelerator.set_trigger()
        if accelerator.check_trigger() and not self._signals:
            self._signals.append(signal.SIGTERM)  # another process was told to stop
        return bool(self._signals)


class _Bar(ProgressCallback):
    """transformers' bar, with what was logged last beside it in place of lines above it."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """One bar is enough."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"validation loss {logs['eval_loss']:.4f} after step {state.global_step}")
        elif "loss" in logs:
            held = f", {format_bytes(logs['peak_memory'])}" if "peak_memory" in logs else ""
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, rank {logs['rank']}, {logs['tokens_per_second']:,} tokens/s{held}, "
                f"lr {logs['learning_rate']:.2e}"
            )
