"""export_lora(): from two sets of weights to an adapter's folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.apply_update import full_precision
from ...errors import ArgumentError
from ...ranks import require_rank, resolve_rank
from .compare import changed_names, difference, fitted_base, tensors_of
from .config import adapter_config
from .factors import factorize
from .folder import CONFIG, WEIGHTS, require_free, write_folder
from .plan import AdapterPlan, plan_adapter
from .report import LoraLayer, LoraReport, SavedModule

DEFAULT_RANK = 32
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."


@torch.no_grad()
def export_lora(
    model: nn.Module,
    base_state: Mapping[str, Tensor],
    path: str | Path,
    *,
    rank: int | float = DEFAULT_RANK,
    save: str | Sequence[str] = "*",
    dtype: torch.dtype | None = None,
    base_model_name: str | None = None,
    task_type: str | None = None,
) -> LoraReport:
    """Write the difference between a fine-tuned model and its base as a peft LoRA adapter.

    `peft.PeftModel.from_pretrained(base_model, path)` loads it. Each changed weight of an `nn.Linear` or transformers' Conv1D
    becomes its best approximation of rank r, W_base + B A, with lora_alpha = r; where biases of these layers changed, they
    are exact: in `lora_bias` where each of the layers has one, else as peft's `bias="lora_only"`. What no LoRA can hold
    (embeddings, norms, convolutions, tied weights) is stored exactly with its whole module in `modules_to_save`, a tied weight
    once per module as peft does it. What did not change is left out.

    For an input x, each low-rank layer is off by at most `layer.error · ‖x‖` of the report, `error = ‖ΔW − B A‖`
    (Frobenius) `= sqrt(1 - energy) ‖ΔW‖`; at full rank that is rounding.

    Args:
        model: The fine-tuned model, attached or not; not changed.
        base_state: The base model's `state_dict()`, on any device, in any floating dtype.
        path: The folder: absent, empty, or holding an earlier adapter only, which is replaced.
        rank: r, an int or a fraction of min(m, n); cut to min(m, n) layer by layer.
        save: Globs on the names of the parameters that may be stored with their whole module; `()` for none. Whole embeddings
            are large: `save=["*norm*", "*.ln_*"]` leaves them out, and the report says so.
        dtype: Of A and B; float32 where None (float64 for float64 weights). bfloat16 halves the file and costs about 1e-5 of
            the energy.
        base_model_name: For adapter_config.json; the name in the model's own config where None.
        task_type: peft's, such as "CAUSAL_LM"; it decides the class that `from_pretrained` returns.

    Returns:
        What was written: per layer rank, captured energy and bytes, the modules stored whole, and what was left out.

    Raises:
        ArgumentError: safetensors is not installed, an argument is out of range, `path` holds other things, `base_state` is the
            model's own memory, or nothing that an adapter can hold has changed. Nothing was written, here and below.
        CheckpointError: `base_state` lacks a parameter, has another one, or one of another shape.
        NonFiniteError: a weight holds NaN or infinity.
        OSError: the folder cannot be written; what stood there before is still there.
    """
    serialize = _safetensors()
    _check_arguments(model, rank, dtype)
    path, save = Path(path), (save,) if isinstance(save, str) else tuple(save)
    require_free(path)
    state = tensors_of(model)
    base = fitted_base(state, base_state)
    changed = changed_names(state, base)
    plan = plan_adapter(model, changed, save)
    if not plan.targets and not plan.saved:
        why = next((f"; {name!r}: {reason}" for name, reason in plan.left_out.items()), ": no parameter differs from base_state")
        raise ArgumentError(f"there is nothing to export{why}")
    tensors, layers = _low_rank(plan, state, base, rank, dtype)
    saved_tensors, saved = _whole(plan, state, changed)
    config = adapter_config(plan, model, {layer.name: layer.rank for layer in layers})
    config |= {"task_type": task_type, "base_model_name_or_path": base_model_name or config["base_model_name_or_path"]}
    weights = serialize(_placed(tensors | saved_tensors), metadata={"format": "pt"})
    write_folder(path, {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2).encode()})
    whole_bytes = sum({value.data_ptr(): value.nbytes for value in (state[name] for name in changed)}.values())
    return LoraReport(
        path, layers, saved, plan.left_out, _notes(config, plan), len(state) - len(changed), len(weights), whole_bytes
    )


def _safetensors():
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ArgumentError("export_lora writes with safetensors, which is not installed: pip install 'gradlr[lora]'") from error
    return save


def _check_arguments(model: nn.Module, rank: int | float, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; pass the fine-tuned torch.nn.Module")
    require_rank("rank", rank)
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype={dtype}: use torch.float32, torch.bfloat16 or torch.float16")


def _low_rank(
    plan: AdapterPlan, state: dict[str, Tensor], base: dict[str, Tensor], rank: int | float, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], tuple[LoraLayer, ...]]:
    tensors, layers = {}, []
    for name, is_transposed in plan.targets.items():
        weight = f"{name}.weight"
        delta = difference(state[weight], base[weight])
        delta = delta.mT if is_transposed else delta
        # Where only the bias changed, the least that peft takes.
        r = resolve_rank(rank, min(delta.shape)) if delta.any() else 1
        with full_precision(delta.device):
            factors = factorize(delta, r, dtype or delta.dtype)
        own = {f"{name}.lora_A.weight": factors.a, f"{name}.lora_B.weight": factors.b} | _bias(plan, name, state, base)
        size = sum(tensor.nbytes for tensor in own.values())
        layers.append(LoraLayer(name, tuple(delta.shape), r, factors.difference, factors.error, size))
        tensors |= own
    return tensors, tuple(layers)


def _bias(plan: AdapterPlan, name: str, state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    bias = f"{name}.bias"
    if plan.bias_form == "lora_bias":
        return {f"{name}.lora_B.bias": difference(state[bias], base[bias])}
    if plan.bias_form == "base_layer" and bias in state:
        return {f"{name}.base_layer.bias": state[bias]}
    return {}


def _whole(
    plan: AdapterPlan, state: dict[str, Tensor], changed: Iterable[str]
) -> tuple[dict[str, Tensor], tuple[SavedModule, ...]]:
    tensors, saved = {}, []
    for path in plan.saved:
        own = {name: value for name, value in state.items() if name.startswith(f"{path}.")}
        size = sum(value.nbytes for value in own.values())
        saved.append(SavedModule(path, tuple(name for name in changed if name in own), size))
        tensors |= own
    return tensors, tuple(saved)


def _placed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Tied weights share memory, which safetensors does not store.
    return {_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _notes(config: dict[str, Any], plan: AdapterPlan) -> tuple[str, ...]:
    notes = []
    if config["bias"] != "none":
        notes.append("biases are written into the base model on loading: disabling the adapter does not take them back")
    if len(set(plan.targets.values())) > 1:
        notes.append("Linear and Conv1D layers both: peft warns of fan_in_fan_out on loading, and sets it right itself")
    shared = Counter(weight.data_ptr() for weight in (getattr(plan.modules[path], "weight", None) for path in plan.saved)
                     if isinstance(weight, Tensor))  # fmt: skip
    if max(shared.values(), default=1) > 1 and "ensure_weight_tying" not in config:
        notes.append("peft unties weights that several modules share: the outputs are right, the loaded model holds them twice")
    return tuple(notes)
