"""Unbiased rounding to bfloat16 and float16."""

import torch
from torch import Tensor

from ..errors import ArgumentError

# Explicit mantissa bits and the exponent of the smallest normal number (frexp convention, mantissa in [0.5, 1)).
_FORMATS = {torch.bfloat16: (7, -125), torch.float16: (10, -13)}


def stochastic_round(x: Tensor, dtype: torch.dtype, *, generator: torch.Generator | None = None) -> Tensor:
    """Round each entry to one of its two neighbours in `dtype`, so that the expected value is the entry itself.

    Args:
        x: Any shape, float32 or float64; not modified.
        dtype: torch.bfloat16 or torch.float16.
        generator: Source of the random numbers, on the device of `x`.

    Returns:
        Same shape, `dtype`. Representable entries, NaN and infinities come back unchanged; finite entries beyond the
        largest number of `dtype` become that number.

    Raises:
        ArgumentError: `dtype` is neither of the two.

    Source: algorithms for low-precision weights, e.g. Gupta et al. 2015, arXiv 1502.02551.
    """
    if dtype not in _FORMATS:
        raise ArgumentError(f"stochastic_round: {dtype} is not supported; use torch.bfloat16 or torch.float16")
    if (x.dtype, dtype) == (torch.float32, torch.bfloat16):
        return _cut_bits(x, generator)
    bits, lowest = _FORMATS[dtype]
    _, exponent = torch.frexp(x)
    ulp_exponent = exponent.clamp(min=lowest) - (bits + 1)
    # In units of the last place the neighbours are integers: the upper one is taken as often as the fraction says.
    steps = _ldexp(x, -ulp_exponent)
    below = steps.floor()
    draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    rounded = _ldexp(below + (draw < steps - below), ulp_exponent)
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), rounded.clamp(-largest, largest), x).to(dtype)


def _cut_bits(x: Tensor, generator: torch.Generator | None) -> Tensor:
    # A bfloat16 is the upper half of a float32: noise below the cut carries into it with the right probability. Three
    # temporaries of the size of x, where the general way has a dozen.
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    return torch.where(x.isfinite(), rounded.nan_to_num_(posinf=largest, neginf=-largest), x).to(torch.bfloat16)


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    # In two halves: 2^133, the reciprocal of bfloat16's smallest step, is no float32.
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, half), exponent - half)
