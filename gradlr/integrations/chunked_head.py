"""transformers' causal language models without logits: their own forward, and `linear_cross_entropy` as their loss."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..capture.linear_cross_entropy import linear_cross_entropy
from ..errors import ArgumentError
from ..layers.base import class_of

_Model = TypeVar("_Model", bound=nn.Module)


def chunk_head_(model: _Model) -> _Model:
    """Let a causal language model of transformers find its loss without logits, in place.

    Wherever it is called with `labels`, in training and evaluation, the loss and its gradients are those of
    `gradlr.linear_cross_entropy`, with the shift, the mask and `num_items_in_batch` of transformers' own loss; `output.logits`
    then has no positions: (batch, 0, vocabulary). A call without labels, or with `logits_to_keep`, is left as it is, and so is
    everything that the model does besides (losses of experts, caches, checkpointing). Before or after `gradlr.attach`.

    Args:
        model: Has its weights; its loss is transformers' ForCausalLMLoss. It is run once, on two tokens.

    Returns:
        The same model. Calling it again does nothing.

    Raises:
        ArgumentError: the model has no such head or loss, or does something to its logits (a soft cap, a scale). Nothing was
            changed.
    """
    if isinstance(getattr(model, "loss_function", None), _ChunkedLoss):
        return model
    body = _body(model)
    _require_plain_logits(model, body)
    loss = model.loss_function = _ChunkedLoss(cast(Any, model).loss_function)  # type: ignore[assignment]
    model.register_forward_pre_hook(loss.before, with_kwargs=True)
    body.register_forward_hook(loss.keep)
    model.register_forward_hook(loss.after, always_call=True)
    return model


def _body(model: Any) -> nn.Module:
    """What makes the hidden states, of a model whose loss is understood."""
    name = type(model).__name__
    body = getattr(model, "base_model", None)
    if not isinstance(body, nn.Module) or body is model or not hasattr(model, "get_output_embeddings"):
        raise ArgumentError(f"chunk_head_: {name} is no causal language model of transformers; use gradlr.linear_cross_entropy")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not issubclass(class_of(head), nn.Linear):
        raise ArgumentError(f"chunk_head_: the head of {name} is {type(head).__name__}, not a Linear")
    loss = getattr(model.loss_function, "__name__", repr(model.loss_function))
    if loss != "ForCausalLMLoss" or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ArgumentError(f"chunk_head_: the loss of {name} is {loss}, which is not the plain next-token loss of its logits")
    return body


@torch.no_grad()
def _require_plain_logits(model: Any, body: nn.Module) -> None:
    """See on two tokens that the logits are the head of the body's output, and nothing else."""
    found: list[Tensor] = []

    def replace(module: nn.Module, inputs: Any, output: Any) -> None:
        # By large numbers, in place: a soft cap shows there, whatever weights and tokens are.
        found.append(output[0].copy_(torch.linspace(-256, 256, output[0].numel()).view(output[0].shape)))

    handle = body.register_forward_hook(replace)
    head, modes = model.get_output_embeddings(), [(module, module.training) for module in model.modules()]
    try:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=head.weight.device)
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    expected = head(found[-1])
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected.float(), rtol=1e-5):
        raise ArgumentError(
            f"chunk_head_: the logits of {type(model).__name__} are not its head of its last hidden states: it caps or scales "
            "them (final_logit_softcapping, logit_scale and the like in its config), which a loss without logits cannot see"
        )


class _ChunkedLoss:
    """A model's `loss_function`, and its hooks: keeps the hidden states of the call under way.

    Args:
        original: The loss of the logits, for calls that are left as they are.
    """

    def __init__(self, original: Any) -> None:
        self._original, self._head = original, cast(Any, None)
        self._hidden: Tensor | None = None
        self._is_wanted = False

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Ask the model for no logits where there are labels."""
        self._is_wanted = kwargs.get("labels") is not None and "logits_to_keep" not in kwargs
        if not self._is_wanted:
            return args, kwargs
        self._head = model.get_output_embeddings()
        no_positions = torch.empty(0, dtype=torch.int64, device=kwargs["labels"].device)
        return args, {**kwargs, "logits_to_keep": no_positions}

    def keep(self, body: nn.Module, inputs: Any, output: Any) -> None:
        """The body has made its hidden states."""
        if self._is_wanted:
            self._hidden = output[0]

    def after(self, model: Any, inputs: Any, output: Any) -> None:
        """The call is over, or has failed."""
        self._hidden, self._is_wanted = None, False

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' ForCausalLMLoss, of logits that are not there."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            return self._original(logits, labels, *args, **kwargs)
        return _loss(hidden, self._head, labels, **kwargs)


def _loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    if shift_labels is None:  # token i predicts token i + 1; the last one of a sequence nothing
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(hidden.shape[:-1]).to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(hidden, head, shift_labels, ignore_index=ignore_index, reduction=reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
