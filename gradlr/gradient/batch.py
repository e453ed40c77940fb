"""Gradients of several parameters of one shape, as one gradient with an axis more."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from .operator import Dense, GradientOperator, Sketched


def batch_key(gradient: GradientOperator) -> Hashable | None:
    """Equal for gradients that can be stacked; None for one that cannot."""
    if isinstance(gradient, Dense):
        return gradient.shape, gradient.stored.dtype, gradient.rounding
    if isinstance(gradient, Sketched) and gradient.left is not None and gradient.whole is None:
        return gradient.shape, gradient.dtype, gradient.right.shape[-1], gradient.left.shape[-1], gradient.left_spans
    return None


def batch_numbers(gradient: GradientOperator) -> int:
    """How many numbers one of them adds to a stack."""
    if isinstance(gradient, Sketched) and gradient.left is not None:
        return (gradient.right.shape[-1] + gradient.left.shape[-1]) * sum(gradient.shape[-2:])
    return gradient.shape.numel()


def stacked(gradients: Sequence[GradientOperator]) -> GradientOperator:
    """Gradients with one key, (m, n) each, as one of shape (count, m, n)."""
    first = gradients[0]
    if isinstance(first, Dense):
        dense = Dense(torch.stack([one.stored for one in gradients]), is_owned=True)  # type: ignore[attr-defined]
        dense.rounding = first.rounding
        return dense
    names = ("right", "right_sketch", "left", "left_sketch")
    parts = (torch.stack([getattr(one, name) for one in gradients]) for name in names)
    return Sketched(*parts, left_spans=first.left_spans)  # type: ignore[attr-defined]
