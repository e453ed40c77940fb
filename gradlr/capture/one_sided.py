"""What one-sided layers project their input on in forward, before there is any gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.record import ParamRecord
from ..engine.state_store import StateStore
from ..tensors import AsyncScalar, compute_dtype_and_device, full_precision
from ..tracker import LossTracker


@dataclass
class _Kept:
    basis: weakref.ref[Tensor]
    # Whether further forwards may use it: its inputs may have been zeros, or NaN. None where they may.
    is_sound: AsyncScalar | None
    is_for_training: bool


class _HeldBases:
    """What fitted and shared bases have in common: X of each parameter, held weakly from its first use to the next update."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._kept: dict[int, _Kept] = {}

    def held(self, record: ParamRecord) -> Tensor | None:
        """X, while a graph or a sketch holds it."""
        kept = self._kept.get(record.index)
        return None if kept is None else kept.basis()

    def forget(self, record: ParamRecord) -> None:
        """The parameter was updated."""
        self._kept.pop(record.index, None)

    def forget_all(self) -> None:
        """Whatever holds a basis is of no further use."""
        self._kept.clear()


class FittedBases(_HeldBases):
    """Bases fitted to the inputs of the first forward after each update, and kept until the next one.

    They are held weakly: a graph, or a sketch that waits, keeps its own alive.

    Args:
        store: State of the parameters, whose momentum a basis starts from.
        tracker: Its loss decides the rank, and its open backwards tell of failed ones.
    """

    def __init__(self, store: StateStore, tracker: LossTracker) -> None:
        super().__init__(store)
        self._tracker = tracker
        self._failed_tasks: set[int] = set()

    @torch.no_grad()
    def right(self, record: ParamRecord, covariance_matmul: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X, (n, r) orthonormal, on which a one-sided layer projects its input: fixed until the next update of its weight.

        Made in the first forward after an update whose inputs are not all zero, of the inputs there; its rank follows the loss
        shown before that forward. A forward of a layer in training mode takes none that one in evaluation mode has made.
        """
        self._forget_failed_backward()
        basis = self._sound(record, is_training)
        return self._fit(record, covariance_matmul, is_training) if basis is None else basis

    def known(self, record: ParamRecord) -> Tensor:
        """Fitted bases are known to this process alone."""
        raise NotImplementedError("bases that are fitted to inputs are not the same in every process")

    def _sound(self, record: ParamRecord, is_training: bool) -> Tensor | None:
        # What the flag said is read here, a forward later, so that no device is waited for.
        kept = self._kept.get(record.index)
        if kept is None or (is_training and not kept.is_for_training):
            return None
        if kept.is_sound is not None and not kept.is_sound.read():
            return None
        kept.is_sound = None
        return kept.basis()

    def _fit(self, record: ParamRecord, covariance_matmul: Callable[[Tensor], Tensor], is_training: bool) -> Tensor:
        products: list[Tensor] = []

        def matmul(right: Tensor) -> Tensor:
            products.append(covariance_matmul(right))
            return products[-1]

        record.follow_loss(self._tracker)
        with full_precision(record.plan.parameter.device):
            basis = right_basis(record, self._store, covariance_matmul=matmul)
        # A basis of inputs that were all zero, or not finite, must not outlive their loss.
        is_sound = torch.stack([basis.isfinite().all(), *(product.any() for product in products)]).all()
        self._kept[record.index] = _Kept(weakref.ref(basis), AsyncScalar(is_sound), is_training)
        return basis

    def _forget_failed_backward(self) -> None:
        # A backward that is open and not under way has failed: the bases that its graph may still hold are of no further use.
        failed = self._tracker.open_backwards
        if not self._failed_tasks.issuperset(failed) and torch._C._current_graph_task_id() == -1:
            self._failed_tasks = set(failed)
            self.forget_all()


class SharedBases(_HeldBases):
    """Bases of state and random numbers alone, which every process of a group makes alike.

    Inputs, which differ between the processes, have no say.

    Args:
        store: State of the parameters.
    """

    def right(self, record: ParamRecord, covariance_matmul: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X of a one-sided layer."""
        return self.known(record)

    @torch.no_grad()
    def known(self, record: ParamRecord) -> Tensor:
        """The same: the very tensor that the layer's input was projected on."""
        basis = self.held(record)
        if basis is None:
            with full_precision(record.plan.parameter.device):
                basis = right_basis(record, self._store)
            self._kept[record.index] = _Kept(weakref.ref(basis), None, True)
        return basis


def right_basis(record: ParamRecord, store: StateStore, *, covariance_matmul: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """X of the parameter's rule, in the dtype of its arithmetic."""
    plan = record.plan
    like = compute_dtype_and_device(plan.parameter)
    known, context = store.read(record), store.context(record)
    return record.rule.right_basis(plan.shape, known, context, **like, covariance_matmul=covariance_matmul)
