"""Capture by post-accumulate hooks: take the gradient of a parameter the moment it is complete, and free it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import AttachError

# parameter -> the claim that holds it, and its hook. Weak on both sides: neither a dropped model nor a dropped optimizer is kept
# alive.
_captures: WeakIdKeyDictionary = WeakIdKeyDictionary()


class ParameterLock:
    """Holds parameters for one optimizer, as long as it lives: no other may attach to them.

    Args:
        named_parameters: Pairs of name and parameter.

    Raises:
        AttachError: a parameter is held by another claim that is still alive.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        named_parameters = list(named_parameters)
        for name, parameter in named_parameters:
            _release_dead(parameter)
            if parameter in _captures:
                raise AttachError(
                    f"parameter {name!r} is attached already: two optimizers would both update it in one backward. "
                    "Call opt.detach() on the first one, or attach under `with gradlr.attach(...) as opt:`"
                )
        self._handles: list[RemovableHandle] = []
        self._parameters = [weakref.ref(parameter) for _, parameter in named_parameters]
        for _, parameter in named_parameters:
            _captures[parameter] = (weakref.ref(self), None)

    def remove(self) -> None:
        """Give the parameters free, and remove all hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        for reference in self._parameters:
            parameter = reference()
            if parameter is not None:
                _captures.pop(parameter, None)
        self._handles, self._parameters = [], []


class HookCapture(ParameterLock):
    """Registers one hook per parameter and hands each gradient to `receive`; owns the handles.

    Args:
        named_parameters: Pairs of name and parameter.
        receive: Bound method called as `receive(parameter, gradient)`, held weakly; `parameter.grad` is None by then.

    Raises:
        AttachError: a parameter is held by another claim that is still alive.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], receive: Callable[[Tensor, Tensor], None]) -> None:
        named_parameters = list(named_parameters)
        super().__init__(named_parameters)
        hook = _make_hook(weakref.WeakMethod(receive))
        try:
            for _, parameter in named_parameters:
                self._register(parameter, hook)
        except RuntimeError:  # a parameter that requires no gradient
            self.remove()
            raise

    def _register(self, parameter: Tensor, hook: Callable[[Tensor], None]) -> None:
        handle = parameter.register_post_accumulate_grad_hook(hook)
        self._handles.append(handle)
        _captures[parameter] = (weakref.ref(self), handle)


def lost_optimizer() -> AttachError:
    """A gradient is there, and the optimizer that should take it is not."""
    return AttachError(
        "the optimizer that gradlr.attach returned does not exist any more, so nothing would be updated. "
        "Keep it in a variable as long as you train: opt = gradlr.attach(...). To go on without gradlr, attach once "
        "more and call opt.detach() at once: that removes these hooks"
    )


def _release_dead(parameter: Tensor) -> None:
    if parameter in _captures and _captures[parameter][0]() is not None:
        gc.collect()  # a scheduler makes its optimizer part of a reference cycle
    if parameter in _captures and _captures[parameter][0]() is None:
        _, handle = _captures.pop(parameter)
        if handle is not None:
            handle.remove()


def _make_hook(receiver: weakref.WeakMethod) -> Callable[[Tensor], None]:
    def take_gradient(parameter: Tensor) -> None:
        receive = receiver()
        if receive is None:
            raise lost_optimizer()
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            receive(parameter, gradient)

    return take_gradient
