"""What can go wrong in a backward pass, told so that it can be mended: each function makes one error or message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, AttachError, BackwardError, CheckpointError, LossError, NonFiniteError, ParallelError

SKIP_ADVICE = "Skip batches whose loss is not finite before backward, lower lr, or look for an overflow in the forward pass"


def changed_message(changed: Sequence[str]) -> str:
    """What has happened to the weights: `changed` are the parameters that this backward or step has updated already."""
    if not changed:
        return "Nothing was changed"
    plural = "s were" if len(changed) > 1 else " was"
    return f"{len(changed)} parameter{plural} updated before it ({changed[0]!r} first), the others were not"


def unshown_loss(name: str) -> LossError:
    """A gradient came before any loss."""
    return LossError(
        f"a gradient of {name!r} arrived, but the tracker was never shown a loss, or not since a checkpoint was loaded: "
        "write tracker(loss).backward(), with the tracker that attach was given. Nothing was changed"
    )


def foreign_backward(name: str, loss_number: int, changed: Sequence[str]) -> BackwardError:
    """A gradient came from a backward that does not pass through the loss that was shown."""
    return BackwardError(
        f"a gradient of {name!r} arrived from a backward that does not pass through loss number {loss_number}, the last one "
        "shown, or reaches it later. Show the tracker the scalar that you call backward on (the sum, where a loss has several "
        f"terms); models that train against each other need a tracker each. {changed_message(changed)}"
    )


def second_gradient(name: str, loss_number: int, changed: Sequence[str]) -> BackwardError:
    """A parameter that was updated for this loss got another gradient."""
    return BackwardError(
        f"a second gradient of {name!r} arrived for loss number {loss_number}, and its first has been applied. "
        'To accumulate gradients, or where backward reaches a weight twice, attach with apply="step" and call opt.step(); '
        f"otherwise show every loss to the tracker before its backward: tracker(loss).backward(). {changed_message(changed)}"
    )


def unsupported_gradient(name: str, layout: object, dtype: object, changed: Sequence[str]) -> BackwardError:
    """A complex gradient, or one that is sparse in another way than by rows."""
    return BackwardError(
        f"the gradient of {name!r} is {layout}, {dtype}; gradlr takes real gradients, dense "
        f"or, as of embeddings with sparse=True, by rows. Make it dense, or leave the parameter out. {changed_message(changed)}"
    )


def non_finite(name: str, loss_number: int, loss: float | None, changed: Sequence[str]) -> NonFiniteError:
    """NaN or infinity in a gradient, or in what a rule made of it."""
    return NonFiniteError(f"{bad_gradient(name, loss_number, loss)}. {changed_message(changed)}. {SKIP_ADVICE}")


def bad_gradient(name: str, loss_number: int, loss: float | None) -> str:
    """Why a step is left out: a gradient."""
    return (
        f"the gradient of {name!r} holds NaN or infinity, or is too large for its update to be finite, at loss number "
        f"{loss_number} (loss {loss})"
    )


def bad_loss(loss_number: int, loss: float) -> str:
    """Why a step is left out: a loss."""
    return f"loss number {loss_number} is {loss}"


def non_finite_before(name: str, loss_number: int) -> NonFiniteError:
    """NaN or infinity that a device reported one loss late."""
    return NonFiniteError(
        f"the gradient of {name!r} held NaN or infinity, or was too large for its update to be finite, at loss number "
        f"{loss_number}. Told one loss late, as always on CUDA: this parameter kept its value, the other parameters of that "
        f"step were updated. {SKIP_ADVICE}"
    )


def scaled_loss(scale: float, tale: str) -> BackwardError:
    """Backward started from another scalar than the loss that was shown."""
    return BackwardError(
        f"the loss shown to the tracker enters this backward multiplied by {scale:g}. An update inside backward would be wrong. "
        'For a GradScaler, or a division by accumulation steps, attach with apply="step" and call opt.step(); '
        f"otherwise show the tracker the very scalar that you call backward on. {tale}"
    )


def interrupted(loss_number: int | None, changed: Sequence[str], dropped: int) -> str:
    """A backward that ended in an exception, told at the next call; its loss has no number where it was not shown."""
    loss = "a loss that was not shown" if loss_number is None else f"loss number {loss_number}"
    tale = f"The gradients that waited for step() ({dropped} parameters) are dropped" if dropped else changed_message(changed)
    return f"the backward of {loss} did not come to its end (an exception in a layer?). {tale}"


def clipped_values() -> ArgumentError:
    """clip_grad_value_ over the optimizer's parameters."""
    return ArgumentError(
        "gradients were clipped by value (clip_grad_value_?) over opt.param_groups: what waits for step() is a sketch, whose "
        "entries are not the gradient's. Clip by norm instead: torch.nn.utils.clip_grad_norm_, or max_grad_norm= of attach. "
        "What waited for this step is dropped"
    )


def detached_early(count: int) -> str:
    """detach() while gradients wait."""
    tale = f"opt.detach() drops the gradients of {count} parameters that waited for step()"
    return f"{tale}: call opt.step() or opt.zero_grad() before"


