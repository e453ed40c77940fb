"""export_lora(): from two sets of weights to an adapter's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint.atomic import write_atomically, write_folder_atomically
from ...errors import ArgumentError
from ...linalg import svd_lowrank
from ...ranks import require_rank, resolve_rank
from ...tensors import full_precision
from .compare import compare
from .plan import AdapterPlan, adapter_config, plan_adapter
from .report import LoraLayer, LoraReport

DEFAULT_RANK = 32
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."
# An exact decomposition takes 0.03 s at 256 x 256 and 3.4 s at 512 x 512 (two CPU cores, torch 2.13); a randomized one of rank 32
# 0.15 s at 2048 x 2048.
_EXACT_SIZE = 256
# Halko et al. 2011, section 4.2 and 4.5: 5 to 10 columns more than wanted, and power steps where the spectrum decays slowly.
_OVERSAMPLING = 10
_POWER_STEPS = 4


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
    are exact: in `lora_bias` where each of the layers has one, else as peft's `bias="lora_only"`, which peft writes into the
    base model, so that disabling the adapter does not take them back. What no LoRA can hold (embeddings, norms, convolutions,
    tied weights) is stored exactly with its whole module in `modules_to_save`, a tied weight once per module: peft keeps the
    tie between an embedding and a head, and unties others. What did not change is left out.

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
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; pass the fine-tuned torch.nn.Module")
    require_rank("rank", rank)
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype={dtype}: use torch.float32, torch.bfloat16 or torch.float16")
    path = Path(path)
    require_free(path)
    state, base, changed = compare(model, base_state)
    plan = plan_adapter(model, changed, (save,) if isinstance(save, str) else tuple(save))
    if not plan.targets and not plan.saved:
        why = next((f"; {name!r}: {reason}" for name, reason in plan.left_out.items()), ": no parameter differs from base_state")
        raise ArgumentError(f"there is nothing to export{why}")
    layers = {name: _low_rank(name, plan, state, base, rank, dtype) for name in plan.targets}
    tensors = {name: tensor for _, own in layers.values() for name, tensor in own.items()}
    tensors |= {name: value for name, value in state.items() if name.startswith(tuple(f"{module}." for module in plan.saved))}
    saved = {module: sum(state[name].nbytes for name in state if name.startswith(f"{module}.")) for module in plan.saved}
    config = adapter_config(plan, model, {name: layer.rank for name, (layer, _) in layers.items()})
    config |= {"task_type": task_type, "base_model_name_or_path": base_model_name or config["base_model_name_or_path"]}
    # A copy of each: tied weights share memory, which safetensors does not store.
    placed = {_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    weights, text = serialize(placed, metadata={"format": "pt"}), json.dumps(config, indent=2).encode()

    def fill(folder: Path) -> None:
        write_atomically(folder / _WEIGHTS, lambda file: file.write(weights))
        write_atomically(folder / _CONFIG, lambda file: file.write(text))

    write_folder_atomically(path, fill)
    whole_bytes = sum({state[name].data_ptr(): state[name].nbytes for name in changed}.values())
    rows = tuple(layer for layer, _ in layers.values())
    return LoraReport(path, rows, saved, plan.left_out, len(state) - len(changed), len(weights), whole_bytes)


def require_free(path: Path) -> None:
    """Raise an ArgumentError unless `path` can become an adapter's folder: absent, empty, or holding only an earlier adapter."""
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"path={str(path)!r} is a file; give a folder")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in (_WEIGHTS, _CONFIG)) if path.exists() else []
    if others:
        raise ArgumentError(f"path={str(path)!r} holds {others[0]!r}, which is no part of an adapter: give another folder")


def _safetensors() -> Callable[..., bytes]:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ArgumentError("export_lora writes with safetensors, which is not installed: pip install 'gradlr[lora]'") from error
    return save


def _low_rank(
    name: str, plan: AdapterPlan, state: dict[str, Tensor], base: dict[str, Tensor], rank: int | float, dtype: torch.dtype | None
) -> tuple[LoraLayer, dict[str, Tensor]]:
    """One layer's A, B and changed bias, under the names that peft gives them."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    delta = _difference(state[weight], base[weight])
    delta = delta.mT if plan.targets[name] else delta
    # Where only the bias changed, the least that peft takes.
    r = resolve_rank(rank, min(delta.shape)) if delta.any() else 1
    with full_precision(delta.device):
        a, b = (factor.to(dtype or delta.dtype) for factor in factorize(delta, r))
        rest = delta - b.to(delta.dtype) @ a.to(delta.dtype)
    own = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if plan.bias_form == "lora_bias":
        own[f"{name}.lora_B.bias"] = _difference(state[bias], base[bias])
    elif plan.bias_form == "base_layer" and bias in state:
        own[f"{name}.base_layer.bias"] = state[bias]
    size = sum(tensor.nbytes for tensor in own.values())
    return LoraLayer(name, tuple(delta.shape), r, _norm(delta), _norm(rest), size), own


def factorize(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B A of the given rank, A and B of equal size.

    Args:
        difference: ΔW, shape (m, n), float32 or float64, finite.
        rank: r, in [1, min(m, n)].

    Returns:
        A, (r, n), and B, (m, r), in ΔW's dtype: exact where ΔW is small or r is a good part of min(m, n), else by randomized
        subspace iteration from a fixed seed.

    Source: Eckart and Young 1936; Halko, Martinsson, Tropp 2011, arXiv 0909.4061.
    """
    smaller = min(difference.shape)
    if smaller <= _EXACT_SIZE or 2 * (rank + _OVERSAMPLING) > smaller:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        v = vh.mT
    else:
        generator = torch.Generator(difference.device).manual_seed(0)
        u, s, v = svd_lowrank(difference, rank + _OVERSAMPLING, power_steps=_POWER_STEPS, generator=generator)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).mT, u[:, :rank] * root


def _difference(value: Tensor, base: Tensor) -> Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.to(dtype) - base.to(value.device, dtype)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
