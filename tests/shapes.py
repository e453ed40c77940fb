"""One shape table for all tests: tall, wide, square, one row, one column, batched, rank-deficient, zero."""

import torch

MATRICES = {
    "tall": lambda dtype: torch.randn(24, 10, dtype=dtype),
    "wide": lambda dtype: torch.randn(10, 24, dtype=dtype),
    "square": lambda dtype: torch.randn(16, 16, dtype=dtype),
    "one_row": lambda dtype: torch.randn(1, 12, dtype=dtype),
    "one_column": lambda dtype: torch.randn(12, 1, dtype=dtype),
    "batched": lambda dtype: torch.randn(3, 12, 9, dtype=dtype),
    "deficient": lambda dtype: torch.randn(20, 2, dtype=dtype) @ torch.randn(2, 14, dtype=dtype),
    "zero": lambda dtype: torch.zeros(12, 9, dtype=dtype),
}


def matrix(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """The matrix called `name`, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MATRICES[name](dtype)
