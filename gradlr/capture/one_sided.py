"""What one-sided layers project their input on in forward, before there is any gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed import Communicator, Shards
from ..engine import messages as guards
from ..engine.apply_update import full_precision
from ..engine.record import ParameterGroup, ParamRecord, compute_dtype_and_device, follow_loss
from ..engine.state_store import KeptState
from ..tracker import LossTracker


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
        replicas: Communicator | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(groups, tracker, seed, state_dtype)
        self._replicas, self._shards = replicas, shards
        self.comm = replicas if shards is None else shards.comm
        self._failed_tasks: set[int] = set()

    @property
    def processes(self) -> int:
        """Number of processes that train the model together."""
        return 1 if self.comm is None else self.comm.size

    @property
    def tells_mean(self) -> bool:
        """Whether the tracker hears of the mean loss of several processes from this optimizer."""
        return self.comm is not None

    def _hear_losses(self) -> str | None:
        """Let the ranks follow the mean loss of all shards' processes; why the step is to be left out, where it is."""
        # The loss at hand, or on CUDA, where that one is on its way, the one before.
        rates = [float(group["lr"]) for group in self.param_groups]
        heard = self._shards.sync_loss(self.records, self.tracker.value, rates)
        if heard.loss is not None:
            self.tracker.record_mean(heard.loss)
        if not (heard.not_finite and self.tracker.is_current):
            return None
        return guards.not_finite_on(heard.not_finite, self.comm.rank, f"the loss is {self.tracker.value}")

    @torch.no_grad()
    def right_basis(self, parameter: Tensor, covariance_matmul: Callable[[Tensor], Tensor], *, is_training: bool) -> Tensor:
        """X, (n, r) orthonormal, on which a one-sided layer projects its input: fixed until the next update of its weight.

        Made in the first forward after an update whose inputs are not all zero, of the inputs there; its rank follows the loss
        shown before that forward. A forward of a layer in training mode takes none that one in evaluation mode has made.
        Where several processes train, the inputs, which differ between them, have no say.
        """
        self._forget_failed_backward()
        record = self._records[id(parameter)]
        if self._replicas is not None:
            with full_precision(parameter.device):
                return self._shared_bases(record)[0]
        basis = record.sound_basis(is_training)
        if basis is None:
            products: list[Tensor] = []

            def matmul(right: Tensor) -> Tensor:
                products.append(covariance_matmul(right))
                return products[-1]

            follow_loss(record, self.tracker.ratio, self.state[parameter])
            known, like = (
                (record.plan.shape, self._rule_state(record), self._settings(record)),
                compute_dtype_and_device(parameter),
            )
            with full_precision(parameter.device):
                basis = record.rule.right_basis(*known, **like, covariance_matmul=matmul)
            # A basis of inputs that were all zero, or not finite, must not outlive their loss.
            is_sound = torch.stack([basis.isfinite().all(), *(product.any() for product in products)]).all()
            record.keep_basis(basis, is_sound, is_training)
        return basis

    def _shared_bases(self, record: ParamRecord) -> tuple[Tensor, Tensor | None]:
        """X and L (None where only X is asked for) of state and random numbers alone: the same in every process."""
        known, like = (
            (record.plan.shape, self._rule_state(record), self._settings(record)),
            compute_dtype_and_device(record.plan.parameter),
        )
        if record.capture != "one_sided":
            return record.rule.right_basis(*known, **like), record.rule.left_basis(*known, **like)
        # A graph may hold it already; the layer's input was projected on that very tensor.
        basis = record.basis
        if basis is None:
            record.basis = basis = record.rule.right_basis(*known, **like)
        return basis, None

    def _forget_failed_backward(self) -> None:
        # A backward that is open and not under way has failed: the bases that its graph may still hold are of no further use.
        failed = self.tracker.open_backwards
        if not self._failed_tasks.issuperset(failed) and torch._C._current_graph_task_id() == -1:
            self._failed_tasks = set(failed)
            self._forget_bases()

    def _forget_bases(self) -> None:
        for record in self._records.values():
            record.basis = None
