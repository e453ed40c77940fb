"""Products of matrices, of which the large one may be in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import device_traits


def as_operand(x: Tensor) -> Tensor:
    """A matrix as products take it: in bfloat16 where it is and that is faster there, otherwise in float32 or wider."""
    is_wide = x.dtype in (torch.float32, torch.float64)
    is_operand = is_wide or (x.dtype == torch.bfloat16 and device_traits(x.device).has_half_products)
    return x if is_operand else x.float()


def wide_matmul(x: Tensor, y: Tensor) -> Tensor:
    """`x y` in float32 or wider, where either may be in bfloat16: then both are, and their products are summed in float32."""
    if x.dtype != torch.bfloat16 and y.dtype != torch.bfloat16:
        return x @ y
    x, y = x.to(torch.bfloat16), y.to(torch.bfloat16)
    if x.ndim == y.ndim <= 3 and device_traits(x.device).has_wide_sums:
        return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=torch.float32)
    return (x @ y).float()
