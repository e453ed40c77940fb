"""What a baseline is, and those that torch and gradlr make: a step function from a model and one learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import attach
from ...errors import GradlrWarning
from ...layers.quantize import quantize_
from ...optimizer import GradLR
from ...params.kinds import EMBEDDING, MATRIX, VECTOR, plan_parameters
from ...tracker import LossTracker
from .spawn import group_of_one

Loss = Callable[[], Tensor]
Parameters = list[nn.Parameter]


@dataclass
class TrainStep:
    """One optimizer at work on one model.

    Attributes:
        step: Takes a function that computes the loss, runs backward and the update, and returns the loss.
        optimizers: The torch optimizers behind it.
        tracker: gradlr's tracker, None for the others.
        more_state: State of a parameter that lies outside of `optimizer.state`, or no tensor there.
    """

    step: Callable[[Loss], Tensor]
    optimizers: list[Optimizer]
    tracker: LossTracker | None = None
    more_state: Callable[[nn.Parameter], list[Tensor]] = lambda parameter: []
    _rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._rates = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        # Asked anew each time: load_state_dict puts other dictionaries in their places.
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_rate(self, factor: float) -> None:
        """Multiply every learning rate that was there at the start by a factor (a schedule)."""
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate * factor

    def mean_rank(self) -> float | None:
        """Mean rank over the matrices at this moment, None but for gradlr."""
        records = [record for one in self.optimizers if isinstance(one, GradLR) for record in one.records]
        ranks = [record.rank for record in records if record.plan.kind == MATRIX]
        return sum(ranks) / len(ranks) if ranks else None

    def state_numbers(self, parameters: Iterable[nn.Parameter]) -> int:
        """Numbers of state kept for the given parameters, step counters left out."""
        return sum(value.numel() for value in self._state(parameters))

    def state_bytes(self, parameters: Iterable[nn.Parameter] | None = None) -> int:
        """Bytes of state of the given parameters, or of all, step counters left out."""
        if parameters is None:
            parameters = [parameter for group in self._groups() for parameter in group["params"]]
        return sum(value.nbytes for value in self._state(parameters))

    def _state(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        seen: set[int] = set()  # what several parameters share, such as bitsandbytes' code table, counts once
        for parameter in parameters:
            kept = [value for one in self.optimizers for value in one.state.get(parameter, {}).values()]
            tensors = [value for value in kept if torch.is_tensor(value) and value.ndim > 0]
            for value in (*tensors, *self.more_state(parameter)):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield value


@dataclass(frozen=True)
class Baseline:
    """A named way to train.

    Attributes:
        name, label: For arguments, and for tables.
        make: From a model and a learning rate to a TrainStep.
        rates: The grid that its learning rate is tuned on; none where nothing is tuned.
    """

    name: str
    label: str
    make: Callable[[nn.Module, float], TrainStep]
    rates: tuple[float, ...] = ()


def split_parameters(model: nn.Module) -> tuple[Parameters, Parameters, Parameters]:
    """(matrices, embeddings, vectors), as gradlr sees them; every baseline that treats them apart uses this split."""
    found: dict[str, Parameters] = {MATRIX: [], EMBEDDING: [], VECTOR: []}
    for plan in plan_parameters(model):
        found[plan.kind].append(plan.parameter)
    return found[MATRIX], found[EMBEDDING], found[VECTOR]


def split_by_axes(matrices: Parameters) -> tuple[Parameters, Parameters]:
    """(2-D parameters, the others such as convolutions), for packages that take 2-D matrices only."""
    return [p for p in matrices if p.ndim == 2], [p for p in matrices if p.ndim != 2]


def ordinary(*optimizers: Optimizer, more_state: Callable[[nn.Parameter], list[Tensor]] = lambda parameter: []) -> TrainStep:
    """Backward, then the step of each optimizer, then no gradients."""

    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return TrainStep(step, list(optimizers), more_state=more_state)


def forward_backward(model: nn.Module, lr: float) -> TrainStep:
    """No optimizer at all: the gradients are made and dropped."""

    def step(compute: Loss) -> Tensor:
        loss = compute()
        loss.backward()
        model.zero_grad()
        return loss

    return TrainStep(step, [])


def sgd(model: nn.Module, lr: float) -> TrainStep:
    """torch's SGD without momentum: the least that an optimizer can do."""
    return ordinary(torch.optim.SGD(model.parameters(), lr=lr))


