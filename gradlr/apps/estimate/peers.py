"""Other people's ways to train, as far as memory goes: bitsandbytes' AdamW in 8 bits and weights in 4, and peft's LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.linear import is_transposed_linear

# bitsandbytes 0.50: `optim/optimizer.py`, Optimizer2State.init_state; smaller tensors keep 32 bits.
_BLOCK_SIZE, _SMALLEST_8BIT = 256, 4096
# `functional.py`, quantize_4bit with compress_statistics: a byte for each 64 weights, a float32 for 256 of these, an offset and
# two tables.
_BLOCK_SIZE_4BIT, _TABLE_SIZES = 64, (1, 16, 256)


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit: two bytes a number and a scale for each block of 256; one kernel, no temporaries.

    Args:
        parameters: Parameters, or groups of them.
        lr: Of no account here.
    """

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        # Shared by all parameters: what the 256 codes of the two moments stand for.
        codes = {f"qmap{i}": torch.zeros(256, dtype=torch.float32) for i in (1, 2)}
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            is_small = parameter.numel() < _SMALLEST_8BIT
            dtype = torch.float32 if is_small else torch.uint8
            state = {f"state{i}": torch.zeros_like(parameter, dtype=dtype) for i in (1, 2)}
            blocks = math.ceil(parameter.numel() / _BLOCK_SIZE)
            scales = {f"absmax{i}": torch.zeros(blocks, dtype=torch.float32) for i in (1, 2)}
            self.state[parameter] = state | codes | ({} if is_small else scales)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Nothing, where memory is concerned."""


class FourBitLinear(nn.Module):
    """bitsandbytes' Linear4bit, NF4 with nested scales, of a frozen layer: products make the whole weight, forward and backward.

    Args:
        linear: Whose weight it is.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        blocks = math.ceil(linear.weight.numel() / _BLOCK_SIZE_4BIT)
        self.codes = nn.Buffer(torch.zeros(math.ceil(linear.weight.numel() / 2), dtype=torch.uint8))
        self.scales = nn.Buffer(torch.zeros(blocks, dtype=torch.uint8))
        self.nested = nn.Buffer(torch.zeros(math.ceil(blocks / _BLOCK_SIZE), dtype=torch.float32))
        self.tables = nn.Buffer(torch.zeros(sum(_TABLE_SIZES), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        product = _FourBitProduct.apply(x, self.shape)
        return product if self.bias is None else product + self.bias


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.shape), None


class LowRankAdapter(nn.Module):
    """peft's LoRA around a frozen layer: `tuners/lora/layer.py`, Linear.forward.

    Args:
        base: `nn.Linear`, or transformers' Conv1D.
        rank: r.
        is_4bit: Whether the layer's weight is in 4 bits, and the adapters in its dtype, as in QLoRA; otherwise in float32.
    """

    def __init__(self, base: Any, rank: int, *, is_4bit: bool) -> None:
        super().__init__()
        out_features, in_features = base.weight.mT.shape if is_transposed_linear(base) else base.weight.shape
        dtype = base.weight.dtype if is_4bit else torch.float32
        self.base = FourBitLinear(base) if is_4bit else base
        self.a = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        x = x.to(self.a.weight.dtype)  # lives until the end
        result = result + self.b(self.a(x)) * 2.0
        return result.to(dtype)


def add_adapters(model: nn.Module, weights: Iterable[nn.Parameter], rank: int, *, is_4bit: bool) -> int:
    """Freeze the model and put an adapter around each layer whose weight is one of `weights`; returns how many there are."""
    wanted, count = {id(weight) for weight in weights}, 0
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            is_linear = type(child) is nn.Linear or is_transposed_linear(child)
            if is_linear and id(child.weight) in wanted:
                setattr(parent, name, LowRankAdapter(child, rank, is_4bit=is_4bit))
                count += 1
    return count
