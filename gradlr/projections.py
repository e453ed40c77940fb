"""What one-sided layers project their input on in forward, before there is any gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .slots import ParameterGroup, follow_loss, working_form
from .state import KeptState
from .tracker import LossTracker
from .write import full_precision


class Projections(KeptState):
    """Makes each weight's basis in the first forward after its update, and keeps it until the next one.

    Args:
        groups, tracker, seed, state_dtype: As for `KeptState`.
    """

    def __init__(self, groups: list[ParameterGroup], tracker: LossTracker, seed: int, state_dtype: torch.dtype) -> None:
        super().__init__(groups, tracker, seed, state_dtype)
        self._failed_tasks: set[int] = set()

    @torch.no_grad()
    def right_basis(self, parameter: Tensor, covariance_times: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X, (n, r) orthonormal, on which a one-sided layer projects its input: fixed until the next update of its weight.

        Made in the first forward after an update whose inputs are not all zero, of the inputs there; its rank follows the loss
        shown before that forward. A forward of a layer in training mode takes none that one in evaluation mode has made.
        """
        self._forget_failed_backward()
        slot = self._slots[id(parameter)]
        basis = slot.sound_basis(is_training)
        if basis is None:
            products: list[Tensor] = []

            def times(right: Tensor) -> Tensor:
                products.append(covariance_times(right))
                return products[-1]

            follow_loss(slot, self.tracker.ratio, self.state[parameter])
            known, like = (slot.plan.shape, self._rule_state(slot), self._settings(slot)), working_form(parameter)
            with full_precision(parameter.device):
                basis = slot.rule.right_basis(*known, **like, covariance_times=times)
            # A basis of inputs that were all zero, or not finite, must not outlive their loss.
            is_sound = torch.stack([basis.isfinite().all(), *(product.any() for product in products)]).all()
            slot.keep_basis(basis, is_sound, is_training)
        return basis

    def _forget_failed_backward(self) -> None:
        # A backward that is open and not under way has failed: the bases that its graph may still hold are of no further use.
        failed = self.tracker.open_backwards
        if not self._failed_tasks.issuperset(failed) and torch._C._current_graph_task_id() == -1:
            self._failed_tasks = set(failed)
            self._forget_bases()

    def _forget_bases(self) -> None:
        for slot in self._slots.values():
            slot.basis = None
