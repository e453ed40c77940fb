"""How large the rank is: the notebook's `decide_rank`, and the schedules that call it before each backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ArgumentError, LossError

_STEP = 8


def decide_rank(loss: float, max_loss: float | None = None, max_rank: int = 8, min_rank: int = 1) -> int:
    """The rank for a loss: `int(loss / max_loss · max_rank)`, clamped to [min_rank, max_rank].

    Args:
        loss: The current loss, finite, in any unit.
        max_loss: The loss that stands for `max_rank`, same unit; the current loss where None.
        max_rank: Largest rank.
        min_rank: Smallest rank.

    Returns:
        The rank. `max_rank` where `max_loss` is not positive, since the ratio says nothing then.

    Raises:
        LossError: `loss` or `max_loss` is NaN or infinite.
        ArgumentError: the ranks are no ints, or not 1 ≤ min_rank ≤ max_rank.

    Source: the notebook's rule; the notebook lets the rank pass `max_rank` when the loss passes `max_loss`, this does not.
    """
    if not (isinstance(min_rank, int) and isinstance(max_rank, int)):
        raise ArgumentError(f"decide_rank: min_rank={min_rank!r}, max_rank={max_rank!r}; both must be ints")
    loss = float(loss)
    max_loss = loss if max_loss is None else float(max_loss)
    if not (math.isfinite(loss) and math.isfinite(max_loss)):
        raise LossError(f"decide_rank: loss={loss}, max_loss={max_loss}; both must be finite")
    if not 1 <= min_rank <= max_rank:
        raise ArgumentError(f"decide_rank: min_rank={min_rank}, max_rank={max_rank}; needed is 1 <= min_rank <= max_rank")
    if max_loss <= 0:
        return max_rank
    return max(min_rank, int(min(loss / max_loss, 1.0) * max_rank))


def round_rank(rank: int, limit: int) -> int:
    """The next multiple of 8 above 8, never above `limit`.

    Ranks move in these steps so that state whose size follows the rank is not reallocated at each step, and so that the
    products stay aligned to the hardware's tiles. Upwards, so that the ceiling is reached and no more than asked for is cut.
    """
    return min(rank if rank <= _STEP else -(-rank // _STEP) * _STEP, limit)


@dataclass(frozen=True)
class RankInputs:
    """What a schedule may look at.

    Attributes:
        ratio: Loss over maximal loss, in [0, 1]; 1 where that says nothing, as of losses below zero.
        current: The parameter's rank so far.
        limit: min(m, n) of the parameter's view.
        progress: Which share of the loss' fall so far is recent, in [0, 1], as `LossTracker.progress` has it.
    """

    ratio: float
    current: int
    limit: int
    progress: float = 1.0


class RankSchedule:
    """A rank schedule; a subclass with these two methods is one of your own."""

    def __call__(self, inputs: RankInputs) -> int:
        """The rank of the next update, in [1, `ceiling(inputs.limit)`]."""
        raise NotImplementedError

    def ceiling(self, limit: int) -> int:
        """The largest rank that the schedule will ever give where min(m, n) is `limit`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(RankSchedule):
    """Always the same rank.

    Args:
        rank: A number of directions (int), or a fraction of min(m, n) (float in (0, 1]).
    """

    rank: int | float

    def __post_init__(self) -> None:
        require_rank("rank", self.rank)

    def __call__(self, inputs: RankInputs) -> int:
        return resolve_rank(self.rank, inputs.limit)

    def ceiling(self, limit: int) -> int:
        return resolve_rank(self.rank, limit)


@dataclass(frozen=True)
class ByProgress(RankSchedule):
    """Between `max_rank`, with which it begins, and half of it, where the loss has ceased to fall; in steps of 8 above 8.

    `max_rank · (1 + progress) / 2`, so three quarters where the loss falls evenly. It follows `LossTracker.progress`: what is
    added to the loss, and what it is multiplied with, changes nothing.

    Args:
        max_rank: Largest rank, int or fraction of min(m, n).
    """

    max_rank: int | float

    def __post_init__(self) -> None:
        require_rank("max_rank", self.max_rank)

    def __call__(self, inputs: RankInputs) -> int:
        highest = resolve_rank(self.max_rank, inputs.limit)
        return round_rank(math.ceil(highest * (1 + inputs.progress) / 2), highest)

    def ceiling(self, limit: int) -> int:
        return resolve_rank(self.max_rank, limit)


@dataclass(frozen=True)
class ByLoss(RankSchedule):
    """The notebook's schedule: the rank is `max_rank` times loss over maximal loss, in steps of 8 above 8.

    For losses of one scale that end near zero. From the first loss below zero on, the ratio says nothing, and the rank stays at
    `max_rank`, which is told once.

    Args:
        max_rank: Largest rank, int or fraction of min(m, n).
        min_rank: Smallest rank, likewise.
    """

    max_rank: int | float
    min_rank: int | float = 1

    def __post_init__(self) -> None:
        require_rank("max_rank", self.max_rank)
        require_rank("min_rank", self.min_rank)

    def __call__(self, inputs: RankInputs) -> int:
        highest = self.ceiling(inputs.limit)
        lowest = min(resolve_rank(self.min_rank, inputs.limit), highest)
        return round_rank(decide_rank(inputs.ratio, 1.0, highest, lowest), highest)

    def ceiling(self, limit: int) -> int:
        return resolve_rank(self.max_rank, limit)


def resolve_rank(rank: int | float, limit: int) -> int:
    """An int, or a float as a fraction of `limit`, as a rank in [1, limit]."""
    wanted = rank if isinstance(rank, int) else round(rank * limit)
    return min(max(wanted, 1), limit)


def require_rank(name: str, rank: int | float, *, minimum: int = 1) -> None:
    """Raise an ArgumentError unless `rank` is an int ≥ `minimum` or a float in (0, 1], which 0.0 joins where the minimum is 0."""
    is_count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= minimum
    is_fraction = isinstance(rank, float) and (0 < rank <= 1 or rank == minimum == 0)
    if not (is_count or is_fraction):
        fraction = f"a float in {'[' if minimum == 0 else '('}0, 1], a fraction of min(m, n)"
        raise ArgumentError(f"{name}={rank!r}: give an int of at least {minimum}, or {fraction}")


def as_schedule(rank: int | float | RankSchedule) -> RankSchedule:
    """A schedule as it is; a number as `Fixed(number)`.

    Raises:
        ArgumentError: `rank` is neither a schedule nor a number in range.
    """
    if callable(rank) and not isinstance(rank, RankSchedule):
        raise ArgumentError(f"rank={rank!r}: a schedule of your own must be an object of a subclass of gradlr.RankSchedule")
    return rank if isinstance(rank, RankSchedule) else Fixed(rank)
