"""attach(): one line between a model and its training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .capture.layer_swap import release_abandoned
from .distributed.communicator import propagate_errors
from .distributed.setup import spread_groups, sync_for
from .engine.attached_parameters import COMPILED_WHOLE, is_compiled_whole, require_plain_model, require_trainable
from .engine.compiled_updates import CompiledUpdates
from .engine.grad_norm import GradClipper
from .errors import ArgumentError, warn
from .linalg.int8 import Int8Weight
from .optimizer import GradLR
from .params.groups import parameter_groups
from .params.kinds import guesses_message, plan_parameters
from .params.views import with_views
from .ranks import ByProgress, RankSchedule
from .rules import Rule
from .rules.base import require_rate
from .tracker import LossTracker

# Measured by `python -m gradlr bench quality` (docs/study.md). One learning rate is tuned, AdamW's; params/kinds.py says how
# those of the other kinds follow it.
DEFAULT_LR = 1e-4
DEFAULT_RANK = ByProgress(max_rank=80)
DEFAULT_MOMENTUM_RANK = 0


def attach(
    model: nn.Module,
    loss_tracker: LossTracker,
    *,
    lr: float | Tensor = DEFAULT_LR,
    rank: int | float | RankSchedule = DEFAULT_RANK,
    momentum_rank: int | float = DEFAULT_MOMENTUM_RANK,
    beta: float = 0.9,
    weight_decay: float = 0.0,
    rule: str | Rule = "low_rank_polar",
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
    groups: Sequence[dict[str, Any]] = (),
    views: Mapping[str, str | tuple[str, Mapping[str, int]]] | None = None,
    apply: str = "backward",
    capture: str = "hook",
    max_grad_norm: float | None = None,
    state_dtype: torch.dtype = torch.float32,
    compile: bool = False,
    seed: int = 0,
    process_group: distributed.ProcessGroup | None = None,
) -> GradLR:
    """Update every trainable weight of `model` inside backward; no gradient is left over.

    Args:
        model: Any module; move, wrap, freeze and load it before attaching. Each trainable parameter becomes a matrix, an
            embedding (a head with as many rows included) or a vector (bias, norm); `print(opt)` shows which.
        loss_tracker: Shown each loss before its backward: `loss_tracker(loss).backward()`.
        lr: Learning rate η, AdamW's: a step changes the weights of a matrix by 2 η, root mean square, whatever its shape, its
            rank and the residual, which puts the best rate where AdamW has it. Vectors take `lr`, embeddings `lr / 8`:
            the eighth is their group's "lr_scale". A tensor of one element is copied, one for each group.
        rank: r, the rank of gradient and update: an int, a fraction of min(m, n), or a schedule; costs arithmetic.
        momentum_rank: k, the rank of the momentum, int or fraction; costs k(m + n) numbers of state. 0 for none: matrices then
            have no state at all.
        beta: Momentum β in [0, 1), for every rule that has one; Adam's β₁ for vectors.
        weight_decay: Decoupled weight decay λ of matrices and embeddings; vectors have none.
        rule: For matrices: a name or an object of `gradlr.rules`.
        kinds: What should differ for all parameters of a kind: its own "lr", which no share is taken of, "rule" (elementwise for
            vectors; row-wise RMSprop for embeddings and Adam for vectors where none is given) or "weight_decay":
            `{"embedding": {"lr": 1e-4}, "vector": {"rule": "adam"}}`.
        groups: Dicts of "match" (a glob on parameter names, or a list of them) and any of the options above that should differ
            there, "kinds" included, or "kind" ("matrix", "embedding", "vector") to overrule what was found. The first match
            wins; a group's own options are nearer than what `kinds` says for the whole model.
        views: Glob on parameter names → einops expression "parameter axes -> [batch axes] m n": what matches becomes a matrix,
            or a batch of them, seen so: `{"*.qkv.weight": "(three o) i -> three o i"}`. Axes named two, three and four have that
            size; others that the shape leaves open come in a pair: `("(heads d) i -> heads d i", {"heads": 8})`. The first match
            wins. What has a view of yours is captured by hooks.
        apply: "backward" updates inside backward. "step" keeps a sketch of (2r + k)(m + n) numbers per matrix until
            `opt.step()` (the gradient itself where that is smaller, and for embeddings and vectors), which makes accumulation,
            several backwards and scaled losses right.
        capture: "hook" takes each gradient when it is complete. "adaptor" never forms the weight gradient of a Linear,
            transformers' Conv1D or ungrouped convolution: its backward hands over input and output gradient, from which the
            rule takes its products of rank r, exact; for the residual of a step of many tokens it is formed after all, a
            layer at a time. Embeddings hand over rows. "one_sided" also saves r numbers a token for backward instead of the
            layer's input; the gradient is projected. "auto" is "adaptor" where that costs less than a hook. Everything else
            falls back to hooks; `docs/capture.md` tells more.
        max_grad_norm: Largest global norm of a step's gradients, over all parameters; needs `apply="step"`. It decides what a
            spike weighs in the momentum; the size of an orthogonalized update does not depend on it. `opt.grad_norm` tells the
            norm before. Exact where one backward makes the step (with "adaptor" capture it costs as much as the gradients, and
            no layer may be used twice), that of the projected gradients otherwise and with "one_sided" capture.
        state_dtype: torch.float32, or torch.bfloat16 for half the state, rounded stochastically.
        compile: Updates go through `torch.compile`, one graph for each shape, rule and largest rank: fewer launches on a GPU, and
            a first step of minutes. Sharded parameters, convolutions under "adaptor" and "one_sided" layers stay eager.
        seed: Seeds all random numbers; with the step count it is part of the checkpoint.
        process_group: Of `torch.distributed`: each process trains its replica of the plain model on its own batches, and
            `opt.step()` exchanges sketches, r(m + n) numbers per matrix, whose mean all take; needs `apply="step"`. All processes
            call `attach`, `step` and `load_state_dict` alike; rank 0's weights and buffers go to all. A model that `fully_shard`
            or `parallelize_module` has sharded needs none. See `docs/devices.md`.

    Returns:
        The optimizer, a `torch.optim.Optimizer`. Keep it in a variable: hooks hold it weakly.

    Raises:
        ArgumentError: an argument is out of range, unknown, or matches no parameter. Nothing was changed.
        AttachError: the model is wrapped, or spread over several devices of this process, has no trainable parameter, holds
            gradients, or is attached already.
        ParallelError: the processes of the group differ in model or arguments; names the ranks.

    Warns:
        GradlrWarning: several processes run and no group is given. The model is compiled as a whole.
            With `capture`: ranks are so large that hooks would be faster. Parameters of no known layer have four axes or more,
            three with one in front, or names that speak of a table or of logarithms ("emb...", "pos...", "table", "log..."):
            what was assumed, and how to overrule it.
    """
    sync = sync_for(model, process_group, capture)
    with propagate_errors(sync.comm):
        require_plain_model(model)
        _require_arguments(loss_tracker, apply, max_grad_norm, state_dtype, compile, seed)
        if sync.shares_bases and apply == "backward":
            raise ArgumentError('process_group= needs apply="step": what processes exchange waits for opt.step()')
        release_abandoned(model)
        plans = plan_parameters(model)
        require_trainable(model, plans)
        if sync.shares_bases and any(isinstance(plan.parameter, Int8Weight) for plan in plans):
            raise ArgumentError(
                "process_group= and int8 weights: these are trained in one process so far. Leave one of the two out"
            )
        if is_compiled_whole(model):
            warn(COMPILED_WHOLE)
        members = parameter_groups(
            with_views(plans, {} if views is None else views), groups, kinds,
            lr=lr, rank=rank, momentum_rank=momentum_rank, beta=beta, weight_decay=weight_decay, rule=rule,
        )  # fmt: skip
        spread_groups(members, sync)
        if guesses := [plan for group in members for plan in group.plans if plan.is_guess]:
            warn(guesses_message(guesses))
        optimizer = GradLR(
            model, members, loss_tracker, defaults={"lr": require_rate("lr", lr), "beta": beta, "weight_decay": weight_decay},
            apply=apply, capture="hook" if sync.hooks_only else capture, max_grad_norm=max_grad_norm, state_dtype=state_dtype,
            seed=seed, sync=sync,
        )  # fmt: skip
        if compile:
            optimizer.committer.compiled = CompiledUpdates()
    try:
        losses = {"loss ratio": loss_tracker.ratio, "progress": loss_tracker.progress, "max_loss": loss_tracker.max_loss}
        sync.join(model, optimizer.store, {"max_grad_norm": max_grad_norm, **losses})
    except BaseException:
        optimizer.detach()
        raise
    return optimizer


def _require_arguments(
    loss_tracker: LossTracker,
    apply: str,
    max_grad_norm: float | None,
    state_dtype: torch.dtype,
    compile: bool,
    seed: int,
) -> None:
    if not isinstance(loss_tracker, LossTracker):
        raise ArgumentError(f"loss_tracker is a {type(loss_tracker).__name__}; pass gradlr.LossTracker()")
    if apply not in ("backward", "step"):
        raise ArgumentError(f"apply={apply!r}: use 'backward' (update inside backward) or 'step' (update in opt.step())")
    GradClipper(apply == "step", max_grad_norm)  # raises where that is no limit
    if state_dtype not in (torch.float32, torch.bfloat16):
        raise ArgumentError(f"state_dtype={state_dtype}: use torch.float32 or torch.bfloat16")
    if not isinstance(compile, bool):
        raise ArgumentError(f"compile={compile!r}: use True or False")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"seed={seed!r}: it must be an int of at least 0")
