"""Float64 references by a singular value decomposition: what the library's products come close to."""

import numpy as np
import torch


def polar_factor(x, rtol=1e-5):
    """Nearest matrix with orthonormal columns to (..., n, r); directions below `rtol` of the largest are left out."""
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    is_direction = (s > rtol * s.max(-1, keepdims=True)).astype(np.float64)
    return torch.from_numpy((u * is_direction[..., None, :]) @ vh)


def leading_directions(x):
    """Right singular vectors (..., r, r) and squared singular values (..., r), descending, of (..., n, r)."""
    _, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return torch.from_numpy(np.swapaxes(vh, -1, -2).copy()), torch.from_numpy(s**2)


def best_approximation(x, rank):
    """The best approximation of one matrix among those of at most that rank."""
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
