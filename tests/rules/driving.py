"""Running a rule by hand: context with a seeded generator, and steps of `update` and `write` without an optimizer."""

import torch

from gradlr.engine.apply_update import apply_update
from gradlr.gradient import Dense
from gradlr.layers import View
from gradlr.rules import UpdateContext


def context(rank=4, momentum_rank=2, *, beta=0.9, step=1, seed=0):
    """UpdateContext of one update; the same random numbers for the same seed and step."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return UpdateContext(rank, momentum_rank, beta, step, generator)


def standard_normals(shape, *, step, seed=0, dtype=torch.float64):
    """The first standard normals that `context(step=step, seed=seed).generator` gives."""
    return torch.randn(shape, dtype=dtype, generator=context(step=step, seed=seed).generator)


def first_state(rule, shape, dtype=torch.float64, **options):
    """What `rule.init` gives."""
    return rule.init(torch.Size(shape), context(**options), dtype=dtype, device=torch.device("cpu"))


def descend(rule, state, gradients, *, lr, weight, ranks=None, weight_decay=0.0, rank=4, momentum_rank=2, beta=0.9, seed=0):
    """Write one update per gradient into a copy of `weight`; returns the weight after each step and the last state."""
    weight, weights = weight.clone(), []
    for step, gradient in enumerate(gradients, start=1):
        now = context(rank if ranks is None else ranks[step - 1], momentum_rank, beta=beta, step=step, seed=seed)
        update, state = rule.update(Dense(gradient), state, now)
        apply_update(weight, View(), update, lr=lr, weight_decay=weight_decay, generator=now.generator)
        weights.append(weight.clone())
    return weights, state


def random_gradients(shape, count, *, decay=1.0, seed=0):
    """`count` float64 matrices with a common part, so that momentum has something to follow.

    `decay` is the ratio of one singular value to the one before; 1.0 leaves a Gaussian matrix as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    common, *own = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count + 1))
    return [_with_decay(common + one, decay) for one in own]


def _with_decay(matrix, decay):
    if decay == 1.0:
        return matrix
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = decay ** torch.arange(s.shape[-1], dtype=s.dtype)
    return (u * values) @ vh
