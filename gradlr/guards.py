"""What can go wrong in a backward pass, told so that it can be mended: each function makes one error."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import AttachError, BackwardError, LossError, NonFiniteError


def unshown_loss(name: str) -> LossError:
    """A gradient came before any loss."""
    return LossError(
        f"a gradient of {name!r} arrived, but the tracker was never shown a loss: "
        "write tracker(loss).backward(), with the tracker that attach was given. Nothing was changed"
    )


def second_gradient(name: str, loss_number: int) -> BackwardError:
    """A parameter that was updated for this loss got another gradient."""
    return BackwardError(
        f"a second gradient of {name!r} arrived for loss number {loss_number}, and its first has been applied. "
        'To accumulate gradients, or where backward reaches a weight twice, attach with apply="step" and call opt.step(); '
        "otherwise show every loss to the tracker before its backward: tracker(loss).backward()"
    )


def unsupported_gradient(name: str, layout: object, dtype: object) -> BackwardError:
    """A sparse or complex gradient."""
    return BackwardError(
        f"the gradient of {name!r} is {layout}, {dtype}; gradlr takes dense real gradients. "
        "Use sparse=False in embeddings, and real parameters"
    )


def non_finite(name: str, loss_number: int, loss: float | None, changed: Sequence[str]) -> NonFiniteError:
    """NaN or infinity in a gradient; `changed` are the parameters that this backward or step has updated already."""
    tale = "nothing was changed"
    if changed:
        tale = f"{len(changed)} parameters were updated before it, {changed[0]!r} first, the others were not"
    return NonFiniteError(
        f"the gradient of {name!r} holds NaN or infinity, or is too large to be squared, at loss number {loss_number} "
        f"(loss {loss}); {tale}. "
        "Skip batches whose loss is not finite before backward, lower lr, or look for an overflow in the forward pass"
    )


def non_finite_before(name: str, loss_number: int) -> NonFiniteError:
    """NaN or infinity that a device reported one loss late."""
    return NonFiniteError(
        f"the gradient of {name!r} held NaN or infinity, or was too large to be squared, at loss number {loss_number}. Told one "
        "loss late, as always on CUDA: this parameter kept its value, the other parameters of that step were updated. "
        "Skip batches whose loss is not finite before backward, lower lr, or look for an overflow in the forward pass"
    )


def scaled_loss(scale: float, is_changed: bool) -> BackwardError:
    """Backward started from another scalar than the loss that was shown."""
    return BackwardError(
        f"the loss shown to the tracker enters this backward multiplied by {scale:g}. An update inside backward would be wrong. "
        'For a division by accumulation steps attach with apply="step" and call opt.step(); a GradScaler is not supported yet, '
        "train in bfloat16 instead; otherwise show the tracker the very scalar that you call backward on. "
        f"{'The update has been applied' if is_changed else 'Nothing was changed'}"
    )


def lost_parameters(lost: Sequence[str], count: int) -> AttachError:
    """Attached parameters are no longer the model's."""
    return AttachError(
        f"{len(lost)} of {count} parameters were replaced since attach ({lost[0]!r} first), so their hooks are gone. Load "
        "weights with load_state_dict(assign=False); move, wrap and parametrize the model before attaching; or call "
        "opt.detach() and attach again"
    )


def no_gradient(loss_number: int, count: int) -> AttachError:
    """Backward ran and no hook fired."""
    return AttachError(
        f"a backward pass ran for loss number {loss_number}, and none of the {count} attached parameters received a gradient. "
        "Was the loss computed with this very model (not a copy), outside torch.no_grad() and without detach()?"
    )
