"""Cross-entropy of an output head without logits: a block of the vocabulary exists at one time, forward and backward."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, BackwardError, ShapeError
from ..gradient.head import HeadGradient, Logits
from ..tensors import full_precision, is_async, is_sharded
from .adaptor import destination_of, saved_tensors
from .layer_swap import TakenWeight, autocasted, taken


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module | Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """`cross_entropy(head(hidden), labels)` without the logits: tokens x vocabulary never exists, in forward or in backward.

    Logits are made for a block of the vocabulary at a time, once for the loss, and again in backward. Where `gradlr.attach`
    captures the head ("adaptor", "one_sided" or "auto", a head of its own), its gradient is never formed either: its rows are
    made, measured and written block by block. Otherwise it is an ordinary gradient, (vocabulary, d), of the weight's dtype.

    Args:
        hidden: Hidden states, (..., d), floating.
        head: An `nn.Linear`, bias or none, or a weight (vocabulary, d) of the hidden states' dtype; either may be tied to an
            embedding.
        labels: int64, the shape of `hidden` without its last axis: token i's own target. For next-token prediction hand over
            `hidden[:, :-1]` and `labels[:, 1:]`.
        ignore_index: Tokens with this label do not count.
        reduction: "mean" over the tokens that count (NaN where none does), or "sum".

    Returns:
        0-dim loss, float32 or wider.

    Raises:
        ArgumentError: head, labels' dtype or `reduction` are of another kind; a label is no row of the weight (on devices that
            the host runs ahead of, the loss is NaN then); the weight is sharded.
        ShapeError: the shapes do not belong together.
        BackwardError: (in backward) its gradient is to be differentiated again, or the weight was changed since.
    """
    weight, bias = _weight_and_bias(head)
    _require(hidden, weight, labels, reduction)
    x, labels = autocasted(hidden).reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    _require_rows(labels, len(weight), ignore_index)
    how = taken.get(weight)
    if how is not None and (how.layer_op is None or weight._backward_hooks):
        how = None  # tied to an embedding, which adds to it; or somebody wants to see the gradient
    return cast(Tensor, _LinearCrossEntropy.apply(x, weight, bias, weakref.ref(weight), how, labels, ignore_index, reduction))


def _weight_and_bias(head: nn.Module | Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(head, Tensor):
        return head, None
    if not isinstance(head, nn.Linear):
        raise ArgumentError(f"head is a {type(head).__name__}; pass an nn.Linear, or its weight (vocabulary, d)")
    return head.weight, head.bias


def _require(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f"reduction={reduction!r}: use 'mean' or 'sum'")
    if is_sharded(weight):
        raise ArgumentError(
            "the head's weight is sharded (a DTensor): only inside the forward of the module that fully_shard has wrapped is it "
            "whole. Leave the head in the group of the root module, and call this in the root's forward"
        )
    if labels.dtype != torch.int64:
        raise ArgumentError(f"labels are {labels.dtype}; token numbers must be int64: labels.long()")
    shapes = tuple(hidden.shape), tuple(weight.shape), tuple(labels.shape)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or labels.shape != hidden.shape[:-1]:
        raise ShapeError(
            "linear_cross_entropy: hidden states, weight and labels have shapes {}, {}, {}; needed are (..., d), (vocabulary, d) "
            "and (...)".format(*shapes)
        )


def _require_rows(labels: Tensor, count: int, ignore_index: int) -> None:
    if is_async(labels) or labels.is_meta:
        return
    is_right = ((labels >= 0) & (labels < count)) | (labels == ignore_index)
    if not is_right.all():
        found = int(labels[~is_right][0])
        raise ArgumentError(f"label {found} is no row of a head with {count} rows; labels to leave out must be {ignore_index}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        owner: weakref.ref[Tensor],
        how: TakenWeight | None,
        labels: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        counts = labels != ignore_index
        with full_precision(x.device):
            log_sums, own = Logits(x, weight, bias).log_sums(labels)
            scale = counts.to(log_sums.dtype)
            if reduction == "mean":
                scale = scale / scale.sum()
            loss = (torch.where(counts, log_sums - own, 0.0) * scale).sum()
        # Under checkpointing the saved weight comes back as another object: `owner` is the parameter itself.
        ctx.save_for_backward(x, weight, bias, labels, log_sums, scale)
        ctx.owner, ctx.how = owner, how
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackwardError(
                "the gradient of linear_cross_entropy cannot be differentiated again (create_graph=True): use the logits, "
                "cross_entropy(head(hidden), labels), there. Nothing was changed by this layer"
            )
        x, weight, bias, labels, log_sums, scale = saved_tensors(ctx)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        destination = _destination(ctx) if needs_weight else "nowhere"
        with full_precision(x.device):
            gradient = HeadGradient(Logits(x, weight, bias), labels, log_sums, scale * loss_gradient)
            form = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if destination == "returned" else None
            # The input's gradient first: with updates in backward, the weight is another one after `receive`.
            of_x, of_bias = gradient.others(needs_x=needs_x, needs_bias=needs_bias, form=form)
            if destination == "optimizer":
                ctx.how.living_receiver().receive(ctx.owner(), gradient)
        x_gradient = None if of_x is None else of_x.to(x.dtype)
        return x_gradient, form, of_bias, None, None, None, None, None


def _destination(ctx: Any) -> str:
    return "returned" if ctx.how is None else destination_of(ctx)
