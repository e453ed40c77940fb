"""Every layer type that gradlr knows: one line each. What is in no line is taken as its parameters' shapes suggest."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .base import AS_IT_IS, LayerOp, LayerType, View
from .conv import CONVOLUTION, TRANSPOSED_CONVOLUTION
from .embedding import EMBEDDING
from .linear import LINEAR, TRANSPOSED_LINEAR

# Scales, one by one, also where they have the shape of a matrix.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_QUERY_KEY_VALUE = View("(three o) i -> three o i", (("three", 3),))


def _attention_view(layer: nn.MultiheadAttention, name: str, weight: Tensor) -> View | None:
    return _QUERY_KEY_VALUE if name == "in_proj_weight" and weight.shape[0] == 3 * layer.embed_dim else None


LAYER_TYPES: tuple[LayerType, ...] = (
    LINEAR,
    TRANSPOSED_LINEAR,
    CONVOLUTION,
    TRANSPOSED_CONVOLUTION,
    EMBEDDING,
    LayerType(lambda module: isinstance(module, _NORMS), is_norm=True),
    LayerType(lambda module: isinstance(module, nn.MultiheadAttention), _attention_view),
)
_ANY_OTHER = LayerType(lambda module: True)


def layer_type_of(module: nn.Module) -> LayerType:
    """The type of a layer, that of its base class where it is a subclass; one that knows nothing where none fits."""
    return next((one for one in LAYER_TYPES if one.is_type(module)), _ANY_OTHER)


def is_registered(module: nn.Module) -> bool:
    """Whether a line of the table knows the layer."""
    return layer_type_of(module) is not _ANY_OTHER


def layer_op(module: nn.Module) -> LayerOp | None:
    """The linear map that a module computes; None where it is no plain Linear, transformers' Conv1D or ungrouped convolution."""
    return layer_type_of(module).op(module)


def natural_view(module: nn.Module, name: str, parameter: Tensor) -> View:
    """How a layer's parameter, by its name there, is seen as (a batch of) matrices: as the type says, or by its last two axes."""
    return layer_type_of(module).view(module, name, parameter) or leading_batch(parameter.ndim)


def leading_batch(ndim: int) -> View:
    """A parameter with that many axes as matrices of its last two, the others folded into one batch axis."""
    axes = " ".join(f"b{index}" for index in range(ndim - 2))
    return View(f"{axes} m n -> ({axes}) m n") if ndim > 3 else AS_IT_IS
