"""Capture without a gradient: inside a Linear's backward, input and output gradient are at hand, and G = δᵀ x is never formed."""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import BackwardError
from ..linalg.normalize import widen
from .hook import lost_optimizer
from .operator import GradientOperator

# weight -> weak reference to the method that takes its gradient. A copied or unpickled module is not in here: an ordinary Linear.
_receivers: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Factored(GradientOperator):
    """The gradient `G = δᵀ x` of a linear map, known by its factors.

    Args:
        delta: Output gradient δ, shape (T, m) for T tokens, floating.
        x: Input, shape (T, n), floating.
    """

    def __init__(self, delta: Tensor, x: Tensor) -> None:
        self._delta, self._x = widen(delta), widen(x)
        self.shape = torch.Size((delta.shape[-1], x.shape[-1]))
        self.dtype, self.device = self._delta.dtype, delta.device

    def times(self, x: Tensor) -> Tensor:
        return self._delta.mT @ (self._x @ x)

    def transposed_times(self, y: Tensor) -> Tensor:
        return self._x.mT @ (self._delta @ y)

    def is_finite(self) -> Tensor:
        return self._delta.sum().isfinite() & self._x.sum().isfinite()

    @property
    def matrix(self) -> Tensor:
        """G itself, (m, n): for those who cannot do without it."""
        return self._delta.mT @ self._x


class AdaptorLinear(nn.Linear):
    """A Linear whose backward hands over input and output gradient instead of making the weight's gradient.

    Made from an `nn.Linear` by changing its class, so that hooks, names, state_dict and `isinstance` stay what they were.
    """

    @torch.compiler.disable  # the backward below changes weights, which no compiler may move
    def forward(self, x: Tensor) -> Tensor:
        receive = _receivers.get(self.weight)
        if receive is None or not self.weight.requires_grad or not _is_ordinary_backward():
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _LinearWithoutWeightGradient.apply(x, self.weight, self.bias, weakref.ref(self.weight), receive)


    def __reduce_ex__(self, protocol: int):
        # A copy or a pickle is an nn.Linear: nothing of gradlr is in it.
        return copyreg._reconstructor, (nn.Linear, object, None), self.__dict__


def _is_ordinary_backward() -> bool:
    # Transforms of torch.func and forward-mode derivatives go through the formula of F.linear.
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not is_forward_mode and not torch._C._are_functorch_transforms_active()


class _LinearWithoutWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, owner, receive):
        # Under checkpointing the saved weight comes back as another object: `owner` is the parameter itself.
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.receive = owner, receive
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        x, weight = _saved(ctx)
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        # The input's gradient first: with updates in backward, the weight is another one after `receive`.
        x_gradient = delta @ weight.to(delta.dtype) if needs_x else None
        flat, flat_x = delta.reshape(-1, delta.shape[-1]), x.reshape(-1, x.shape[-1])
        bias_gradient = flat.sum(0) if needs_bias else None
        destination, owner = _destination(ctx), ctx.owner()
        weight_gradient = (flat.mT @ flat_x).to(weight.dtype) if destination == "returned" else None
        if destination == "optimizer":
            receive = ctx.receive()
            if receive is None:
                raise lost_optimizer()
            receive(owner, Factored(flat, flat_x))
        return x_gradient, weight_gradient, bias_gradient, None, None


def _destination(ctx) -> str:
    """Where the weight's gradient is wanted: "optimizer", "returned" by this backward, or "nowhere"."""
    if torch.is_grad_enabled():  # create_graph: the gradient must be differentiable; a hook takes it
        return "returned"
    try:
        is_accumulated = torch._C._will_engine_execute_node(get_gradient_edge(ctx.owner()).node)
    except RuntimeError:  # torch.autograd.grad(loss, weight)
        return "returned"
    return "optimizer" if is_accumulated else "nowhere"


def _saved(ctx) -> tuple[Tensor, Tensor]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise BackwardError(
            f"the weight or the input of a Linear was changed between its forward and its backward ({error}). If the weight is "
            "used a second time in the loss (a shared layer, a penalty), its first backward has updated it already: attach with "
            'apply="step", or with capture="hook"'
        ) from error


def release_abandoned(model: nn.Module) -> None:
    """Make those Linears of the model plain again whose optimizer does not exist any more."""
    for module in model.modules():
        if type(module) is AdaptorLinear and _receivers.get(module.weight, lambda: None)() is None:
            _receivers.pop(module.weight, None)
            module.__class__ = nn.Linear


class AdaptorCapture:
    """Turns Linears into `AdaptorLinear`s that hand their gradient to `receive`; gives them back in `remove`.

    Args:
        modules: Plain `nn.Linear`s.
        receive: Bound method called as `receive(weight, operator)` inside backward, held weakly.
    """

    def __init__(self, modules: Iterable[nn.Linear], receive: Callable[[Tensor, GradientOperator], None]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        method = weakref.WeakMethod(receive)
        for reference in self._modules:
            module = reference()
            module.__class__ = AdaptorLinear
            _receivers[module.weight] = method

    def remove(self) -> None:
        """Make the modules plain `nn.Linear`s again. Calling it again does nothing."""
        for reference in self._modules:
            module = reference()
            if module is not None and type(module) is AdaptorLinear:
                module.__class__ = nn.Linear
                _receivers.pop(module.weight, None)
        self._modules = []