def adamw(model: nn.Module, lr: float, **options: Any) -> TrainStep:
    """torch's AdamW, one learning rate for everything, no weight decay (as for all baselines)."""
    return ordinary(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **options))


def fused_adamw(model: nn.Module, lr: float) -> TrainStep:
    """torch's AdamW in one kernel a tensor, without a copy of the gradients."""
    return adamw(model, lr, fused=True)


def adamw_slow_tables(model: nn.Module, lr: float, share: float = 1 / 4, **options: Any) -> TrainStep:
    """AdamW with embeddings at a share of the rate: what splitting the rates alone is worth."""
    matrices, embeddings, vectors = split_parameters(model)
    groups: list[dict[str, Any]] = [{"params": matrices + vectors}, {"params": embeddings, "lr": lr * share}]
    return ordinary(torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, **options))


def muon(model: nn.Module, lr: float, momentum: float = 0.95) -> TrainStep:
    """torch's Muon for matrices, AdamW at an eighth of its rate for the rest; without momentum it keeps nothing of a matrix."""
    matrices, embeddings, vectors = split_parameters(model)
    flat, folded = split_by_axes(matrices)
    of_matrices = torch.optim.Muon(flat, lr=lr, momentum=momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(folded + embeddings + vectors, lr=lr / 8, weight_decay=0.0)
    if momentum == 0:
        # Its buffer is a copy of the gradient then, which the next step does not ask for.
        of_matrices.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.state.clear())
    return ordinary(of_matrices, rest)


def row_normalized(model: nn.Module, lr: float) -> TrainStep:
    """Every row of a matrix's gradient at a root mean square of one, as in SCALE (arXiv 2506.16659); AdamW for the rest."""
    matrices, embeddings, vectors = split_parameters(model)
    rest = torch.optim.AdamW(embeddings + vectors, lr=lr, weight_decay=0.0)
    normalized = torch.optim.SGD(matrices, lr=lr)

    @torch.no_grad()
    def normalize(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for matrix in matrices:
            if matrix.grad is not None:
                matrix.grad = torch.nn.functional.rms_norm(matrix.grad.flatten(1), (matrix[0].numel(),)).view_as(matrix)

    normalized.register_step_pre_hook(normalize)
    return ordinary(normalized, rest)


def gradlr(
    *, embedding_share: float | None = None, in_group: bool = False, int8_group: int | None = None, **options: Any
) -> Callable[[nn.Module, float], TrainStep]:
    """gradlr with the given arguments of `attach`; its vectors and embeddings follow its one learning rate.

    Args:
        embedding_share: Rate of embeddings as a share of it; that of `attach` where None.
        in_group: With `process_group=` of all processes, or of this one alone where it belongs to no group.
        int8_group: Of `quantize_`, which is called before; None to leave the weights.
        **options: Of `attach`.
    """

    def make(model: nn.Module, lr: float) -> TrainStep:
        if int8_group is not None:
            quantize_(model, group=int8_group)
        tracker, chosen = LossTracker(), dict(options)
        if embedding_share is not None:
            chosen["kinds"] = {"embedding": {"lr": lr * embedding_share}}
        if in_group:
            chosen["process_group"] = group_of_one()
        with warnings.catch_warnings():
            # What an adaptor of so large a rank costs is measured here, too.
            warnings.filterwarnings("ignore", "capture=.* costs more than hooks would", GradlrWarning)
            optimizer = attach(model, tracker, lr=lr, **chosen)

        def step(compute: Loss) -> Tensor:
            loss = compute()
            tracker(loss)
            loss.backward()
            optimizer.step()
            return loss

        return TrainStep(step, [optimizer], tracker)

    return make
