"""Capture for stock DistributedDataParallel: both sketches of a matrix are gradients of small parameters, which it averages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import BackwardError
from .factored import Factored
from .hook import Claim
from .layers import AdaptedLayer, Capture, CapturedLayer, LayerCapture, adapted_class, autocasted, captures, unseen_by_checkpoints
from .linear_maps import linear_map
from .operator import Dense, GradientOperator

# Names of D and E in their layer; never in its state_dict.
_NAMES = ("gradlr_right_sketch", "gradlr_left_sketch")

Bases = tuple[Tensor, Tensor]


class BasesKeeper(Protocol):
    """Who says in which bases the gradients are wanted: the same tensors from a weight's update to the next one."""

    def bases(self, parameter: Tensor) -> Bases: ...


@dataclass(frozen=True)
class Registered(Capture):
    """How one weight's gradient is sketched.

    Attributes:
        right_sketch: D (m, r), whose gradient is `G X`; zero.
        left_sketch: E (n, r), whose gradient is `Gᵀ L`; zero.
    """

    right_sketch: nn.Parameter
    left_sketch: nn.Parameter

    @property
    def sketches(self) -> tuple[nn.Parameter, nn.Parameter]:
        """D and E."""
        return self.right_sketch, self.left_sketch

    @property
    def is_wanted(self) -> bool:
        """Whether a forward now is to leave a graph for them; not where the user has frozen everything."""
        return torch.is_grad_enabled() and self.right_sketch.requires_grad

    def bases(self, weight: Tensor) -> Bases:
        """X and L now."""
        with unseen_by_checkpoints():
            return self.living_receiver().bases(weight)

    def sketched(self, gradient: GradientOperator, bases: Bases) -> tuple[Tensor, Tensor]:
        """`G X` and `Gᵀ L` in the shapes of D and E: zero behind the rank of now."""
        right, left = bases
        with torch.autocast(gradient.device.type, enabled=False):
            products = gradient.times(right), gradient.transposed_times(left)
        return tuple(_laid_into(sketch, product) for sketch, product in zip(self.sketches, products, strict=True))


