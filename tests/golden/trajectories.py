"""Named runs of twenty steps whose every weight is pinned: what gradlr computes, told through its public interface only.

Each function is a case: it trains one of the small networks, and returns its weights after some of the steps, and its losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from golden.networks import Experts, Falling, Images, Layers, Tokens, Upcast
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import gradlr

STEPS = 20
# Weights are kept after these. The first tells of one update alone, the later ones of momentum and of all that has built up.
KEPT_AFTER = (1, 10, 20)
# What exact trajectories keep besides: where these differ from those recorded, a processor draws others, and nothing is the same.
DRAWN = "random numbers in float32"


@dataclass(frozen=True)
class Trajectory:
    """A case.

    Attributes:
        name: Also that of its file.
        run: Trains; returns "loss" (one number a step), "weights after ...: ..." and whatever else is worth pinning.
        processes: How many of them call `run` at the same time, as members of the default group.
        is_exact: Whether every bit must be as recorded: with weights and state in half precision there is nothing between "the
            same" and "rounded to the other neighbour". Sums of float32 in another order mostly leave it as it is, and may flip
            an entry of the state by chance, from which on everything differs: then see `record` whether only late steps moved.
    """

    name: str
    run: Callable[[], dict[str, Tensor]]
    processes: int = 1
    is_exact: bool = False


TRAJECTORIES: dict[str, Trajectory] = {}


class Noise:
    """Relative noise on every weight before each step: shows how far a trajectory carries rounding errors. 0 but for that."""

    size = 0.0


def trajectory(*, processes: int = 1, is_exact: bool = False) -> Callable:
    """Register a function as the case of its name."""

    def register(run: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        TRAJECTORIES[run.__name__] = Trajectory(run.__name__, run, processes, is_exact)
        return run

    return register


def tracked(**options: float) -> gradlr.rules.LowRankPolar:
    """The default rule in products, Cholesky factors and triangular solves."""
    return gradlr.rules.LowRankPolar(**options)


class Run:
    """A network, attached, on its way through the steps; what is kept of it gathers in `kept`."""

    def __init__(
        self, kind: Callable[[], nn.Module] = Layers, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options
    ) -> None:
        self.model = _made(kind, seed).to(dtype)
        if options.pop("is_sharded", False):
            for part in (self.model.first, self.model.second, self.model):
                fully_shard(part)
        self.tracker = gradlr.LossTracker()
        kinds = {"embedding": {"lr": 1e-3}, "vector": {"lr": 1e-3}}
        options = {"lr": 1e-3, "kinds": kinds, "rank": 4, "momentum_rank": 3, "rule": tracked()} | options
        self.opt = gradlr.attach(self.model, self.tracker, **options)
        self.losses: list[float] = []
        self.kept: dict[str, Tensor] = {}

    def go(
        self,
        steps: Iterable[int] = range(1, STEPS + 1),
        *,
        micro: int = 1,
        part: slice = slice(None),
        samples: int = 96,
        max_norm: float | None = None,
    ) -> dict[str, Tensor]:
        """Take these steps, numbered from 1.

        Args:
            steps: Their numbers.
            micro: Number of micro-batches that make a step.
            part: What of a batch this process sees.
            samples: Of a whole batch.
            max_norm: For torch's clipping over the optimizer's parameters.
        """
        for step in steps:
            self._shake(step)
            shown = []
            for rows in _split(samples, part, micro):
                loss = self.model.loss(step, rows)
                shown.append(loss.detach())
                total = self.tracker(loss)
                (total / micro if micro > 1 else total).backward()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_([one for group in self.opt.param_groups for one in group["params"]], max_norm)
            self.opt.step()
            self.opt.zero_grad()
            self.losses.append(float(torch.stack(shown).mean()))
            if step in KEPT_AFTER:
                self.kept |= {f"weights after {step}: {name}": one for name, one in self.weights().items()}
        return {"loss": torch.tensor(self.losses, dtype=torch.float64), **self.kept}

    def weights(self) -> dict[str, Tensor]:
        """A copy of every weight, whole."""
        named = {name: one.detach() for name, one in self.model.named_parameters()}
        return {name: one.full_tensor() if hasattr(one, "full_tensor") else one.clone() for name, one in named.items()}

    def _shake(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters() if Noise.size else ():
            here = parameter.detach()
            here = here.to_local() if hasattr(here, "to_local") else here
            here.mul_(1 + Noise.size * torch.randn(here.shape, generator=generator, dtype=torch.float64))


class Counted(gradlr.ByLoss):
    """The schedule by loss, which remembers what it gave."""

    given: ClassVar[list[int]] = []  # the schedule itself is frozen

    def __call__(self, inputs: gradlr.RankInputs) -> int:
        self.given.append(super().__call__(inputs))
        return self.given[-1]


# One process, hooks


@trajectory()
def hook_backward():
    return Run().go()


@trajectory()
def hook_step():
    return Run(apply="step").go()


@trajectory()
def hook_without_residual():
    return Run(rule=tracked(residual=0.0)).go()


@trajectory()
def without_momentum():
    return Run(momentum_rank=0).go()


@trajectory()
def without_momentum_accumulation():
    return Run(momentum_rank=0, apply="step").go(micro=3)


@trajectory()
def multi_normalized():
    return Run(rule="multi_normalized").go()


@trajectory()
def polar_adaptor():
    return Run(rule="polar", capture="adaptor").go()


@trajectory()
def weight_decay():
    groups = [{"match": "second.*", "lr": 5e-4, "weight_decay": 0.02, "rank": 6, "momentum_rank": 2, "beta": 0.8}]
    return Run(weight_decay=0.3, groups=groups).go()


@trajectory()
def views_of_a_batch():
    views = {"experts": "e i o -> e o i", "fused.weight": "(three o) i -> three o i"}
    return Run(Experts, rank=3, momentum_rank=2, views=views).go()


@trajectory()
def views_of_a_batch_step():
    views = {"experts": "e i o -> e o i", "fused.weight": "(three o) i -> three o i"}
    return Run(Experts, rank=1, momentum_rank=1, views=views, apply="step").go()


@trajectory()
def convolutions_hook():
    return Run(Images, rank=2, momentum_rank=1).go(samples=8)


@trajectory()
def rank_by_loss():
    Counted.given.clear()
    kept = Run(Falling, lr=4e-3, rank=Counted(12)).go()
    assert len(set(Counted.given)) >= 4, f"the rank hardly changes: {Counted.given}"
    return kept


@trajectory()
def rank_by_loss_step():
    Counted.given.clear()
    kept = Run(Falling, lr=4e-3, rank=Counted(6), apply="step").go()
    assert len(set(Counted.given)) >= 4, f"the rank hardly changes: {Counted.given}"
    return kept


# Layers that hand over their gradients unformed


@trajectory()
def adaptor_backward():
    return Run(capture="adaptor").go()


@trajectory()
def adaptor_step():
    return Run(capture="adaptor", apply="step").go()


@trajectory()
def one_sided_backward():
    return Run(capture="one_sided").go()


@trajectory()
def one_sided_step():
    return Run(capture="one_sided", apply="step").go()


@trajectory()
def convolutions_adaptor():
    return Run(Images, rank=2, momentum_rank=1, capture="adaptor").go(samples=8)


# Other rules


@trajectory()
def factor_moments():
    rule = gradlr.rules.FactorMoments(newton_schulz_dtype=torch.float64)
    return Run(rule=rule).go()


@trajectory()
def factor_moments_adjusted_step():
    rule = gradlr.rules.FactorMoments(newton_schulz_dtype=torch.float64, is_adjusted=True)
    return Run(rule=rule, apply="step").go()


@trajectory()
def tables():
    return Run(Tokens).go(samples=16)


@trajectory()
def tables_tied():
    return Run(lambda: Tokens(is_tied=True)).go(samples=16)


@trajectory()
def tables_adaptor():
    return Run(Tokens, capture="adaptor").go(samples=16)


@trajectory()
def tables_tied_adaptor_step():
    return Run(lambda: Tokens(is_tied=True), capture="adaptor", apply="step").go(samples=16, micro=2)


@trajectory()
def tables_sparse():
    return Run(lambda: Tokens(is_sparse=True)).go(samples=16)


# Steps made of several gradients, and limits on their norm


@trajectory()
def accumulation():
    return Run(apply="step").go(micro=3)


@trajectory()
def accumulation_adaptor():
    return Run(apply="step", capture="adaptor").go(micro=3)


@trajectory()
def accumulation_one_sided():
    return Run(apply="step", capture="one_sided").go(micro=3)


@trajectory()
def clipping_by_limit():
    return Run(apply="step", max_grad_norm=0.15).go()


@trajectory()
def clipping_by_torch():
    return Run(apply="step").go(max_norm=0.15)


# Half precision


@trajectory(is_exact=True)
def bfloat16_weights():
    kept = Run(Upcast, dtype=torch.bfloat16, state_dtype=torch.bfloat16, weight_decay=0.1).go(samples=64)
    return {DRAWN: torch.randn(64, generator=torch.Generator().manual_seed(0)), **kept}


# Resumed runs


@trajectory()
def resumed():
    whole, first = Run(), Run()
    expected = whole.go()
    first.go(range(1, 11))
    second = Run(seed=7)
    second.model.load_state_dict(first.model.state_dict())
    second.opt.load_state_dict(first.opt.state_dict())
    second.go(range(11, STEPS + 1))
    return _joined(first, second, expected)


@trajectory()
def resumed_from_a_file():
    options = {"apply": "step", "capture": "adaptor", "max_grad_norm": 0.15}
    whole, first = Run(**options), Run(**options)
    expected = whole.go(micro=3)
    first.go(range(1, 11), micro=3)
    second = Run(seed=7, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        gradlr.save(path, model=first.model, optimizer=first.opt)
        gradlr.load(path, model=second.model, optimizer=second.opt)
    second.go(range(11, STEPS + 1), micro=3)
    return _joined(first, second, expected)


# Two processes


@trajectory(processes=2)
def replicas_hook():
    return Run(apply="step", process_group=distributed.group.WORLD).go(part=_own_half())


@trajectory(processes=2)
def replicas_adaptor_accumulation():
    return Run(apply="step", capture="adaptor", process_group=distributed.group.WORLD).go(part=_own_half(), micro=2)


@trajectory(processes=2)
def sharded_backward():
    return Run(is_sharded=True).go(part=_own_half())


@trajectory(processes=2)
def sharded_without_momentum():
    return Run(is_sharded=True, momentum_rank=0).go(part=_own_half())


@trajectory(processes=2)
def sharded_step():
    return Run(is_sharded=True, apply="step", max_grad_norm=0.15).go(part=_own_half())


def _made(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    # Drawn in float64: in float32, normal numbers differ in their last bits between processors.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        return kind()
    finally:
        torch.set_default_dtype(default)


def _own_half() -> slice:
    return slice(0, 48) if distributed.get_rank() == 0 else slice(48, 96)


def _split(samples: int, part: slice, count: int) -> list[slice]:
    rows = range(samples)[part]
    size = len(rows) // count
    return [slice(rows.start + index * size, rows.start + (index + 1) * size) for index in range(count)]


def _joined(first: Run, second: Run, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What both halves have kept, which is to the bit what the run in one piece has."""
    losses = torch.tensor(first.losses + second.losses, dtype=torch.float64)
    joined = {"loss": losses, **first.kept, **second.kept}
    assert joined.keys() == expected.keys()
    for name, one in expected.items():
        if not Noise.size:
            assert torch.equal(joined[name], one), f"{name} is another one after the run was resumed"
    return joined
