"""`zero_grad` of modules and of other optimizers: it finds no `.grad`, so it is told what waits, and drops that as well."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class Holder(Protocol):
    """Who keeps gradients that `zero_grad` is to drop: the policy of an optimizer."""

    def drop_of(self, parameters: Container[int]) -> None: ...


# On the class: a module keeps its attributes, which copies and pickles take along, and a wrapper made later (a container, a
# compiled model) drops what waits as well as the layers inside it.
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_originals: dict[type, Callable[..., None]] = {}


class ZeroGradCapture:
    """While one of these is in place, `nn.Module.zero_grad` and `Optimizer.zero_grad` drop what waits for their parameters.

    Torch's own methods are back when the last one is removed, or its holder is gone.

    Args:
        holder: Its `drop_of(ids of parameters)` is called after torch's own method; held weakly.
    """

    def __init__(self, holder: Holder) -> None:
        self._holder = weakref.ref(holder)
        _holders.add(holder)
        weakref.finalize(holder, _restore_unused).atexit = False
        for owner in (nn.Module, Optimizer):
            if owner not in _originals:
                _originals[owner] = owner.zero_grad
                owner.zero_grad = _telling(owner.zero_grad)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Tell this holder no more. Calling it again does nothing."""
        holder = self._holder()
        if holder is not None:
            _holders.discard(holder)
        _restore_unused()


def _telling(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if holders := list(_holders):
            ids = _parameter_ids(self)
            for holder in holders:
                holder.drop_of(ids)

    return zero_grad


def _parameter_ids(owner: nn.Module | Optimizer) -> set[int]:
    if isinstance(owner, nn.Module):
        return {id(parameter) for parameter in owner.parameters()}
    return {id(parameter) for group in owner.param_groups for parameter in group["params"]}


def _restore_unused() -> None:
    if list(_holders):  # its length counts one that is just going
        return
    for owner, original in list(_originals.items()):
        # What somebody else has put over ours stays; ours only passes on then.
        if getattr(owner.__dict__["zero_grad"], "__wrapped__", None) is original:
            owner.zero_grad = original  # type: ignore[attr-defined]
            del _originals[owner]
