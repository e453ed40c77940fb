"""Capture without a gradient: inside a layer's backward, input and output gradient are at hand, and G is never formed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from ..errors import BackwardError
from ..gradient.factors import OuterProduct
from ..gradient.operator import GradientOperator, Sketched
from ..layers import LayerOp, layer_op
from ..layers.embedding import is_plain_embedding
from ..linalg.normalize import widen
from .hook import Receiver
from .layer_swap import CapturedLayer, SwappedLayer, TakenWeight, autocasted, swapped_class, taken, unseen_by_checkpoints


class _AdaptorLayer(SwappedLayer):
    def _captured(self, x: Tensor) -> Tensor | None:
        how = taken.get(self.weight)
        # A hook on the weight itself wants to see, or to change, the gradient.
        is_hooked = bool(self.weight._backward_hooks)
        if how is None or is_hooked or not self.weight.requires_grad or not _is_ordinary_backward():
            return None
        if how.layer_op is None:
            return self._look_up(x, how) if is_plain_embedding(cast(nn.Embedding, self)) else None
        # Asked anew: its stride, padding or dilation may have been changed. What no map fits is left to the hook.
        found = layer_op(self)
        if found is None or found.view != how.layer_op.view or not found.accepts(x):
            return None
        x = autocasted(x)
        basis = _basis(how, found, self.weight, x, self.training) if how.is_one_sided else None
        bias = getattr(self, "bias", None)  # a layer of the user's may have none
        return _WithoutWeightGradient.apply(x, self.weight, bias, weakref.ref(self.weight), how, found, basis)

    def _look_up(self, ids: Tensor, how: TakenWeight) -> Tensor:
        padding_index = None if self.padding_idx is None else self.padding_idx % len(self.weight)
        return _EmbeddingByRows.apply(ids, self.weight, weakref.ref(self.weight), how, padding_index)


def _basis(how: TakenWeight, found: LayerOp, weight: Tensor, x: Tensor, is_training: bool) -> Tensor:
    # Fitted to the inputs at hand: it stands for them until the weight's next update.
    def covariance_matmul(right: Tensor) -> Tensor:
        return found.covariance_matmul(widen(x.detach()), right)

    optimizer = how.living_receiver()
    with unseen_by_checkpoints():
        return optimizer.bases.right(optimizer.store.by_id[id(weight)], covariance_matmul, is_training=is_training)


def _is_ordinary_backward() -> bool:
    # Transforms of torch.func and forward-mode derivatives go through the layer's own formula.
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not is_forward_mode and not torch._C._are_functorch_transforms_active()


class _WithoutWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, owner, how, layer_op, basis):
        kept = x
        if basis is not None:
            with torch.autocast(x.device.type, enabled=False):
                kept = layer_op.project(widen(x), basis)
        # Under checkpointing the saved weight comes back as another object: `owner` is the parameter itself.
        ctx.save_for_backward(kept, weight)
        # The basis lives as long as the graph, also where checkpointing has packed what was saved.
        ctx.owner, ctx.how, ctx.layer_op, ctx.x_shape, ctx.basis = owner, how, layer_op, x.shape, basis
        return layer_op.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        (kept, weight), basis = saved_tensors(ctx), ctx.basis
        layer_op = ctx.layer_op
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        # The input's gradient first: with updates in backward, the weight is another one after `receive`.
        x_gradient = layer_op.input_gradient(delta, weight.to(delta.dtype), ctx.x_shape) if needs_x else None
        bias_gradient = layer_op.bias_gradient(delta) if needs_bias else None
        weight_gradient = None
        destination = destination_of(ctx)
        if destination == "returned" and basis is not None:
            raise _input_not_kept(weight.shape)
        if destination == "returned":
            weight_gradient = layer_op.weight_gradient(delta, kept).to(weight.dtype)
        elif destination == "optimizer":
            ctx.how.living_receiver().receive(ctx.owner(), _operator(layer_op, delta, kept, basis))
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None


def _operator(layer_op: LayerOp, delta: Tensor, kept: Tensor, basis: Tensor | None) -> GradientOperator:
    if basis is None:
        return OuterProduct(delta, kept, layer_op)
    with torch.autocast(delta.device.type, enabled=False):
        return Sketched(basis, layer_op.weight_grad_matmul(widen(delta), kept))


class _EmbeddingByRows(torch.autograd.Function):
    # A sparse gradient adds to whatever else the weight is used for, a tied head included; the hook sees the sum.
    @staticmethod
    def forward(ctx, ids, weight, owner, how, padding_index):
        ctx.save_for_backward(ids)
        ctx.owner, ctx.how, ctx.padding_index, ctx.shape = owner, how, padding_index, weight.shape
        return F.embedding(ids, weight, padding_index)

    @staticmethod
    def backward(ctx, delta):
        (ids,) = ctx.saved_tensors
        rows, values = ids.reshape(-1), delta.reshape(-1, delta.shape[-1])
        if ctx.padding_index is not None:
            values = values.masked_fill((rows == ctx.padding_index).unsqueeze(-1), 0)
        if destination_of(ctx) == "returned":
            return None, values.new_zeros(ctx.shape).index_add(0, rows, values), None, None, None
        gradient = torch.sparse_coo_tensor(rows.unsqueeze(0), values, ctx.shape, check_invariants=False)
        return None, gradient, None, None, None


def destination_of(ctx: Any) -> str:
    """Where the gradient of the weight, a function's second input, is wanted.

    "optimizer", "returned" by this backward, or "nowhere".
    """
    weight, how, (accumulation, _) = ctx.owner(), ctx.how, ctx.next_functions[1]
    if not weight.requires_grad or accumulation is None:  # frozen since the forward, or thawed
        return "nowhere"
    try:
        is_accumulated = torch._C._will_engine_execute_node(accumulation)
    except RuntimeError:  # torch.autograd.grad(loss, weight)
        return "returned"
    if not is_accumulated:
        return "nowhere"
    # Under create_graph the gradient must be differentiable; a hook takes it. Detached since forward, it is an ordinary one; a
    # hook of somebody's that came since then wants to see it.
    is_ours = taken.get(weight) is how and not torch.is_grad_enabled() and not weight._backward_hooks
    return "optimizer" if is_ours else "returned"


def saved_tensors(ctx) -> tuple[Tensor, ...]:
    """What a forward has saved; a BackwardError that tells what to do where it was changed since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise BackwardError(
            f"the weight or the input of a layer was changed between its forward and its backward ({error}). If the weight is "
            "used a second time in the loss (a shared layer, a penalty), its first backward has updated it already: attach with "
            'apply="step", or with capture="hook"'
        ) from error


