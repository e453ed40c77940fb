"""Layers whose class gradlr has changed, so that they hand their weight's gradient over in another form; and back again."""

from __future__ import annotations

import copyreg
import functools
import gc
import inspect
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..layers import LayerOp
from .hook import lost_optimizer

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


@dataclass(frozen=True)
class Capture:
    """How one weight's gradient is taken, and who receives it.

    Attributes:
        receiver: The optimizer.
        layer_op: What the layer computed when it was attached; None for an embedding.
    """

    receiver: weakref.ref[Any]
    layer_op: LayerOp | None

    def living_receiver(self) -> Any:
        """The optimizer; an AttachError where it does not exist any more."""
        receiver = self.receiver()
        if receiver is None:
            raise lost_optimizer()
        return receiver


# weight -> how its gradient is taken. A copied or unpickled module is not in here: an ordinary layer.
captures: WeakIdKeyDictionary = WeakIdKeyDictionary()


class AdaptedLayer:
    """Mixed into a layer's class, so that hooks, names, state_dict and `isinstance` stay what they were."""

    _gradlr_original: type[nn.Module]
    _gradlr_input: str

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        # By position, or by the name that the layer's own forward gives it.
        x = inputs[0] if len(inputs) == 1 and not named else None if inputs or len(named) != 1 else named.get(self._gradlr_input)
        output = self._captured(x) if isinstance(x, Tensor) and _is_plain(x) else None
        return self._uncaptured(*inputs, **named) if output is None else output

    def _uncaptured(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return super().forward(*inputs, **named)

    def __reduce_ex__(self, protocol: int):
        # A copy or a pickle is of the original class: nothing of gradlr is in it.
        return copyreg._reconstructor, (self._gradlr_original, object, None), self._contents()

    def _captured(self, x: Tensor) -> Tensor | None:
        """The layer's output, whose backward hands the weight's gradient over; None where the layer's own forward is to do it."""
        raise NotImplementedError

    def _contents(self) -> dict[str, Any]:
        return self.__dict__

    def _let_go(self) -> None:
        """Become the layer of before; called once."""
        captures.pop(self.weight, None)
        self.__class__ = self._gradlr_original


@functools.cache
def adapted_class(original: type[nn.Module], over: type[AdaptedLayer]) -> type[nn.Module]:
    """The layer's class with another one put over it."""
    input_name = list(inspect.signature(original.forward).parameters)[1]
    # The backward changes weights, which no compiler may move. Not as a decorator: it would import torch._dynamo with gradlr.
    forward = torch.compiler.disable(over.forward)
    contents = {"_gradlr_original": original, "_gradlr_input": input_name, "__doc__": over.__doc__, "forward": forward}
    return type(f"Adapted{original.__name__}", (over, original), contents)


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


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
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    if adapted:
        gc.collect()  # a scheduler makes its optimizer part of a reference cycle
    for module in adapted:
        capture = captures.get(module.weight)
        if capture is None or capture.receiver() is None:
            module._let_go()


class LayerCapture:
    """Holds layers whose class was changed, weakly; gives them their own again in `remove`."""

    def __init__(self, layers: Iterable[CapturedLayer]) -> None:
        self._modules = [weakref.ref(layer.module) for layer in layers]

    def remove(self) -> None:
        """Give the layers their own class again. Calling it again does nothing."""
        for reference in self._modules:
            module = reference()
            if isinstance(module, AdaptedLayer):
                module._let_go()
        self._modules = []
