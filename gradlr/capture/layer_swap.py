"""Layers whose class gradlr has changed, so that they hand their weight's gradient over in another form; and back again."""

from __future__ import annotations

import copyreg
import functools
import gc
import inspect
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..layers import LayerOp
from .hook import Receiver, lost_optimizer

_SELECTIVE = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)


@dataclass(frozen=True)
class CapturedLayer:
    """One layer whose weight gradient is not to be formed.

    Attributes:
        module: An `nn.Embedding`, or a module that `layer_op` knows.
        layer_op: What it computes; None for an embedding.
        is_one_sided: Whether x X is saved for backward instead of x.
    """

    module: nn.Module
    layer_op: LayerOp | None
    is_one_sided: bool = False

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        return cast(Tensor, self.module.weight)


@dataclass(frozen=True)
class TakenWeight:
    """How one weight's gradient is taken, and who receives it.

    Attributes:
        receiver: The optimizer.
        layer_op: What the layer computed when it was attached; None for an embedding.
        is_one_sided: Whether the projected input is saved for backward.
    """

    receiver: weakref.ref[Receiver]
    layer_op: LayerOp | None
    is_one_sided: bool

    def living_receiver(self) -> Receiver:
        """The optimizer; an AttachError where it does not exist any more."""
        receiver = self.receiver()
        if receiver is None:
            raise lost_optimizer()
        return receiver


# weight -> how its gradient is taken. A copied or unpickled module is not in here: an ordinary layer.
taken: WeakIdKeyDictionary = WeakIdKeyDictionary()


class SwappedLayer(nn.Module):
    """Put over a layer's class, so that hooks, names, state_dict and `isinstance` stay what they were."""

    _gradlr_original: type[nn.Module]
    _gradlr_input: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    padding_idx: int | None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """As the layer's own, unless the weight's gradient is to be handed over."""
        # By position, or by the name that the layer's own forward gives it.
        x = inputs[0] if len(inputs) == 1 and not named else None if inputs or len(named) != 1 else named.get(self._gradlr_input)
        is_plain = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested
        output = self._captured(x) if is_plain and x is not None else None
        return super().forward(*inputs, **named) if output is None else output

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # A copy or a pickle is of the original class: nothing of gradlr is in it.
        return copyreg._reconstructor, (self._gradlr_original, object, None), self.__dict__  # type: ignore[attr-defined]

    def _captured(self, x: Tensor) -> Tensor | None:
        """The layer's output, whose backward hands the weight's gradient over; None where the layer's own forward is to do it."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Become the layer of before; called once."""
        taken.pop(self.weight, None)
        self.__class__ = self._gradlr_original  # type: ignore[assignment]  # which this one was put over


@functools.cache
def swapped_class(original: type[nn.Module], over: type[SwappedLayer]) -> type[nn.Module]:
    """The layer's class with another one put over it."""
    input_name = list(inspect.signature(original.forward).parameters)[1]
    # The backward changes weights, which no compiler may move. Not as a decorator: it would import torch._dynamo with gradlr.
    forward = torch.compiler.disable(over.forward)
    contents = {"_gradlr_original": original, "_gradlr_input": input_name, "__doc__": over.__doc__, "forward": forward}
    return type(f"Swapped{original.__name__}", (over, original), contents)


def autocasted(x: Tensor) -> Tensor:
    """A layer's input as autocast would hand it to the layer."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def unseen_by_checkpoints() -> AbstractContextManager[None]:
    """Selective checkpointing counts what it sees, and a recomputation takes the basis that is there. Other modes may look on."""
    is_selective = any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())
    return _disable_current_modes() if is_selective else nullcontext()


def release_abandoned(model: nn.Module) -> None:
    """Make those layers of the model plain again whose optimizer does not exist any more."""
    swapped = [module for module in model.modules() if isinstance(module, SwappedLayer)]
    if swapped:
        gc.collect()  # a scheduler makes its optimizer part of a reference cycle
    for module in swapped:
        how = taken.get(module.weight)
        if how is None or how.receiver() is None:
            module._let_go()
