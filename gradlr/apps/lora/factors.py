"""The best approximation of rank r of the difference between two weights, as LoRA's A and B."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg import svd_lowrank

# An exact decomposition takes 0.03 s at 256 x 256 and 3.4 s at 512 x 512 (two CPU cores, torch 2.13); a randomized one of rank 32
# 0.15 s at 2048 x 2048.
_EXACT_SIZE = 256
# Halko et al. 2011, section 4.2 and 4.5: 5 to 10 columns more than wanted, and power steps where the spectrum decays slowly.
_OVERSAMPLING = 10
_POWER_STEPS = 4


@dataclass(frozen=True)
class Factors:
    """B A ≈ ΔW, and how near.

    Attributes:
        a: (r, n), lora_A.
        b: (m, r), lora_B.
        difference: ‖ΔW‖, Frobenius.
        error: ‖ΔW − B A‖, with A and B as they are stored.
    """

    a: Tensor
    b: Tensor
    difference: float
    error: float


def factorize(difference: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """The best B A of the given rank, A and B of equal size.

    Args:
        difference: ΔW, shape (m, n), float32 or float64, finite.
        rank: r, in [1, min(m, n)].
        dtype: Of A and B.

    Returns:
        Exact where ΔW is small or r is a good part of min(m, n), else by randomized subspace iteration from a fixed seed.

    Source: Eckart and Young 1936; Halko, Martinsson, Tropp 2011, arXiv 0909.4061.
    """
    u, s, v = _leading(difference, rank)
    root = s.sqrt()
    a, b = (v * root).mT.to(dtype), (u * root).to(dtype)
    rest = difference - b.to(difference.dtype) @ a.to(difference.dtype)
    return Factors(a.contiguous(), b.contiguous(), _norm(difference), _norm(rest))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    smaller = min(matrix.shape)
    if smaller <= _EXACT_SIZE or 2 * (rank + _OVERSAMPLING) > smaller:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].mT
    generator = torch.Generator(matrix.device).manual_seed(0)
    u, s, v = svd_lowrank(matrix, rank + _OVERSAMPLING, power_steps=_POWER_STEPS, generator=generator)
    return u[:, :rank], s[:rank], v[:, :rank]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