def half_step(changed: Sequence[str], count: int) -> str:
    """A step that ended in an exception while it wrote."""
    return (
        f"opt.step() did not come to its end: {len(changed)} of {count} parameters were updated ({changed[0]!r} first), the "
        "others were not, and what waited for them is dropped. Load the last checkpoint, or go on with a step half taken"
    )


def unfinished_step(waiting: Sequence[str]) -> CheckpointError:
    """A checkpoint is asked for while gradients wait."""
    tale = f"{len(waiting)} gradients wait for step() ({waiting[0]!r} first)"
    return CheckpointError(f"{tale}: save after opt.step() or opt.zero_grad()")


def wrapped(name: str, wrapper: str) -> AttachError:
    """The model is in a wrapper that averages gradients after hooks have taken them."""
    return AttachError(
        f"{name} is wrapped in {wrapper}: hooks would see each replica's own gradient, and replicas would drift apart. Attach "
        'to the plain module with apply="step" and process_group=, which sends less than the wrapper does. A trainer that '
        "insists on wrapping (accelerate, Lightning) takes it through gradlr.integrations, which keep the wrapper away"
    )


def lost_parameters(lost: Sequence[str], count: int) -> AttachError:
    """Attached parameters are no longer the model's."""
    return AttachError(
        f"{len(lost)} of {count} parameters were replaced since attach ({lost[0]!r} first), so their hooks are gone. Load "
        "weights with load_state_dict(assign=False); move, wrap, shard (fully_shard) and parametrize the model before attaching; "
        "or call opt.detach() and attach again"
    )


def changed_form(name: str, before: Any, now: Any) -> AttachError:
    """An attached parameter has another shape, dtype or device: each a triple of the three."""
    forms = " when it was attached and is ".join(f"{tuple(shape)} {dtype} on {device}" for shape, dtype, device in (before, now))
    way_out = "convert and move the model before attaching, or call opt.detach() and attach again"
    return AttachError(f"parameter {name!r} was {forms} now: {way_out}")


def strangers(names: Sequence[str]) -> str:
    """Trainable parameters that nobody updates."""
    return (
        f"{len(names)} trainable parameters of the model are not attached ({names[0]!r} first) and will not be updated: "
        "they were frozen or not there when attach was called. Call opt.detach() and attach again"
    )


def no_gradient(loss_number: int, count: int) -> AttachError:
    """Backward ran and no hook fired."""
    return AttachError(
        f"a backward pass ran for loss number {loss_number}, and none of the {count} attached parameters received a gradient. "
        "Was the loss computed with this very model (not a copy), outside torch.no_grad() and without detach()?"
    )


def no_gradient_known(count: int) -> str:
    """step() without any gradient, where the shown losses do not tell whether a backward ran."""
    return (
        f"opt.step() has nothing to do: since the last step, none of the {count} attached parameters received a gradient, though "
        "losses were shown. Was backward called, on a loss of this very model (not a copy)?"
    )


def unshown_losses(count: int) -> str:
    """Gradients of losses that the tracker did not see."""
    return (
        f"opt.step() writes gradients of a loss that the tracker was not shown; the last one it saw was number {count}, so the "
        "rank follows that. Write tracker(loss).backward() for every loss"
    )


def never_stepped(count: int) -> str:
    """Gradients wait, and nobody calls step()."""
    return f'the gradients of {count} losses wait and no weight has changed: with apply="step", call opt.step() after backward'


def accumulated(count: int) -> str:
    """Several backwards and one step(), where each backward has updated already."""
    return (
        f"{count} backward passes have each updated the weights since the last opt.step(). If they were meant to accumulate into "
        'one step, attach with apply="step"'
    )


def foreign_default_rate() -> str:
    """A trainer's own default learning rate, which was not passed on."""
    return (
        "learning_rate is transformers' default of 5e-5, which is AdamW's: gradlr trains with its own default instead. Give "
        'TrainingArguments another one, or gradlr={"lr": ...}'
    )


def compiled_whole() -> str:
    """The model is compiled as one graph."""
    return (
        "the model is compiled as a whole: its backward makes all gradients at once, so that all are in memory before the first "
        "is taken. The updates are right; for the memory, compile block by block (for block in model.blocks: block.compile())"
    )


def clipped_alone() -> ArgumentError:
    """Clipping or unscaling before the processes have exchanged what waits."""
    return ArgumentError(
        "the gradients were clipped or unscaled over opt.param_groups (clip_grad_norm_, GradScaler?), but with a process group "
        "each process holds its own part of them until opt.step(). Give max_grad_norm= to attach, and train in bfloat16 rather "
        "than with a GradScaler. What waited for this step is dropped"
    )


def not_finite_on(ranks: Sequence[int], own_rank: int, own_reason: str) -> str:
    """Why a step is left out by all processes."""
    own = f". Here, on rank {own_rank}: {own_reason}" if own_rank in ranks else ""
    return f"NaN or infinity in a loss or a gradient on rank {' and '.join(map(str, ranks))}{own}"


def failed_elsewhere(ranks: Sequence[int]) -> ParallelError:
    """Another process came to the step with an error."""
    return ParallelError(
        f"opt.step() ended with an error on rank {' and '.join(map(str, ranks))}, which tells it there. This step is dropped on "
        "all ranks; nothing was changed"
    )
