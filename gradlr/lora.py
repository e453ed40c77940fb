"""LoRA out: what training has changed, as a low-rank adapter that peft loads onto the base model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .describe import format_bytes
from .errors import ArgumentError, CheckpointError
from .files import write_atomically
from .gradient import TokenMap, linear_map
from .linalg import svd_lowrank
from .ranks import require_rank, resolve_rank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Up to this size of the smaller side the decomposition is exact; beyond it, randomized with spare directions and power steps.
_EXACT_SIZE, _SPARE, _POWER_STEPS = 1024, 8, 4


@dataclass(frozen=True)
class LoraLayer:
    """One layer of the adapter.

    Attributes:
        name: The module's.
        rank: r of its two factors.
        energy: Share of the squared Frobenius norm of the change that they hold: the rest, 1 − energy, is the squared relative
            error of the change.
    """

    name: str
    rank: int
    energy: float


@dataclass
class LoraReport:
    """What `export_lora` has written.

    Attributes:
        path: The adapter's folder.
        layers: The layers with factors.
        whole: Parameters that a LoRA cannot hold (embeddings, norms, biases, convolutions) and that are in the file whole.
        left_out: Changed parameters that are not in the file (`others="leave"`).
        adapter_bytes: Size of all tensors in the file.
        model_bytes: Size of the model's parameters.
    """

    path: Path
    layers: list[LoraLayer] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    adapter_bytes: int = 0
    model_bytes: int = 0

    def __str__(self) -> str:
        rows = [f"  {layer.name}: rank {layer.rank}, {layer.energy:.1%} of the change" for layer in self.layers]
        sizes = f"{format_bytes(self.adapter_bytes)}, {self.adapter_bytes / max(self.model_bytes, 1):.1%} of the model"
        lists = {"whole": self.whole, "left out": self.left_out}
        rest = [f"  {title}: {', '.join(names)}" for title, names in lists.items() if names]
        return "\n".join([f"{self.path}: {sizes}", *rows, *rest])


def export_lora(
    model: nn.Module,
    base_state: Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    rank: int | float = 16,
    others: str = "save",
    dtype: torch.dtype = torch.float32,
    base_model_name: str | None = None,
) -> LoraReport:
    """Write the difference between a trained model and its base as a peft adapter folder.

    `peft.PeftModel.from_pretrained(base_model, path)` loads it. Each changed Linear (transformers' Conv1D included) becomes the
    best approximation of its change of rank r, `B A`, by a singular value decomposition; unchanged ones are left out.

    Args:
        model: The trained model, itself, without peft around it.
        base_state: The base model's `state_dict()`: a copy from before training, or that of another model.
        path: A folder, made where missing; it may hold an earlier adapter, and nothing else.
        rank: r, an int (cut where a layer is smaller) or a fraction of min(m, n).
        others: What to do with changed parameters that a LoRA cannot hold: "save" puts them into the file whole (peft loads them
            over the base model's own, where `disable_adapter` does not undo them), "leave" leaves them out.
        dtype: Of the factors in the file.
        base_model_name: Written into the configuration, for those who load by name.

    Returns:
        Layers, ranks, captured energy and sizes; `print` shows them.

    Raises:
        ArgumentError: an option is out of range, `base_state` is no copy, safetensors is missing, or the folder holds other
            files.
        CheckpointError: `base_state` lacks a parameter or has it in another shape. Nothing was written.

    Source: Eckart and Young 1936, the best approximation of rank r; LoRA, arXiv 2106.09685, for the format.
    """
    save_file, folder = _safetensors(), Path(path)
    require_rank("rank", rank)
    if others not in ("save", "leave"):
        raise ArgumentError(f"others={others!r}: use 'save' or 'leave'")
    _require_free(folder)
    changes = _changes(model, base_state)
    report = LoraReport(folder, model_bytes=sum(parameter.nbytes for parameter in model.parameters()))
    layers = _targets(model, changes)
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        change = linear_map(module).oriented(changes.pop(f"{name}.weight"))
        layer, a, b = _factors(name, change, rank)
        report.layers.append(layer)
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": a.to(dtype), f"{_PREFIX}{name}.lora_B.weight": b.to(dtype)}
    (report.whole if others == "save" else report.left_out).extend(changes)
    if others == "save":
        tensors |= {_key_of(name, layers): model.get_parameter(name).detach() for name in changes}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    report.adapter_bytes = sum(value.nbytes for value in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, lambda file: file.write(save_file(tensors, {"format": "pt"})))
    text = json.dumps(_configuration(report, layers, base_model_name), indent=1) + "\n"
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
    return report


def _safetensors():
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ArgumentError("export_lora needs safetensors: pip install 'gradlr[lora]'") from error
    return save


def _require_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; an adapter is a folder")
    others = sorted({entry.name for entry in folder.iterdir()} - {WEIGHTS, CONFIG, "README.md"}) if folder.is_dir() else []
    if others:
        raise ArgumentError(f"{folder} holds {others[0]!r} and is no adapter's folder: give a new or empty one")


def _changes(model: nn.Module, base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # In float32 or wider; a tied weight under its first name only.
    if not isinstance(base_state, Mapping):
        raise ArgumentError(f"base_state is a {type(base_state).__name__}; give the state_dict() of the model before training")
    changes = {}
    for name, parameter in model.named_parameters():
        base = base_state.get(name)
        if base is None:
            raise CheckpointError(f"base_state lacks {name!r}: is it the state_dict() of the model before training?")
        if base.shape != parameter.shape:
            shapes = f"{tuple(base.shape)}, the trained model's {tuple(parameter.shape)}"
            raise CheckpointError(f"parameter {name!r} has shape {shapes} in base_state")
        if base.numel() and base.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
            raise ArgumentError(
                f"base_state shares its memory with the model ({name!r}), so it has been trained along: keep a copy from before "
                "training, such as copy.deepcopy(model.state_dict())"
            )
        wide = torch.promote_types(parameter.dtype, torch.float32)
        change = parameter.detach().to(wide) - base.to(parameter.device, wide)
        if change.any():
            changes[name] = change
    return changes


def _targets(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    # A weight that several modules share would change in one of them only.
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {
        name: module
        for name, module in model.named_modules()
        if f"{name}.weight" in changes and isinstance(linear_map(module), TokenMap) and uses[id(module.weight)] == 1
    }


def _factors(name: str, change: Tensor, rank: int | float) -> tuple[LoraLayer, Tensor, Tensor]:
    limit = min(change.shape)
    r = resolve_rank(rank, limit)
    if limit <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = torch.Generator(change.device).manual_seed(0)
        u, s, v = svd_lowrank(change, min(r + _SPARE, limit), power_steps=_POWER_STEPS, generator=generator)
        vh = v.mT
    root = s[:r].sqrt()
    energy = float(s[:r].double().square().sum() / torch.linalg.vector_norm(change, dtype=torch.float64).square())
    return LoraLayer(name, r, min(energy, 1.0)), root.unsqueeze(-1) * vh[:r], u[:, :r] * root


def _key_of(name: str, layers: Mapping[str, nn.Module]) -> str:
    # peft moves a layer with factors into `base_layer`.
    module, _, own = name.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{own}" if module in layers else f"{_PREFIX}{name}"


def _configuration(report: LoraReport, layers: Mapping[str, nn.Module], base_model_name: str | None) -> dict[str, Any]:
    largest = max((layer.rank for layer in report.layers), default=1)
    smaller = {layer.name: layer.rank for layer in report.layers if layer.rank != largest}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name,
        "task_type": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(linear_map(module).is_transposed for module in layers.values()),
        "target_modules": list(layers),
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
    }
