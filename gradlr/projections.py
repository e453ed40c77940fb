"""What one-sided layers project their input on in forward, before there is any gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import guards
from .parallel import Replicas, Shards
from .slots import ParameterGroup, Slot, follow_loss, working_form
from .state import KeptState
from .tracker import LossTracker
from .write import full_precision


class Projections(KeptState):
    """Makes each weight's basis in the first forward after its update, and keeps it until the next one.

    Args:
        groups, tracker, seed, state_dtype: As for `KeptState`.
        replicas: The processes that train together; None where this one trains alone.
        shards: The processes that each hold a part of the model; None where it is not sharded.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        tracker: LossTracker,
        seed: int,
        state_dtype: torch.dtype,
        replicas: Replicas | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(groups, tracker, seed, state_dtype)
        self._replicas, self._shards = replicas, shards
        self.everyone = replicas if shards is None else shards.everyone
        self._failed_tasks: set[int] = set()

    @property
    def processes(self) -> int:
        """Number of processes that train the model together."""
        return 1 if self.everyone is None else self.everyone.size

    @property
    def tells_mean(self) -> bool:
        """Whether the tracker hears of the mean loss of several processes from this optimizer."""
        return self.everyone is not None

    def _hear_losses(self) -> str | None:
        """Let the ranks follow the mean loss of all shards' processes; why the step is to be left out, where it is."""
        # The loss at hand, or on CUDA, where that one is on its way, the one before.
        rates = [float(group["lr"]) for group in self.param_groups]
        heard = self._shards.hear(self.slots, self.tracker.value, rates)
        if heard.loss is not None:
            self.tracker.record_mean(heard.loss)
        if not (heard.not_finite and self.tracker.is_current):
            return None
        return guards.not_finite_on(heard.not_finite, self.everyone.rank, f"the loss is {self.tracker.value}")

    @torch.no_grad()
    def right_basis(self, parameter: Tensor, covariance_times: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X, (n, r) orthonormal, on which a one-sided layer projects its input: fixed until the next update of its weight.

        Made in the first forward after an update whose inputs are not all zero, of the inputs there; its rank follows the loss
        shown before that forward. A forward of a layer in training mode takes none that one in evaluation mode has made.
        Where several processes train, the inputs, which differ between them, have no say.
        """
        self._forget_failed_backward()
        slot = self._slots[id(parameter)]
        if self._replicas is not None:
            with full_precision(parameter.device):
                return self._shared_bases(slot)[0]
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

    def _shared_bases(self, slot: Slot) -> tuple[Tensor, Tensor | None]:
        """X and L (None where only X is asked for) of state and random numbers alone: the same in every process."""
        known, like = (slot.plan.shape, self._rule_state(slot), self._settings(slot)), working_form(slot.plan.parameter)
        if slot.capture != "one_sided":
            return slot.rule.right_basis(*known, **like), slot.rule.left_basis(*known, **like)
        # A graph may hold it already; the layer's input was projected on that very tensor.
        basis = slot.basis
        if basis is None:
            slot.basis = basis = slot.rule.right_basis(*known, **like)
        return basis, None

    def _forget_failed_backward(self) -> None:
        # A backward that is open and not under way has failed: the bases that its graph may still hold are of no further use.
        failed = self.tracker.open_backwards
        if not self._failed_tasks.issuperset(failed) and torch._C._current_graph_task_id() == -1:
            self._failed_tasks = set(failed)
            self._forget_bases()

    def _forget_bases(self) -> None:
        for slot in self._slots.values():
            slot.basis = None
