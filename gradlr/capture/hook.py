"""Capture by post-accumulate hooks: take the gradient of a parameter the moment it is complete, and free it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..engine.bases import Bases
from ..engine.commit import Committer
from ..engine.loop_checks import changed_message
from ..engine.masks import HookMasks
from ..engine.record import ParamRecord
from ..engine.state_store import StateStore
from ..errors import AttachError, BackwardError
from ..gradient import Dense, GradientOperator, RowSparse
from ..layers import View
from ..linalg import Layout
from ..params.kinds import ParameterPlan
from ..tensors import is_sharded, local, share_memory

# parameter -> the lock that holds it, and its hook. Weak on both sides: neither a dropped model nor a dropped optimizer is kept
# alive.
_locks: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Receiver(Protocol):
    """Who takes the gradients, and keeps the bases in which one-sided layers want them: the optimizer."""

    bases: Bases
    committer: Committer
    store: StateStore

    def receive(self, parameter: Tensor, gradient: GradientOperator) -> None: ...


class ParameterLock:
    """Holds parameters for one optimizer, as long as it lives: no other may attach to them.

    Args:
        plans: Of the parameters.

    Raises:
        AttachError: a parameter is held by another lock that is still alive.
    """

    def __init__(self, plans: Iterable[ParameterPlan]) -> None:
        plans = list(plans)
        for plan in plans:
            _release_dead(plan.parameter)
            if plan.parameter in _locks:
                raise AttachError(
                    f"parameter {plan.name!r} is attached already: two optimizers would both update it in one backward. "
                    "Call opt.detach() on the first one, or attach under `with gradlr.attach(...) as opt:`"
                )
        self._handles: list[RemovableHandle] = []
        self._parameters = [weakref.ref(plan.parameter) for plan in plans]
        for plan in plans:
            _locks[plan.parameter] = (weakref.ref(self), None)

    def remove(self) -> None:
        """Give the parameters free, and remove all hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        for reference in self._parameters:
            parameter = reference()
            if parameter is not None:
                _locks.pop(parameter, None)
                _forget_hooks(parameter)
        self._handles, self._parameters = [], []


class HookCapture(ParameterLock):
    """Registers one hook per parameter and hands each gradient on; owns the handles.

    Args:
        plans: Of the parameters.
        receiver: Its `receive(parameter, operator)` is called inside backward; held weakly. `parameter.grad` is None by then.

    Raises:
        AttachError: a parameter is held by another lock that is still alive.
    """

    def __init__(self, plans: Iterable[ParameterPlan], receiver: Receiver) -> None:
        plans = list(plans)
        super().__init__(plans)
        reference, masks = weakref.ref(receiver), HookMasks()
        try:
            for plan in plans:
                parameter = plan.parameter
                handle = parameter.register_post_accumulate_grad_hook(_make_hook(plan, reference, masks))
                self._handles.append(handle)
                _locks[parameter] = (weakref.ref(self), handle)
        except RuntimeError:  # a parameter that requires no gradient
            self.remove()
            raise


def lost_optimizer() -> AttachError:
    """A gradient is there, and the optimizer that should take it is not."""
    return AttachError(
        "the optimizer that gradlr.attach returned does not exist any more, so nothing would be updated. "
        "Keep it in a variable as long as you train: opt = gradlr.attach(...). To go on without gradlr, attach once "
        "more and call opt.detach() at once: that removes these hooks"
    )


def _release_dead(parameter: Tensor) -> None:
    if parameter in _locks and _locks[parameter][0]() is not None:
        gc.collect()  # a scheduler makes its optimizer part of a reference cycle
    if parameter in _locks and _locks[parameter][0]() is None:
        _, handle = _locks.pop(parameter)
        if handle is not None:
            handle.remove()
            _forget_hooks(parameter)


