"""Every layer type that gradlr knows: one line each. What is in no line is taken as its parameters' shapes suggest."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import ATTENTION
from .base import AS_IT_IS, LayerOp, LayerType, View
from .conv import CONVOLUTION, TRANSPOSED_CONVOLUTION
from .embedding import EMBEDDING
from .linear import LINEAR, TRANSPOSED_LINEAR
from .norm import NORM

LAYER_TYPES: tuple[LayerType, ...] = (
    LINEAR,
    TRANSPOSED_LINEAR,
    CONVOLUTION,
    TRANSPOSED_CONVOLUTION,
    EMBEDDING,
    NORM,
    ATTENTION,
)
_ANY_OTHER = LayerType(lambda module: True)


def layer_type_of(module: nn.Module) -> LayerType:
    """The type of a layer, that of its base class where it is a subclass; one that knows nothing where none fits."""
    return next((one for one in LAYER_TYPES if one.is_type(module)), _ANY_OTHER)


def layer_op(module: nn.Module) -> LayerOp | None:
    """The linear map that the module computes; None where it is no plain Linear, transformers' Conv1D or ungrouped convolution.

    Subclasses may compute anything, so none is taken: the class must be the very one, or one that capture has put over it.
    """
    return layer_type_of(module).op(module)


def natural_view(module: nn.Module, name: str, parameter: Tensor) -> View:
    """How one parameter of a layer is seen as (a batch of) matrices: as its type says, or the last two axes of each.

    Args:
        module: The layer that owns it.
        name: Its name there, "weight" for one.
        parameter: The parameter, or what a parametrization makes it of.
    """
    return layer_type_of(module).view(module, name, parameter) or leading_batch(parameter.ndim)


def leading_batch(ndim: int) -> View:
    """A parameter with that many axes as matrices of its last two, the others folded into one batch axis."""
    axes = " ".join(f"b{index}" for index in range(ndim - 2))
    return View(f"{axes} m n -> ({axes}) m n") if ndim > 3 else AS_IT_IS
