"""Convolutions, ordinary and transposed, in one to three dimensions, and grouped ones, which are a batch of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.nn import grad
from torch.nn.modules.conv import _ConvNd

from .base import LayerOp, LayerType, View, class_of

# Class → the convolution, its adjoint for the input, and that for the weight.
_FUNCTIONS: dict[type[nn.Module], tuple[Callable, Callable, Callable]] = {
    nn.Conv1d: (F.conv1d, grad.conv1d_input, grad.conv1d_weight),
    nn.Conv2d: (F.conv2d, grad.conv2d_input, grad.conv2d_weight),
    nn.Conv3d: (F.conv3d, grad.conv3d_input, grad.conv3d_weight),
}
_ORDINARY = tuple(_FUNCTIONS)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ConvOp(LayerOp):
    """An ungrouped convolution: r columns of a basis of the input's patches are a bank of r filters.

    Args:
        kind: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        channels: Input channels.
        kernel, stride, padding, dilation: One int per spatial axis.
    """

    kind: type[nn.Module]
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def view(self) -> View:
        return filter_view(len(self.kernel))

    def accepts(self, x: Tensor) -> bool:
        return x.ndim == len(self.kernel) + 2 and x.numel() > 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _FUNCTIONS[self.kind][0](x, weight, bias, self.stride, self.padding, self.dilation)

    def input_gradient(self, delta: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return _FUNCTIONS[self.kind][1](shape, weight, delta, self.stride, self.padding, self.dilation)

    def weight_gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        shape = (delta.shape[1], self.channels, *self.kernel)
        return _FUNCTIONS[self.kind][2](x, shape, delta, self.stride, self.padding, self.dilation)

    def bias_gradient(self, delta: Tensor) -> Tensor:
        return delta.transpose(0, 1).flatten(1).sum(1)

    def sizes(self, delta: Tensor, x: Tensor) -> tuple[int, int]:
        return delta.shape[1], self.channels * math.prod(self.kernel)

    def project(self, x: Tensor, right: Tensor) -> Tensor:
        return self.forward(x, right.mT.reshape(-1, self.channels, *self.kernel), None)

    def weight_grad_matmul(self, delta: Tensor, projected: Tensor) -> Tensor:
        # Each patch is r numbers by now: a kernel of one position.
        size = (delta.shape[1], projected.shape[1], *(1,) * len(self.kernel))
        return _FUNCTIONS[self.kind][2](projected, size, delta).flatten(1)

    def rmatmul(self, delta: Tensor, x: Tensor, left: Tensor) -> Tensor:
        # l combinations of the output channels take the place of all m.
        filters = left.mT.reshape(-1, delta.shape[1], *(1,) * len(self.kernel))
        return self.gradient(_FUNCTIONS[self.kind][0](delta, filters), x).mT


def filter_view(dimensions: int, groups: int = 1, *, is_transposed: bool = False) -> View:
    """How a convolution's weight is seen; groups do not mix, and are a batch.

    The gradient is a sum of outer products: at each output of a convolution, output gradient times a patch of the input; at each
    input of a transposed one, its adjoint, a patch of the output gradient times the input.
    """
    axes = " ".join("hwd"[:dimensions])
    if groups == 1:
        return View(f"i o {axes} -> (o {axes}) i" if is_transposed else f"o i {axes} -> o (i {axes})")
    pattern = f"(g i) o {axes} -> g (o {axes}) i" if is_transposed else f"(g o) i {axes} -> g o (i {axes})"
    return View(pattern, (("g", groups),))


def _view(layer: _ConvNd, name: str, weight: Tensor) -> View | None:
    # What a parametrization is made of may have any shape: weight_norm's lengths have one row, or one column.
    dimensions, groups = len(layer.kernel_size), layer.groups
    are_filters = weight.ndim == dimensions + 2 and weight.shape[0] % groups == 0
    return filter_view(dimensions, groups, is_transposed=isinstance(layer, _TRANSPOSED)) if are_filters else None


def _op(layer: _ConvNd) -> ConvOp | None:
    padding = _symmetric_padding(layer)
    is_plain = class_of(layer) in _FUNCTIONS and layer.groups == 1
    if not is_plain or layer.padding_mode != "zeros" or padding is None:
        return None
    kernel, stride, padding, dilation = (
        _per_axis(layer, size) for size in (layer.kernel_size, layer.stride, padding, layer.dilation)
    )
    return ConvOp(class_of(layer), layer.in_channels, kernel, stride, padding, dilation)


def _symmetric_padding(layer: _ConvNd) -> int | tuple[int, ...] | None:
    if not isinstance(layer.padding, str):
        return layer.padding
    if layer.padding == "same":
        totals = [step * (size - 1) for step, size in zip(_per_axis(layer, layer.dilation), layer.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)
    return 0  # "valid"


def _per_axis(layer: _ConvNd, size: int | tuple[int, ...]) -> tuple[int, ...]:
    # The constructor makes tuples; whoever sets an attribute may give a number.
    return (size,) * len(layer.kernel_size) if isinstance(size, int) else tuple(size)


CONVOLUTION = LayerType(lambda module: isinstance(module, _ORDINARY), _view, _op)
TRANSPOSED_CONVOLUTION = LayerType(lambda module: isinstance(module, _TRANSPOSED), _view)
