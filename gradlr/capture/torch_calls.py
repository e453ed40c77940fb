"""What torch's own functions do that look for `.grad` and find none: `zero_grad` drops what waits, clipping tells."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from ..engine.policy import CommitPolicy
from ..errors import ArgumentError
from .patches import Patch


class TorchCalls:
    """While one of these is in place, torch's functions that look for gradients know of those that an optimizer has taken.

    On torch's classes and modules: a module keeps its attributes, which copies and pickles take along, and a wrapper made later
    (a container, a compiled model) drops what waits as well as the layers inside it.

    Args:
        policy: Of the optimizer; held weakly.
    """

    def __init__(self, policy: CommitPolicy) -> None:
        self._policy = weakref.ref(policy)
        for patch in _PATCHES:
            patch.add(policy)

    def remove(self) -> None:
        """Torch's functions pass this optimizer over again. Calling it again does nothing."""
        if (policy := self._policy()) is not None:
            for patch in _PATCHES:
                patch.discard(policy)


def _zero_grad(policies: list[CommitPolicy], original: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
    original(owner, *args, **kwargs)
    lists = [owner.parameters()] if isinstance(owner, nn.Module) else [group["params"] for group in owner.param_groups]
    ids = {id(parameter) for parameters in lists for parameter in parameters}
    for policy in policies:
        policy.drop_of(ids)


def _clip_value(policies: list[CommitPolicy], original: Callable[..., None], parameters: Any, *args: Any, **kwargs: Any) -> None:
    parameters = _listed(parameters)
    for policy in policies:
        if taken := policy.taken(parameters):
            raise ArgumentError(
                f"clip_grad_value_ finds no gradient of {taken[0]!r} ({len(taken)} parameters in all): gradlr has taken it in "
                "backward, and its entries are there no more. Clip them before: parameter.register_hook(lambda gradient: "
                'gradient.clamp(-value, value)) for each parameter; or limit the norm: attach with apply="step", max_grad_norm='
            )
    original(parameters, *args, **kwargs)


def _clip_norm(
    policies: list[CommitPolicy], original: Callable[..., Tensor], parameters: Any, *args: Any, **kwargs: Any
) -> Tensor:
    parameters = _listed(parameters)
    for policy in policies:
        if not policy.pending.clipper.is_active and (taken := policy.taken(parameters)):
            policy.checks.warn_once(
                "clipping",
                f"clip_grad_norm_ finds no gradient of {taken[0]!r} ({len(taken)} parameters in all) and limits nothing: gradlr "
                'has taken it in backward. Attach with apply="step" and max_grad_norm=, or clip over the parameters in '
                "opt.param_groups then, where the norm of what waits is found",
            )
    return original(parameters, *args, **kwargs)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


_PATCHES: tuple[Patch[CommitPolicy], ...] = (
    Patch((nn.Module, Optimizer), "zero_grad", _zero_grad),
    Patch((torch.nn.utils, clip_grad), "clip_grad_value_", _clip_value),
    Patch((torch.nn.utils, clip_grad), "clip_grad_norm_", _clip_norm),
)
