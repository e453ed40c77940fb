"""What a layer computes, as a linear map of its weight: its gradient's products with a basis, without the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

_CONVOLUTIONS = {
    nn.Conv1d: (F.conv1d, torch.nn.grad.conv1d_input, torch.nn.grad.conv1d_weight),
    nn.Conv2d: (F.conv2d, torch.nn.grad.conv2d_input, torch.nn.grad.conv2d_weight),
    nn.Conv3d: (F.conv3d, torch.nn.grad.conv3d_input, torch.nn.grad.conv3d_weight),
}


class LayerOp:
    """`y = A(W, x) + b`, linear in the weight W and in the input x; G is the gradient of W seen as (m, n).

    For T tokens (positions of a convolution's output) G is the sum of T outer products of an output gradient δ (m) and a patch
    of the input (n). Only `gradient` and `weight_gradient` make it.

    Attributes:
        pattern: The einops view of the layer's weight as (m, n); None for as it is.
    """

    pattern: str | None = None

    def accepts(self, x: Tensor) -> bool:
        """Whether the map is defined for this input."""
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y, as the layer itself computes it."""
        raise NotImplementedError

    def input_gradient(self, delta: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of x, which has the given shape, from δ, the gradient of y."""
        raise NotImplementedError

    def gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        """G itself, (m, n); differentiable, for those who cannot do without it."""
        raise NotImplementedError

    def weight_gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        """G in the shape of W."""
        raise NotImplementedError

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Gradient of b, (m,)."""
        raise NotImplementedError

    def sizes(self, delta: Tensor, x: Tensor) -> tuple[int, int]:
        """(m, n)."""
        raise NotImplementedError

    def project(self, x: Tensor, right: Tensor) -> Tensor:
        """Every token's patch times `right` (n, r): the output of r filters, laid out as y is."""
        raise NotImplementedError

    def weight_grad_matmul(self, delta: Tensor, projected: Tensor) -> Tensor:
        """Sum over tokens of δ times what `project` gave: `G right`, (m, r)."""
        raise NotImplementedError

    def rmatmul(self, delta: Tensor, x: Tensor, left: Tensor) -> Tensor:
        """`Gᵀ left`, (n, l), for `left` (m, l)."""
        raise NotImplementedError

    def covariance_matmul(self, x: Tensor, right: Tensor) -> Tensor:
        """Sum over tokens of patch times patchᵀ (n × n, never made) times `right` (n, r): (n, r)."""
        return self.gradient(self.project(x, right), x).mT


@dataclass(frozen=True)
class LinearOp(LayerOp):
    """A Linear over the last axis: `y = x Wᵀ + b`.

    Args:
        is_transposed: Whether the layer stores Wᵀ, (fan_in, fan_out), as transformers' Conv1D does.
    """

    is_transposed: bool = False

    @property
    def pattern(self) -> str | None:
        return "i o -> o i" if self.is_transposed else None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.oriented(weight), bias)

    def input_gradient(self, delta: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return delta @ self.oriented(weight)

    def gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        return _rows(delta).mT @ _rows(x)

    def weight_gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        return self.oriented(self.gradient(delta, x))

    def bias_gradient(self, delta: Tensor) -> Tensor:
        return _rows(delta).sum(0)

    def sizes(self, delta: Tensor, x: Tensor) -> tuple[int, int]:
        return delta.shape[-1], x.shape[-1]

    def project(self, x: Tensor, right: Tensor) -> Tensor:
        return x @ right

    def weight_grad_matmul(self, delta: Tensor, projected: Tensor) -> Tensor:
        # The narrow factor first: a quarter faster on the CPU.
        return (_rows(projected).mT @ _rows(delta)).mT

    def rmatmul(self, delta: Tensor, x: Tensor, left: Tensor) -> Tensor:
        return self.weight_grad_matmul(x, self.project(delta, left))

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight of the layer as (fan_out, fan_in)."""
        return weight.mT if self.is_transposed else weight


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
    def pattern(self) -> str:
        axes = " ".join("hwd"[: len(self.kernel)])
        return f"o i {axes} -> o (i {axes})"

    def accepts(self, x: Tensor) -> bool:
        return x.ndim == len(self.kernel) + 2 and x.numel() > 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _CONVOLUTIONS[self.kind][0](x, weight, bias, self.stride, self.padding, self.dilation)

    def input_gradient(self, delta: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return _CONVOLUTIONS[self.kind][1](shape, weight, delta, self.stride, self.padding, self.dilation)

    def gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        return self.weight_gradient(delta, x).flatten(1)

    def weight_gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        shape = (delta.shape[1], self.channels, *self.kernel)
        return _CONVOLUTIONS[self.kind][2](x, shape, delta, self.stride, self.padding, self.dilation)

    def bias_gradient(self, delta: Tensor) -> Tensor:
        return delta.transpose(0, 1).flatten(1).sum(1)

    def sizes(self, delta: Tensor, x: Tensor) -> tuple[int, int]:
        return delta.shape[1], self.channels * math.prod(self.kernel)

    def project(self, x: Tensor, right: Tensor) -> Tensor:
        return self.forward(x, right.mT.reshape(-1, self.channels, *self.kernel), None)

    def weight_grad_matmul(self, delta: Tensor, projected: Tensor) -> Tensor:
        convolve_weight = _CONVOLUTIONS[self.kind][2]
        size = (delta.shape[1], projected.shape[1], *self._ones())
        return convolve_weight(projected, size, delta).flatten(1)

    def rmatmul(self, delta: Tensor, x: Tensor, left: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[self.kind][0]
        filters = left.mT.reshape(-1, delta.shape[1], *self._ones())
        return self.gradient(convolve(delta, filters), x).mT

    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel)


def layer_op(module: nn.Module) -> LayerOp | None:
    """What the module computes; None where it is no plain Linear, transformers' Conv1D or ungrouped convolution.

    Subclasses may compute anything, so none is taken: the class must be the very one, or one that capture has put over it.
    """
    kind = _kind(module)
    if kind is nn.Linear:
        return LinearOp()
    if is_transposed_linear(module):
        return LinearOp(is_transposed=True)
    if kind in _CONVOLUTIONS and module.groups == 1 and module.padding_mode == "zeros":
        padding = _symmetric_padding(module)
        if padding is not None:
            sizes = (_per_axis(module, size) for size in (module.kernel_size, module.stride, padding, module.dilation))
            return ConvOp(kind, module.in_channels, *sizes)
    return None


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D: a Linear that stores its weight as (fan_in, fan_out)."""
    kind = _kind(module)
    return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"


def _kind(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_gradlr_original", type(module))


def _symmetric_padding(module: nn.Module) -> tuple[int, ...] | None:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        totals = [step * (size - 1) for step, size in zip(_per_axis(module, module.dilation), module.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)
    return module.padding


def _per_axis(module: nn.Module, size: int | tuple[int, ...]) -> tuple[int, ...]:
    # The constructor makes tuples; who sets an attribute may give a number.
    return (size,) * len(module.kernel_size) if isinstance(size, int) else tuple(size)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