def _input_not_kept(shape: torch.Size) -> BackwardError:
    return BackwardError(
        f"the gradient of a weight of shape {tuple(shape)} was asked for itself (torch.autograd.grad, create_graph=True, "
        'register_hook or opt.detach() since the forward), but capture="one_sided" keeps only the projection of the layer\'s '
        'input: attach with capture="adaptor", or detach before the forward. Nothing was changed by this layer'
    )


class AdaptorCapture:
    """Changes the class of layers, so that they hand their gradient to the receiver; gives it back in `remove`.

    Args:
        layers: What to capture, none of them captured already; held weakly.
        receiver: Its `receive(weight, operator)` is called inside backward, and its bases are asked in the forward of one-sided
            layers; held weakly.
    """

    def __init__(self, layers: Iterable[CapturedLayer], receiver: Receiver) -> None:
        layers, reference = list(layers), weakref.ref(receiver)
        self._modules = [weakref.ref(layer.module) for layer in layers]
        for layer in layers:
            layer.module.__class__ = swapped_class(type(layer.module), _AdaptorLayer)  # type: ignore[arg-type]
            taken[layer.weight] = TakenWeight(reference, layer.layer_op, layer.is_one_sided)

    def remove(self) -> None:
        """Give the layers their own class again. Calling it again does nothing."""
        for reference in self._modules:
            module = reference()
            if isinstance(module, SwappedLayer):
                module._let_go()
        self._modules = []