class RegisteredLayer(AdaptedLayer):
    """Mixed into a layer's class: its weight is frozen, and two small parameters beside it take the gradient."""

    def _captured(self, x: Tensor) -> Tensor | None:
        capture, found = captures.get(self.weight), linear_map(self)
        is_known = found is not None and capture is not None and found.pattern == capture.linear_map.pattern and found.accepts(x)
        if not (is_known and capture.is_wanted):
            return None
        how = weakref.ref(self.weight), capture, found, capture.bases(self.weight)
        return _WithSketches.apply(autocasted(x), self.weight, self.bias, *capture.sketches, *how)

    def _uncaptured(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        # What no linear map fits goes through the layer's own forward: the gradient is formed, sketched and dropped.
        capture = captures.get(self.weight)
        if capture is None or not capture.is_wanted:
            return super()._uncaptured(*inputs, **named)
        weight = self.weight
        bases = capture.bases(weight)
        self.__dict__["weight"] = _SketchedWeight.apply(weight, *capture.sketches, weakref.ref(weight), capture, bases)
        try:
            return super()._uncaptured(*inputs, **named)
        finally:
            del self.__dict__["weight"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _NAMES:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        own = {prefix + name for name in _NAMES}
        missing_keys[:] = [key for key in missing_keys if key not in own]

    def _contents(self) -> dict[str, Any]:
        parameters = {name: value for name, value in self._parameters.items() if name not in _NAMES}
        parameters["weight"] = nn.Parameter(self.weight.detach())
        return {**self.__dict__, "_parameters": parameters}

    def _let_go(self) -> None:
        for name in _NAMES:
            self._parameters.pop(name, None)
        self.weight.requires_grad_(True)
        super()._let_go()


class _WithSketches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, right_sketch, left_sketch, owner, capture, linear_map, bases):
        # D and E are saved for the graph of a second derivative alone.
        ctx.save_for_backward(x, weight, right_sketch, left_sketch)
        ctx.owner, ctx.capture, ctx.linear_map, ctx.bases = owner, capture, linear_map, bases
        return linear_map.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        _require_current(ctx)
        x, weight, *sketches = ctx.saved_tensors
        needs_x, _, needs_bias, *needs_sketches = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            weight = _SketchedWeight.apply(weight, *sketches, ctx.owner, ctx.capture, ctx.bases)
        x_gradient = ctx.linear_map.input_gradient(delta, weight.to(delta.dtype), x.shape) if needs_x else None
        bias_gradient = ctx.linear_map.bias_gradient(delta) if needs_bias else None
        products = ctx.capture.sketched(Factored(delta, x, ctx.linear_map), ctx.bases) if any(needs_sketches) else (None, None)
        return x_gradient, None, bias_gradient, *products, None, None, None, None


class _SketchedWeight(torch.autograd.Function):
    """The weight itself: `W + D Xᵀ + L Eᵀ`, whose gradient is formed, sketched and dropped."""

    @staticmethod
    def forward(ctx, weight, right_sketch, left_sketch, owner, capture, bases):
        ctx.owner, ctx.capture, ctx.bases = owner, capture, bases
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        _require_current(ctx)
        pattern = ctx.capture.linear_map.pattern
        matrix = gradient if pattern is None else rearrange(gradient, pattern)
        return None, *ctx.capture.sketched(Dense(matrix), ctx.bases), None, None, None


def _require_current(ctx) -> None:
    weight = ctx.owner()
    is_attached = weight is not None and captures.get(weight) is ctx.capture
    if not is_attached or ctx.capture.bases(weight) is not ctx.bases:
        shape = tuple(ctx.capture.right_sketch.shape[:1] + ctx.capture.left_sketch.shape[:1])
        raise BackwardError(
            f"a backward has reached a weight of {' x '.join(map(str, shape))} through a graph from before the last opt.step(), "
            "load_state_dict or opt.detach(): its sketch would be in bases that are gone. Run the forward again. Nothing was "
            "changed by this layer"
        )


def _laid_into(sketch: Tensor, product: Tensor) -> Tensor:
    # In D's own layout: what lies otherwise, DistributedDataParallel copies once more, and warns of.
    laid = torch.zeros_like(sketch)
    laid[..., : product.shape[-1]] = product
    return laid


class RegisteredCapture(LayerCapture):
    """Freezes the weights of layers and registers D and E on each; gives all back in `remove`.

    Args:
        layers: What to capture, and the largest rank of each; none of them captured already.
        keeper: Asked for `bases(weight)` in the first forward after each update; held weakly.

    Attributes:
        sketches: D and E of each layer, in order.
    """

    def __init__(self, layers: Iterable[tuple[CapturedLayer, int]], keeper: BasesKeeper) -> None:
        layers, reference = list(layers), weakref.ref(keeper)
        super().__init__(layer for layer, _ in layers)
        self.sketches: list[nn.Parameter] = []
        for layer, rank in layers:
            self.sketches += _register(layer, rank, reference)
        self._claim = Claim((_NAMES[index % 2], sketch) for index, sketch in enumerate(self.sketches))

    def remove(self) -> None:
        super().remove()
        self._claim.remove()


def _register(layer: CapturedLayer, rank: int, keeper: weakref.ref[BasesKeeper]) -> tuple[nn.Parameter, nn.Parameter]:
    module, weight = layer.module, layer.module.weight
    pattern = layer.linear_map.pattern
    m, n = (weight.detach() if pattern is None else rearrange(weight.detach(), pattern)).shape
    # As wide as the arithmetic of the rules: a sum of sketches in half precision would lose what they tell.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sketches = tuple(nn.Parameter(torch.zeros(side, rank, dtype=dtype, device=weight.device)) for side in (m, n))
    for name, sketch in zip(_NAMES, sketches, strict=True):
        module.register_parameter(name, sketch)
    weight.requires_grad_(False)
    module.__class__ = adapted_class(type(module), RegisteredLayer)
    captures[weight] = Registered(keeper, layer.linear_map, *sketches)
    return sketches
