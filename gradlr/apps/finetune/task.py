"""The task: data, model and TRL's configuration as the arguments name them, read and checked before any weight is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import trl
from trl.chat_template_utils import get_training_chat_template

from ...errors import ArgumentError
from ..estimate import Estimate, estimate
from .language import Language
from .options import SHORT
from .reading import read_documents

# What decides nothing: where files are, how often something is shown or saved, and what a run that ran out of memory may need.
_FREE = {"model", "tokenizer", "out", "overwrite", "data", "validation_data", "memory_limit", "lora_out", "lora_rank", "further",
         "command", "activation_checkpointing", "save_steps", "eval_steps", "logging_steps", "report_to"}  # fmt: skip
# Options of SFTConfig that cannot act here, and what to give in their place.
_REFUSED = {
    "output_dir": "it is --out", "learning_rate": "give --lr", "gradient_checkpointing": "give --checkpointing",
    "per_device_eval_batch_size": "it is --batch-size", "optim": "gradlr is the optimizer", "loss_type": "it is the model's",
    "save_strategy": "give --save-every", "save_only_model": "a run goes on from all of a checkpoint",
    "load_best_model_at_end": "the last model is written", "push_to_hub": "nothing is sent", "deepspeed": "gradlr knows FSDP2",
}  # fmt: skip
# Of SFTConfig, besides what has a short name.
_DECISIVE = ("seed", "weight_decay", "max_grad_norm", "packing", "packing_strategy", "lr_scheduler_type")


class Task:
    """What the arguments ask for.

    Args:
        arguments: As `add_arguments` has them, and `further`, those for TRL.
        checkpoints: Where they go.

    Attributes:
        language: The model, its weights still on the disk.
        data, held_out: Documents to train and to validate on, in the form that TRL takes.
        config: TRL's.
        note: What else the user should know; empty for nothing.
        is_chunked: Whether the loss is found without logits.

    Raises:
        ArgumentError: the first thing that is wrong.
    """

    def __init__(self, arguments: argparse.Namespace, checkpoints: Path) -> None:
        self.arguments, self.note, self.is_chunked = arguments, "", True
        self.language = Language(arguments.model, arguments.tokenizer)
        data = self._read(arguments.data)
        if not 0 < arguments.validation < 1:
            raise ArgumentError(f"--validation {arguments.validation}: give a share between 0 and 1")
        if arguments.lr != "auto" and not 0 < arguments.lr < 1:
            raise ArgumentError(f"--lr {arguments.lr}: give a rate above 0 and below 1, or auto")
        if arguments.validation_data is not None:
            self.data, self.held_out = data, self._read(arguments.validation_data)
        elif len(data) < 2:
            raise ArgumentError(
                f"{arguments.data}: holds one document, and one more is needed to validate on: separate documents (blank lines "
                "in .txt, lines in .jsonl), or give --validation-data"
            )
        self.config = self._config(checkpoints, "messages" in data.column_names and self._marks_assistant())
        self.language.require_length(self.config.max_length)
        if arguments.lr == "auto" and self.config.world_size > 1:
            raise ArgumentError(f"--lr auto: {self.config.world_size} processes run; find the rate in one of them first")
        if arguments.validation_data is None:
            held_out = min(max(round(arguments.validation * len(data)), 1), len(data) - 1)
            parts = data.train_test_split(test_size=held_out, seed=self.config.seed)
            self.data, self.held_out = parts["train"], parts["test"]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights that are no codes."""
        return torch.float32 if self.arguments.weights == "float32" else torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        """For `gradlr.attach`."""
        arguments, config = self.arguments, self.config
        is_simple = config.gradient_accumulation_steps == 1 and not config.max_grad_norm and config.world_size == 1
        chosen = {} if arguments.rank is None else {"rank": arguments.rank}
        chosen |= {} if arguments.lr == "auto" else {"lr": arguments.lr}
        chosen |= {"max_grad_norm": config.max_grad_norm} if config.max_grad_norm else {}
        return {
            **chosen, "apply": "backward" if is_simple else "step", "momentum_rank": arguments.momentum_rank,
            "capture": arguments.capture, "weight_decay": config.weight_decay, "seed": config.seed,
        }  # fmt: skip

    def required_memory(self) -> Estimate:
        """What one process needs, by `gradlr.estimate`: one step with tensors that have shapes and no values."""
        config = self.config
        with torch.device("meta"):
            model = self.language.skeleton(self.dtype)
        try:
            found = estimate(
                model, batch_size=config.per_device_train_batch_size, tokens=config.max_length, device=config.device.type,
                checkpointing=config.activation_checkpointing, packed=config.packing and config.packing_strategy != "wrapped",
                weights="int8" if self.arguments.weights == "int8" else None, chunked_head=self.is_chunked, **self.options,
            )  # fmt: skip
        except ArgumentError as error:
            if not (self.is_chunked and str(error).startswith("chunk_head_")):
                raise
            self.note, self.is_chunked = f"{error}. The loss is that of whole logits", False
            return self.required_memory()
        # While the next micro-batch is at work, what the ones before have left waits.
        return dataclasses.replace(found, peak=found.peak + (found.gradients if config.gradient_accumulation_steps > 1 else 0))

    def settings(self) -> dict[str, Any]:
        """All that decides the result."""
        arguments, files = self.arguments, {"data": self.arguments.data, "validation_data": self.arguments.validation_data}
        model = [sorted((file.name, file.stat().st_size) for file in self.language.files), self.language.config.to_json_string()]
        named = {name for name, _, _ in SHORT.values()} | {*_DECISIVE, *self._given}
        values = {name: getattr(self.config, name) for name in sorted(named - _FREE)}
        return {
            "model": _digest(repr([model, len(self.language.tokenizer)]).encode()),
            **{name: None if path is None else _digest(path.read_bytes()) for name, path in files.items()},
            **{name: value for name, value in vars(arguments).items() if name not in _FREE},
            **{name: value if isinstance(value, int | float | str | None) else repr(value) for name, value in values.items()},
            "processes": self.config.world_size, "device": self.config.device.type,
        }  # fmt: skip

    def describe(self) -> str:
        """What is about to happen, for people."""
        arguments = self.arguments
        scratch = f"{arguments.model} holds no weights: TRAINING FROM SCRATCH, from random ones"
        source = arguments.validation_data or f"drawn with --seed {self.config.seed}"
        lines = [
            scratch if self.language.is_from_scratch else f"model {arguments.model}",
            f"note: {self.note}" if self.note else "",
            f"training on {len(self.data):,} documents, validating on {len(self.held_out):,} ({source})",
        ]
        return "\n".join(line for line in lines if line)

    def _read(self, path: Path) -> datasets.Dataset:
        documents = read_documents(path, self.arguments.field)
        self.language.require_template(documents, path)
        try:
            return datasets.Dataset.from_list([document.record for document in documents])
        except Exception as error:  # pyarrow's own
            reason = str(error).strip().splitlines()[0]
            raise ArgumentError(f"{path}: 'messages' have fields of different types: {reason}") from error

    def _marks_assistant(self) -> bool:
        """Whether the chat template marks what the assistant says, or TRL knows one in its place that does."""
        try:
            get_training_chat_template(self.language.tokenizer)
        except ValueError:
            self.note = "the chat template does not mark what the assistant says: every token of a conversation is learned"
            return False
        return True

    @property
    def _further(self) -> list[str]:
        """Options of SFTConfig under their own names."""
        pairs = [token.partition("=") for token in self.arguments.further]
        return [f"--{SHORT[name][0]}{equals}{value}" if name in SHORT else name + equals + value for name, equals, value in pairs]

    @property
    def _given(self) -> set[str]:
        """Names of the options of SFTConfig that are on the command line."""
        names = {token.lstrip("-").partition("=")[0].replace("-", "_") for token in self._further if token.startswith("--")}
        known = {field.name for field in dataclasses.fields(trl.SFTConfig)}
        return {name if name in known else name.removeprefix("no_") for name in names}

    def _config(self, checkpoints: Path, is_assistant_only: bool) -> trl.SFTConfig:
        for name in sorted(self._given & _REFUSED.keys()):
            raise ArgumentError(f"--{name}: finetune does not take it: {_REFUSED[name]}")
        parser = transformers.HfArgumentParser(trl.SFTConfig, allow_abbrev=False)
        parser.set_defaults(
            **{name: default for name, default, _ in SHORT.values() if default is not None},
            output_dir=str(checkpoints), max_length=self.language.default_length, packing=True, packing_strategy="wrapped",
            assistant_only_loss=is_assistant_only, lr_scheduler_type="cosine", max_grad_norm=0.0, bf16=False, seed=0,
            eval_strategy="steps", eval_on_start=True, report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        parser.error = _refuse
        try:
            (config,) = parser.parse_args_into_dataclasses(self._further, look_for_args_file=False)
        except (ValueError, ImportError, OSError) as error:
            raise ArgumentError(f"further options are those of trl.SFTConfig: {error}") from error
        config.per_device_eval_batch_size = config.per_device_train_batch_size
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "eval_steps", "logging_steps")
        if wrong := [name for name in counts if getattr(config, name) < 1]:
            raise ArgumentError(f"{wrong[0]}={getattr(config, wrong[0])}: it must be at least 1")
        if config.num_train_epochs <= 0 or ("max_steps" in self._given and config.max_steps < 1):
            raise ArgumentError(f"--epochs {config.num_train_epochs}, --steps {config.max_steps}: give more than 0")
        if not (0 <= config.seed < 2**32 and config.weight_decay >= 0 and config.max_grad_norm >= 0):
            values = f"--seed {config.seed}, --weight-decay {config.weight_decay}, --max-grad-norm {config.max_grad_norm}"
            raise ArgumentError(f"{values}: none may be negative, nor a seed 2³² or more")
        return config


def _refuse(message: str) -> NoReturn:
    raise ArgumentError(f"{message} (further options are those of trl.SFTConfig)")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