def _forget_hooks(parameter: Tensor) -> None:
    # Where torch has exchanged the tensor of a parameter since (`model.to`, of int8 weights), hooks that are added to the empty
    # dictionary of those removed are never called.
    if parameter._post_accumulate_grad_hooks is not None and not parameter._post_accumulate_grad_hooks:
        cast(Any, parameter)._post_accumulate_grad_hooks = None


def _make_hook(plan: ParameterPlan, receiver: weakref.ref[Receiver], masks: HookMasks) -> Callable[[Tensor], None]:
    # Not the plan, which holds the parameter: the parameter holds this, and would never be free without a collection.
    name, view, layout = plan.name, plan.view, plan.layout

    def take_gradient(parameter: Tensor) -> None:
        optimizer = receiver()
        if optimizer is None:
            raise lost_optimizer()
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # its layer has handed it over already: hooks fire all the same
            return
        operator = operator_of(parameter, gradient, view, layout)
        if operator is None:
            raise _unusable(name, gradient, optimizer.committer.changed)
        if parameter._backward_hooks or len(parameter._post_accumulate_grad_hooks) > 1:
            masks.look(optimizer.store.by_id[id(parameter)], operator)
        optimizer.receive(parameter, operator)

    return take_gradient


def written_gradient(record: ParamRecord) -> GradientOperator:
    """Take what somebody has written into `.grad`. They may have kept it, so that it must not be overwritten."""
    plan = record.plan
    gradient, plan.parameter.grad = cast(Tensor, plan.parameter.grad), None
    operator = operator_of(plan.parameter, gradient, plan.view, plan.layout, is_kept=True)
    if operator is None:
        raise _unusable(plan.name, gradient, ())
    return operator


def _unusable(name: str, gradient: Tensor, changed: Sequence[str]) -> BackwardError:
    return BackwardError(
        f"the gradient of {name!r} is {gradient.layout}, {gradient.dtype}; gradlr takes real gradients, dense or, as of "
        f"embeddings with sparse=True, by rows. Make it dense, or leave the parameter out. {changed_message(changed)}"
    )


def operator_of(
    parameter: Tensor, gradient: Tensor, view: View, layout: Layout, *, is_kept: bool = False
) -> GradientOperator | None:
    """A gradient in memory as an operator; None where it is complex, or sparse in another way than by rows.

    Args:
        parameter: Whose it is.
        gradient: As autograd has accumulated it, or its shard.
        view: How the parameter is seen as (a batch of) matrices.
        layout: Which block of them lies here.
        is_kept: Whether somebody else may hold the same tensor.
    """
    if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1 and view.pattern is None and gradient.ndim == 2:
        gradient = gradient.detach()
        return RowSparse.summed(gradient._indices()[0], gradient._values(), gradient.shape[0])
    if gradient.layout != torch.strided or gradient.is_complex():
        return None
    if is_sharded(gradient):
        gradient = _shard(gradient.detach(), parameter)
    # autograd hands over a view of a buffer that may still wait in other nodes, as of a sum of two parameters. Two hold the
    # storage where nobody else does: the tensor, and the object that is asked here.
    is_shared = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) > 2
    matrix = gradient.detach() if view.pattern is None else view.of(gradient.detach())
    # Under create_graph the buffer belongs to the graph as well; another hook may have kept it.
    is_ours = not (is_kept or is_shared or gradient.requires_grad) and len(parameter._post_accumulate_grad_hooks or ()) == 1
    return Dense(matrix, is_owned=is_ours or not share_memory(matrix, gradient), layout=layout)


def _shard(gradient: Any, parameter: Any) -> Tensor:
    """Of a sharded gradient what belongs to the parameter's part in this process."""
    if gradient.placements != parameter.placements:  # partial sums, as of a norm under sequence parallelism
        gradient = gradient.redistribute(placements=parameter.placements)
    shard = local(gradient)
    shard = shard.wait() if hasattr(shard, "wait") else shard  # a redistribution may be under way
    if shard.device.type == "cpu" and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # offloaded: older versions of torch have not waited for the copy
    return shard
