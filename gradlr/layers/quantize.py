"""Layers whose weights are int8 codes, and back: what is trained is what is stored, and there is no other copy."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, AttachError
from ..linalg.int8 import PARTS, Int8Weight
from ..tensors import is_sharded

_Model = TypeVar("_Model", bound=nn.Module)

_KEYS = tuple(f"weight.{part}" for part in PARTS)
# Tokens of a layer's first input that are looked at, and power steps on them.
_TOKENS, _STEPS = 1024, 8


def quantize_(model: _Model, dtype: str = "int8", *, group: int = 64) -> _Model:
    """Turn the weights of all Linears and embeddings into int8 codes with one scale for each group of a row, in place.

    1.04 bytes a weight of a bfloat16 model in place of 2, in training as well: `gradlr.attach` trains the codes themselves.
    Forward and backward make a block of a weight in full precision at a time, and an update is rounded to codes
    stochastically; what rounding adds along the leading direction of a Linear's first input is taken back, by one number a
    row. Weights keep the dtype that they seemed to have, for activations and `model.to`; what modules share they go on sharing.
    `state_dict` has `weight.codes`, `weight.scales`, `weight.direction` and `weight.correction` in the place of `weight`, and
    `load_state_dict` takes these or a floating `weight`.

    Args:
        model: Has its weights, on its device; attach afterwards. Biases, norms, convolutions and all other layers stay as they
            are.
        dtype: "int8", nothing else so far.
        group: Entries of a row that share a scale, the last of a row may be fewer; smaller groups are finer and cost more.

    Returns:
        The same model.

    Raises:
        ArgumentError: `dtype` or `group` is another one, or the model has no such layer, or has values nowhere (meta device).
        AttachError: it is attached already, or sharded. Nothing was changed.
    """
    if dtype != "int8":
        raise ArgumentError(f'dtype={dtype!r}: weights can be "int8" so far')
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ArgumentError(f"group={group!r}: give the number of entries of a row that share a scale, such as 64")
    found = {name: layer for name, layer in model.named_modules() if _takes_codes(layer)}
    if not found:
        raise ArgumentError("the model has no Linear and no embedding with a floating weight: there is nothing to quantize")
    for name, layer in found.items():
        _require_free(name, layer.weight)
    _replace(model, {id(layer.weight) for layer in found.values()}, lambda weight: Int8Weight.of(weight, group))
    return model


def dequantize_(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Turn int8 weights into ordinary ones, in place: the model is what its class says, and saves as that.

    Args:
        model: Has been through `quantize_`; others stay as they are.
        dtype: Of the weights; what they seem to have where None.

    Returns:
        The same model.

    Raises:
        AttachError: it is attached; nothing was changed.
    """
    found = {name: weight for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    for name, weight in found.items():
        _require_free(name, weight)
    _replace(model, set(map(id, found.values())), lambda weight: weight.dequantized(dtype))
    return model


def float_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`model.state_dict()` with ordinary weights, as of `dequantize_`, while the model stays as it is.

    For `model.save_pretrained(folder, state_dict=gradlr.float_state_dict(model))`, and `safetensors`.

    Args:
        model: Any.
        dtype: Of the weights that are int8; what they seem to have where None.
    """
    made: dict[int, Tensor] = {}
    named = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if isinstance(weight, Int8Weight)}
    result: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = key.removesuffix(".codes")
        if name in named and key != name:
            weight: Any = named[name]
            result[name] = made[id(weight)] = made[id(weight)] if id(weight) in made else weight.detach().dequantized(dtype)
        elif key.rpartition(".")[0] not in named:
            result[key] = value
    return result


def _takes_codes(layer: nn.Module) -> bool:
    is_known = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Embedding) and layer.max_norm is None)
    weight = layer._parameters.get("weight") if is_known else None  # none of its own where it is parametrized
    return weight is not None and weight.is_floating_point() and weight.ndim == 2 and not isinstance(weight, Int8Weight)


def _require_free(name: str, weight: Any) -> None:
    if is_sharded(weight):
        raise AttachError(
            f"the weight of {name!r} is sharded (a DTensor): groups of codes cannot be spread over processes so far"
        )
    if weight.is_meta:
        raise ArgumentError(f"the weight of {name!r} has no values yet (meta device): load it first")
    if weight._post_accumulate_grad_hooks:
        raise AttachError(f"the weight of {name!r} is attached: call opt.detach() first, and attach again afterwards")


def _replace(model: nn.Module, chosen: set[int], make: Any) -> None:
    """Put new parameters in the places of those chosen, wherever modules share them; each old one is free at once."""
    made: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # of shared ones, so that no other gets their id
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or id(weight) not in chosen:
                continue
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(make(weight), requires_grad=weight.requires_grad)
            new = module._parameters[name] = made[id(weight)]
            if name == "weight":
                _switch_hooks(module, is_on=isinstance(new, Int8Weight))
            kept.append(weight)


def _switch_hooks(module: nn.Module, *, is_on: bool) -> None:
    _drop_hook(module._state_dict_hooks, _save_codes)
    _drop_hook(module._load_state_dict_pre_hooks, _load_codes)
    _drop_hook(module._forward_pre_hooks, _set_direction)
    if is_on:
        module.register_state_dict_post_hook(_save_codes)
        module.register_load_state_dict_pre_hook(_load_codes)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_set_direction)


def find_directions(model: nn.Module) -> None:
    """Let the next forward find the leading direction of every input of int8 weights that know none."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and isinstance(weight, Int8Weight) and not weight.direction.any():
            _drop_hook(module._forward_pre_hooks, _set_direction)
            module.register_forward_pre_hook(_set_direction)


def _drop_hook(hooks: dict[int, Any], hook: Any) -> None:
    for key in [key for key, known in hooks.items() if getattr(known, "hook", known) is hook]:
        del hooks[key]


@torch.no_grad()
def _set_direction(module: Any, inputs: tuple[Any, ...]) -> None:
    """Before the first forward: the leading direction of the layer's input, along which no rounding error is to stay.

    By a power iteration on some tokens; draws from a generator of its own, and the host waits for nothing.
    """
    if not inputs or not inputs[0].numel():
        return
    _drop_hook(module._forward_pre_hooks, _set_direction)
    x, weight = torch.atleast_2d(inputs[0].detach()).flatten(0, -2), module.weight
    x = x[:: -(-len(x) // _TOKENS)].float()
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    found = torch.randn(x.shape[1], 1, device=x.device, generator=torch.Generator(x.device).manual_seed(0))
    for _ in range(_STEPS):
        found = x.mT @ (x @ found)
        found /= torch.linalg.vector_norm(found).clamp(min=torch.finfo(x.dtype).tiny)
    # Another layer with the same weight may have had its first forward, and updates since.
    is_free = found.isfinite().all() & ~weight.correction.any()
    weight.direction.copy_(torch.where(is_free, found.to(weight.direction.dtype), weight.direction))


def _save_codes(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.pop(f"{prefix}weight", None)
    if isinstance(weight, Int8Weight):
        state.update({prefix + key: part for key, part in zip(_KEYS, weight.parts(), strict=True)})


def _load_codes(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    codes, scales, direction, correction = (state.pop(prefix + key, None) for key in _KEYS)
    if not any(part is None for part in (codes, scales, direction, correction)):
        group = _group_of(codes, scales, module.weight.group)
        state[f"{prefix}weight"] = Int8Weight(codes, scales, direction, correction, group)
        if direction.any():
            _drop_hook(module._forward_pre_hooks, _set_direction)


def _group_of(codes: Tensor, scales: Tensor, group: int) -> int:
    """The group of codes that were saved: the model's own where that explains the number of scales."""
    n, count = codes.shape[1], scales.shape[1]
    return group if -(-n // group) == count else -(-n // count)
